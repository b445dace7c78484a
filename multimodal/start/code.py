"""Declarations as Python source, and the program that trains the same as the quick path did."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from multimodal.declare import Declared
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer

TOP = {"Classify", "Core", "NextToken", "Recipe", "Regress", "Task"}
"""Names that a program writes as mm.Name."""


def code_of(value: Any, imports: set[tuple[str, str]]) -> str:
    """A value of a declaration as a Python expression; fields at their defaults are left out.

    imports: to which (module, name) are added that the expression needs.

    Raises:
        ConfigError: a value that has no such form.
    """
    if isinstance(value, Declared) and dataclasses.is_dataclass(value):
        name = type(value).__name__
        if name not in TOP:
            module = type(value).__module__
            imports.add((module.partition(".")[0] if isinstance(value, Tokenizer) else module, name))
        given = []
        for part in dataclasses.fields(value):
            inner, default = getattr(value, part.name), part.default
            if part.default_factory is not dataclasses.MISSING:
                default = part.default_factory()
            if part.init and (default is dataclasses.MISSING or inner != default):
                given.append(f"{part.name}={code_of(inner, imports)}")
        return f"{'mm.' if name in TOP else ''}{name}({', '.join(given)})"
    if isinstance(value, tuple):
        parts = [code_of(part, imports) for part in value]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise ConfigError(f"{type(value).__name__} has no form in a program")


def program(
    *,
    command: str,
    folder: str,
    shards: bool,
    parts: Mapping[str, int],
    tokenizers: Mapping[str, str | Tokenizer],
    core: Any,
    head: Any,
    task: str,
    seed: int,
    recipe: Any,
    gaps: float,
    changes: Mapping[str, str],
) -> str:
    """The source of script.py. tokenizers: by name of a kind, its declaration, or the expression that makes it of `train`.
    changes: by name of a field, the expression of its augmentations."""
    imports: set[tuple[str, str]] = set()
    made = {}
    for kind, part in tokenizers.items():
        if isinstance(part, str) and part.startswith("mm."):
            made[kind] = part
        elif isinstance(part, str):
            imports.add(("multimodal_tokenizers", part.partition("(")[0].partition(".")[0]))
            made[kind] = part
        else:
            made[kind] = code_of(part, imports)
    core_code, head_code, recipe_code = (code_of(part, imports) for part in (core, head, recipe))
    used = [part for part in ("train", "held_out", "test") if parts.get(part)]
    by_module: dict[str, list[str]] = {}
    for module, name in sorted(imports):
        by_module.setdefault(module, []).append(name)
    names = ", ".join(used)
    if shards:
        read = [f"{names} = (mm.Shards(run / part) for part in {tuple(used)!r})".replace("'", '"')]
    else:
        read = [
            "def samples(part):",
            '    with (run / f"{part}.jsonl").open(encoding="utf-8") as lines:',
            "        return [json.loads(line) for line in lines]",
            "",
            "",
            f"{names} = map(samples, {tuple(used)!r})".replace("'", '"'),
        ]
    data = f'mm.data.MissingCells(train, "row", share={gaps})' if gaps else "train"
    if changes:
        by_field = ", ".join(f'"{name}": {code}' for name, code in changes.items())
        data = f"augment.Augmented({data}, {{{by_field}}})"
    held_out = ", evaluation={task: held_out}" if parts.get("held_out") else ""
    lines = [
        f'"""What `{command}` trained, as a program: run it, change it."""',
        "",
        *([] if shards else ["import json"]),
        "from pathlib import Path",
        "",
        "import multimodal as mm",
        *(["from multimodal import augment"] if changes else []),
        *(f"from {module} import {', '.join(some)}" for module, some in by_module.items()),
        "",
        "run = Path(__file__).parent",
        *(["", ""] if not shards else []),
        *read,
        f"task = {task!r}".replace("'", '"'),
        "model = mm.Model(",
        "    tokenizers={",
        *(f'        "{kind}": {code},' for kind, code in made.items()),
        "    },",
        f"    core={core_code},",
        f"    tasks=[mm.Task(task, head={head_code})],",
        f"    seed={seed},",
        ")",
        f"recipe = {recipe_code}",
        f'mm.fit(model, {{task: {data}}}, recipe{held_out}, folder=run / "script", resume=True)',
        "print(mm.evaluate(model, task, test))",
    ]
    return "\n".join(lines) + "\n"
