"""Writes the model card for the hub (README.md): tasks, training data, evaluation results and usage."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multimodal.checkpoint import declarations
from multimodal.declare import OURS, part_types
from multimodal.heads import Classify, Masked
from multimodal.model import Model
from multimodal.notebook import short_form
from multimodal.pattern import Field
from multimodal.serve.values import CLASS, PICTURE, SOUND, TEXT, inside, takes
from multimodal.shapes import ConfigError
from multimodal.texts import as_json, listed
from multimodal.train.run_report import Record
from multimodal.versions import package_version

LIBRARY = "multimodal-stream"
MARK = "<!-- written by multimodal-stream from the model and its run; checksum "
SAMPLES = {PICTURE: '"image.png"', SOUND: '"sound.wav"', TEXT: '"a text"'}
# {(what is read, what is written): the hub's name of the task}; other tasks have no name there
PIPELINES = {
    ((PICTURE,), CLASS): "image-classification",
    ((SOUND,), CLASS): "audio-classification",
    ((TEXT,), CLASS): "text-classification",
    ((PICTURE,), TEXT): "image-to-text",
    ((SOUND,), TEXT): "automatic-speech-recognition",
    ((TEXT,), TEXT): "text-generation",
    ((), TEXT): "text-generation",
    ((PICTURE, TEXT), TEXT): "image-text-to-text",
    ((SOUND, TEXT), TEXT): "audio-text-to-text",
    ((TEXT,), PICTURE): "text-to-image",
    ((PICTURE,), PICTURE): "image-to-image",
    ((TEXT,), SOUND): "text-to-audio",
    ((SOUND,), SOUND): "audio-to-audio",
}
PAIRS = {
    (PICTURE, PICTURE): "image-feature-extraction",
    (PICTURE, TEXT): "zero-shot-image-classification",
    (TEXT, TEXT): "sentence-similarity",
}


def card(
    model: Model,
    name: str,
    *,
    run: str | Path | None = None,
    best: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
    limits: str = "",
) -> str:
    """The text of README.md, with the metadata that the hub reads.

    name: "owner/model".
    run: the run folder of the training, for data, settings and evaluation results; None: the card leaves them out.
    best: whether this is the best model of the run, not the last.
    license: the hub's identifier, such as "apache-2.0". datasets: names on the hub of the training data.
    limits: what the model is not for, and where it is known to fail.

    Raises:
        ConfigError: `run` holds no log.
    """
    record = None if run is None else _record(Path(run))
    figures, step = ({}, None) if record is None else _figures(record, best, model.tasks)
    settings = {name: short_form(tokenizer) for name, tokenizer in model.packer.tokenizers.items()}
    counts = model.parameter_counts()
    parts = [
        f"# {name.rpartition('/')[2]}",
        f"A model of {LIBRARY} with {counts['all']:,} parameters: {listed(map(_code, model.tasks))}.",
        _origin(model),
        "## What it reads and writes",
        _table(("task", "head"), [(_code(p), _code(short_form(head))) for p, head in model.packer.heads.items()]),
        _table(
            ("kind", "a value", "tokenizer"),
            [(_code(kind), _value(model.packer.tokenizers[kind]), _code(text)) for kind, text in settings.items()],
        ),
        "## Size",
        _table(("part", "parameters"), [(part, f"{count:,}") for part, count in counts.items()]),
        f"Core: {_code(short_form(model.core.core))}",
        *_training(record, datasets),
        *_held_out(figures, step, record),
        *_limits(model, figures, limits),
        "## How to use it",
        *_usage(model, name),
    ]
    head = _front_matter(model, name, figures, license, datasets)
    return signed(f"---\n{head}---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def signed(text: str) -> str:
    """A card with its checksum as the last line, so that a later push can see whether somebody changed it."""
    return f"{text}\n{MARK}{_checksum(text)} -->\n"


def is_as_written(text: str) -> bool:
    """Whether `card` wrote this card, and nobody changed it since."""
    body, mark, checksum = text.rpartition(f"\n{MARK}")
    return bool(mark) and checksum.strip().removesuffix(" -->") == _checksum(body)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _front_matter(
    model: Model, name: str, figures: Mapping[tuple[str, str], float], license: str | None, datasets: Sequence[str]
) -> str:
    """The metadata as YAML. Scalars are written as JSON, which is valid YAML."""
    tags = dict.fromkeys([LIBRARY, "multimodal", *model.packer.tokenizers])
    pipelines = [found for pattern in model.tasks if (found := pipeline(model, pattern))]
    origin = model.origin or {}
    entries: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": pipelines[0] if pipelines else None,
        "tags": list(tags),
        "license": license,
        "base_model": origin["name"] if origin.get("revision") else None,
        "datasets": list(datasets),
        "metrics": list(dict.fromkeys(_metric(model, *key) for key in figures)),
    }
    if figures:
        # the hub requires a type, which private data do not have
        dataset = {"name": "held-out data of the run", "type": datasets[0] if len(datasets) == 1 else "held-out"}
        results = [
            {
                "task": {"type": pipeline(model, pattern) or "other", "name": pattern},
                "dataset": dataset,
                "metrics": [
                    {"type": _metric(model, of, measure), "name": measure, "value": float(f"{value:.4g}")}
                    for (of, measure), value in figures.items()
                    if of == pattern
                ],
            }
            for pattern in dict.fromkeys(of for of, _ in figures)
        ]
        entries["model-index"] = [{"name": name.rpartition("/")[2], "results": results}]
    return "".join(_yaml({key: value for key, value in entries.items() if value}))


def _yaml(value: Any, indent: str = "") -> Iterable[str]:
    """Lines of YAML for a mapping or a list."""
    pairs = value.items() if isinstance(value, Mapping) else ((None, inner) for inner in value)
    for key, inner in pairs:
        start = f"{indent}- " if key is None else f"{indent}{key}:"
        if isinstance(inner, (Mapping, list)) and inner:
            lines = list(_yaml(inner, indent + "  "))
            if key is None:  # the first line of an entry follows its dash
                yield start + lines[0][len(indent) + 2 :]
                yield from lines[1:]
            else:
                yield f"{start}\n"
                yield from lines
        else:
            yield f"{start}{'' if key is None else ' '}{json.dumps(inner, ensure_ascii=True)}\n"


def pipeline(model: Model, pattern: str) -> str | None:
    """The hub's name of a task; None: it has none."""
    parsed, tokenizers = model.packer.patterns[pattern], model.packer.tokenizers
    if parsed.pair:
        forms = sorted(takes(tokenizers[field.kind]) for field in parsed.fields)
        return PAIRS.get(tuple(forms))  # type: ignore[arg-type]
    if isinstance(model.packer.heads[pattern], Masked):
        return None
    reads = tuple(sorted({takes(tokenizers[field.kind]) for field in parsed.reads}))
    return PIPELINES.get((reads, takes(tokenizers[parsed.writes.kind])))


