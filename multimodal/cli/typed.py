"""What was typed, as a task and as values of its fields."""

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.cli.options import FIELD, TAKEN

if TYPE_CHECKING:
    from multimodal.model import Model
    from multimodal.task import Pattern
    from multimodal.tokenizer import Tokenizer


def choose_task(model: "Model", wanted: str | None, fields: Mapping[str, Any], *, writing: bool = False) -> str:
    """The task that is named, or the only one, or the only one that reads just these fields.

    Raises:
        TaskError: none or several; lists what there is.
    """
    from multimodal.shapes import TaskError
    from multimodal.task import Pattern

    patterns = model.packer.patterns
    if wanted is not None:
        for text, pattern in patterns.items():
            if "->" in wanted and _named(Pattern.parse(wanted)) == _named(pattern):  # however it is spaced
                return text
        model.packer.check_task(wanted)
    possible = [text for text in patterns if not writing or model.packer.head(text).writes]
    if not possible:
        raise TaskError(f"no task of this model writes token by token; use predict. There are {_listed(patterns)}")
    if len(possible) == 1:
        return possible[0]
    given = set(_given(fields, {field.name for text in possible for field in patterns[text].reads}))
    fitting = [text for text in possible if {field.name for field in patterns[text].reads} == given]
    if len(fitting) == 1:
        return fitting[0]
    shown = " and ".join(sorted(given)) or "nothing"
    if fitting:
        raise TaskError(f"several tasks read {shown}; choose one with --task: {_listed(fitting)}")
    names = sorted({field.name for text in possible for field in patterns[text].reads})
    raise TaskError(f"no task reads just {shown}{_closest(given, names)}; there are {_listed(possible)}")


def _named(pattern: "Pattern") -> tuple[int, list[tuple[str, str]]]:
    return len(pattern.right), [(field.name, field.kind) for field in pattern.fields]


def _listed(tasks: Iterable[str]) -> str:
    return ", ".join(map(repr, tasks))


def _given(options: Mapping[str, str], known: Container[str]) -> dict[str, str]:
    """Fields by name, from the options as they were typed; --field-out is the field `out`, as --out is an option."""
    names = {option: option.replace("-", "_") for option in options}
    short = {option: name.removeprefix(FIELD) for option, name in names.items()}
    return {
        short[option] if names[option] not in known and short[option] in known else names[option]: text
        for option, text in options.items()
    }


def _option(field: str) -> str:
    """How a field is typed."""
    return f"--{FIELD.replace('_', '-')}{field}" if field in TAKEN else f"--{field}"


def _closest(given: Iterable[str], names: Sequence[str]) -> str:
    from multimodal.shapes import did_you_mean

    return next((close for name in given if name not in names and (close := did_you_mean(name, names))), "")


def sample_from(model: "Model", task: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """A sample from the options given for a task's fields.

    Raises:
        TaskError: a field that the task does not read, or one that is missing. MediaError: a value that cannot be read.
    """
    from multimodal.shapes import TaskError

    kinds = {field.name: field.kind for field in model.packer.patterns[task].reads}
    given = _given(fields, kinds)
    for name in given:
        if name not in kinds:
            reads = " ".join(map(_option, kinds)) or "no field"
            raise TaskError(f"--{name}: task {task!r} reads {reads}{_closest([name], list(kinds))}")
    if missing := [_option(name) for name in kinds if name not in given]:
        raise TaskError(
            f"task {task!r} also reads {' '.join(missing)}; give {'it' if len(missing) == 1 else 'them'} too"
        )
    return {name: value_from(model.packer.tokenizers[kinds[name]], text, f"--{name}") for name, text in given.items()}


def samples_with(model: "Model", fields: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """A sample for every task that can be read from these fields; an answer counts as well.

    Raises:
        TaskError: a field that no task has.
    """
    from multimodal.shapes import TaskError

    patterns = model.packer.patterns
    answers = {task: {p.answer: p.writes.kind} for task, p in patterns.items() if not p.pair}
    known = sorted({field.name for p in patterns.values() for field in p.reads}.union(*answers.values()))
    given = _given(fields, known)
    for name in given:
        if name not in known:
            there = " ".join(map(_option, known))
            raise TaskError(f"--{name}: no task has such a field; there are {there}{_closest([name], known)}")
    samples = {}
    for task, pattern in patterns.items():
        kinds = {field.name: field.kind for field in pattern.reads}
        if kinds and all(name in given for name in kinds):
            kinds |= answers.get(task, {})
            tokenizers = {name: model.packer.tokenizers[kind] for name, kind in kinds.items()}
            samples[task] = [
                {name: value_from(t, given[name], f"--{name}") for name, t in tokenizers.items() if name in given}
            ]
    return samples


def value_from(tokenizer: "Tokenizer", text: str, option: str) -> Any:
    """What the user typed as a value that this tokenizer reads: the text itself (or the path), or what it holds.

    Raises:
        MediaError: nothing of it is accepted; says what the tokenizer said to the text.
    """
    from multimodal.shapes import MediaError

    first = None
    for value in _readings(text):
        try:
            tokenizer(value)
        except ValueError as error:
            first = first or error
        else:
            return value
    raise MediaError(f"{option}: {first}") from first


def _readings(text: str) -> Iterator[Any]:
    import numpy as np

    yield text
    path = Path(text)
    if path.suffix == ".npy" and path.is_file():
        try:
            yield np.load(path, allow_pickle=False)
        except ValueError:  # damaged, or an array of objects
            return
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8") if path.suffix == ".json" and path.is_file() else text)
        yield held
        if isinstance(held, list):
            yield np.array(held, dtype=np.float32)
    except ValueError:
        return