def _metric(model: Model, pattern: str, measure: str) -> str:
    """The hub's name of a measure."""
    if measure == "exact":
        return "accuracy" if isinstance(model.packer.heads.get(pattern), Classify) else "exact_match"
    return re.sub(r"\W+", "_", measure).strip("_").lower()


def _record(run: Path) -> Record:
    record = Record.read(run)
    if not record.history:
        raise ConfigError(
            f"card: {run} holds no log of a run; give the folder that training wrote, such as runs/digits"
        )
    return record


def _figures(record: Record, best: bool, patterns: Iterable[str]) -> tuple[dict[tuple[str, str], float], int | None]:
    """Return ({(task, measure): value}, the step of the measurement), for the last or the best model of the run."""
    recipe = record.config.get("recipe")
    chosen = record.best(str(recipe.get("best", ""))) if best and isinstance(recipe, dict) else None
    steps = [row["step"] for row in record.history if any(key in row for key in record.measures)]
    if not steps or (best and chosen is None):
        return {}, None
    step = chosen[1] if chosen else max(steps)
    tasks = sorted(
        patterns, key=len, reverse=True
    )  # the longest first, since a task may begin with the name of another
    figures = {}
    for row in record.history:
        for key in record.measures:
            if row["step"] == step and key in row:
                task = next((task for task in tasks if key.startswith(f"{task} ")), key.rpartition(" ")[0])
                figures[task, key.removeprefix(f"{task} ")] = float(row[key])
    return {key: value for key, value in figures.items() if value - value == 0}, step  # JSON has no NaN


def _origin(model: Model) -> str:
    """A sentence about the pretrained weights that the model began with."""
    if model.origin is None:
        return ""
    at = f", commit `{model.origin['revision']}`" if model.origin.get("revision") else ""
    return f"It began with the weights of {_code(Path(str(model.origin['name'])).name if not at else model.origin['name'])}{at}."


def _training(record: Record | None, datasets: Sequence[str]) -> list[str]:
    if record is None:
        return ["## Data", f"Trained on {listed(map(_code, datasets))}."] if datasets else []
    rows = [
        (_code(str(pattern)), f"{count:,}" if isinstance(count, int) else "a stream")
        for pattern, count in record.config.get("data", {}).items()
    ]
    recipe = record.config.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    names = ("optimizer", "lr", "batch", "tokens", "accumulate", "warmup", "weight_decay", "ema", "precision", "seed")
    settings = ", ".join(
        f"{name} {as_json(recipe[name])}" for name in names if recipe.get(name) not in (None, 0, "", 1)
    )
    return [
        "## Data and training",
        f"Data sets: {listed(map(_code, datasets))}." if datasets else "",
        _table(("task", "samples"), rows) if rows else "",
        f"{record.steps:,} of {record.wanted or record.steps:,} steps" + (f": {_code(settings)}." if settings else "."),
    ]


def _held_out(figures: Mapping[tuple[str, str], float], step: int | None, record: Record | None) -> list[str]:
    if not figures:
        return []
    counts = {} if record is None else record.config.get("held_out", {})
    rows = [
        (
            _code(task),
            f"{counts[task]:,}" if isinstance(counts.get(task), int) else "not recorded",
            measure,
            f"{value:.4g}",
        )
        for (task, measure), value in figures.items()
    ]
    return [
        "## Figures",
        f"On held-out data of the run, at step {step:,}.",
        _table(("task", "held-out samples", "measure", "value"), rows),
    ]


def _limits(model: Model, figures: Mapping[tuple[str, str], float], said: str) -> list[str]:
    """What is said of its limits, and those that follow from what is known."""
    known = [" ".join(said.split())] if said.strip() else []
    known.append(
        "The figures are of the held-out data of the run alone; how well it does on data from elsewhere is not known."
        if figures
        else "How well it does is not known: no figures on held-out data go with it."
    )
    for pattern, head in model.packer.heads.items():
        if isinstance(head, Classify):
            known.append(
                f"{_code(pattern)} answers with one of the classes of {_code(pattern.rpartition('->')[2].strip())}, whatever it "
                "reads: it does not say that something is none of them."
            )
    return ["## Limits", "\n".join(f"- {line}" for line in known)]


def _value(tokenizer: Any) -> str:
    """What a value of a kind has to be like, in words."""
    form = takes(tokenizer)
    inner: Any = tokenizer
    own = {PICTURE: "max_pixels", SOUND: "rate_hz"}.get(form)
    while own and not hasattr(inner, own):
        inner = next(of for of in inside(inner).values() if takes(of) == form)  # one kind around another, as codes
    if form == PICTURE:
        channels = {1: "grey", 3: "RGB", 4: "RGBA"}.get(getattr(inner, "channels", 0), "")
        fit, patch = getattr(inner, "fit", None), getattr(inner, "patch", None)
        sides = getattr(fit, "crop", None) or getattr(fit, "size", None)
        if sides:
            size = f"of any size, which is brought to {sides[0]}x{sides[1]} pixels"
        elif shortest := getattr(fit, "shortest", None):
            size = f"of any size, whose shorter side is brought to {shortest} pixels"
        else:
            size = "read at its own size, so best about as large as those that it learned from"
            size += f"; a patch has {patch}x{patch} pixels" if patch else ""
        return f"a picture{f' ({channels})' if channels else ''}, {size}"
    if form == SOUND:
        return f"a sound at any rate, which is resampled to {inner.rate_hz:,} Hz"
    if form == CLASS:
        names = getattr(tokenizer, "names", ())
        return f"one of {len(names):,} classes: {_code(listed(names, 20))}" if names else "a class"
    return {TEXT: "a text"}.get(form, "numbers")


def _sample(model: Model, field: Field) -> str:
    """A value of a field as it stands in code."""
    value = SAMPLES.get(takes(model.packer.tokenizers[field.kind]), "...")
    return f"[{value}]" if field.many else value


def _usage(model: Model, name: str) -> list[str]:
    """Blocks that show how to use the model in Python, on the command line and as a service."""
    pattern = next(iter(model.tasks))
    parsed, head = model.packer.patterns[pattern], model.packer.heads[pattern]
    fields = {field.name: _sample(model, field) for field in parsed.reads}
    code = ["import multimodal as mm", "", f"model = mm.Model.from_hub({json.dumps(name)})"]
    line = ""
    if parsed.pair:
        left = ", ".join(f"{json.dumps(field.name)}: {_sample(model, field)}" for field in parsed.sides["left"])
        code.append(f'vectors = model.vectors({json.dumps(pattern)}, [{{{left}}}], side="left")')
    elif isinstance(head, Masked):
        code.append(f"print(model)  # {pattern} is learned from what is hidden of its data")
    else:
        verb = "generate" if head.autoregressive else "predict"
        given = "".join(f", {field}={value}" for field, value in fields.items())
        if not all(field.isidentifier() for field in fields):
            given = ", [{" + ", ".join(f"{json.dumps(field)}: {value}" for field, value in fields.items()) + "}]"
        code += [f"answer = model.{verb}({json.dumps(pattern)}{given})", "print(answer)"]
        typed = "".join(
            f" --{field} {value.strip('[]').strip(chr(34)) if ' ' not in value else value.strip('[]')}"
            for field, value in fields.items()
        )
        task = f" --task {json.dumps(pattern)}" if len(model.tasks) > 1 else ""
        line = f"multimodal {verb} {name}{task}{typed}\n"
    own = sorted(
        part for part in part_types(declarations(model)) if part.partition(":")[0].partition(".")[0] not in OURS
    )
    return [
        f"```bash\npip install {LIBRARY}\n```",
        "```python\n" + "\n".join(code) + "\n```",
        f"```bash\n{line}multimodal serve {name}\n```",
        f"It has parts of its own: {listed(map(_code, own))}. Install the package that offers them, or give the file that "
        "defines them as `--plugin FILE.py`."
        if own
        else "",
        f"`config.json` declares the model, `weights.safetensors` holds its weights; loading runs no code of theirs. Written by "
        f"{LIBRARY} {package_version()}.",
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: object) -> str:
    """A text as Markdown code, also inside a table."""
    plain = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain.encode('utf-8', 'backslashreplace').decode()}`"
