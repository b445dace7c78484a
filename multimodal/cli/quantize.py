"""`quantize` writes a smaller copy of a model, and says what that costs in accuracy on data of one's own."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from multimodal.cli.arguments import Columns, DataFiles, DataSource, Device, Json, Most, Plugins, choose_task
from multimodal.cli.loading import load, model_folder, samples_of, tasks_of
from multimodal.cli.output import check_folder, print_json
from multimodal.progress import progress_bar

if TYPE_CHECKING:
    from multimodal.model import Model

BATCH = 32  # samples at once


def quantize(
    checkpoint: Path,
    /,
    *,
    to: Literal["int8", "int8-weights", "bfloat16"] = "int8",
    out: Annotated[Path, Parameter(help="The folder of the smaller model.")],
    data: DataSource = None,
    fields: Columns = None,
    files: DataFiles = None,
    samples: Most = 500,
    task: str | None = None,
    as_json: Json = False,
    plugin: Plugins = None,
    device: Device = "auto",
) -> int:
    """Write a model with smaller weights, and print its size, accuracy and speed beside those of the original.

    Example: multimodal quantize runs/digits --to int8 --out digits-int8 --data digits/test

    Example: multimodal quantize runs/speech --out speech-int8 --data clips.csv --fields audio=file --fields text --files audio

    Parameters
    ----------
    checkpoint
        A run folder, or the model folder in it.
    to
        "int8": a fourth of the bytes, inputs of layers are rounded too, and faster on x86 CPUs. "int8-weights": the same bytes,
        only weights are rounded. "bfloat16": half of the bytes.
    task
        The task that is measured; unless given, every task whose fields the data have.
    """
    from multimodal.checkpoint import WEIGHTS, check_room, own_config
    from multimodal.quantization import quantize as quantized
    from multimodal.shapes import ConfigError

    check_folder(out)
    check_room(out.resolve())
    if (there := own_config(out)) is not None and "quantization" not in there:
        raise ConfigError(
            f"--out {out}: a model is here that is not quantized, and the smaller one would replace it; choose another folder"
        )
    if data is None and (fields or files or task):
        raise ConfigError("quantize: --fields, --files and --task are about data, and none are given; add --data")
    model = load(checkpoint, plugin, device)
    chosen = None if task is None else choose_task(model, task, [])
    found = samples_of(data, fields, files, samples) if data is not None else []
    tasks = [] if data is None else tasks_of(model, chosen, found)
    size = (model_folder(checkpoint) / WEIGHTS).stat().st_size
    models = {"original": model, to: quantized(model, to)}
    measured = {one: _measured(models, one, found, as_json) for one in tasks}
    folder = models[to].save(
        out
    )  # once it has answered: data that do not fit end with an error, and nothing is written
    sizes = {"original": size, to: (folder / WEIGHTS).stat().st_size}
    if as_json:
        print_json({"folder": str(folder), "bytes": sizes, "samples": len(found), "tasks": measured}, indent=2)
        return 0
    rows = [("bytes of the weights", {name: f"{size:,}" for name, size in sizes.items()})]
    for one, figures in measured.items():
        rows.append((f"{one}, {len(found):,} samples", {}))
        rows += [
            (f"  {name}", {which: _shown(name, values[which]) for which in models}) for name, values in figures.items()
        ]
    width = max(len(name) for name, _ in rows)
    sides = {name: max(len(name), *(len(cells.get(name, "")) for _, cells in rows)) for name in models}
    for name, cells in [("", {name: name for name in models}), *rows]:
        print("  ".join([f"{name:<{width}}", *(f"{cells.get(m, ''):>{size}}" for m, size in sides.items())]).rstrip())
    print(f"model  {folder}")
    return 0


def _measured(
    models: Mapping[str, "Model"], task: str, samples: Sequence[Mapping[str, Any]], quiet: bool
) -> dict[str, dict[str, float]]:
    """{figure: {model: value}}: those of `evaluate`, and samples per second of it."""
    from multimodal.train import evaluate

    found: dict[str, dict[str, float]] = {}
    seconds = dict.fromkeys(models, 0.0)
    parts = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]
    with progress_bar(f"measuring {task}", len(models) * (len(parts) + 1), quiet=quiet) as bar:
        for name, model in models.items():
            figures = evaluate(model, task, samples, batch=BATCH)
            bar.advance()
            for figure, value in figures.items():
                found.setdefault(figure, {})[name] = value
        # in turn, so that a machine that is slow for a while is slow for both
        for part in parts:
            for name, model in models.items():
                start = time.perf_counter()
                evaluate(model, task, part, batch=BATCH)
                seconds[name] += time.perf_counter() - start
                bar.advance()
    return found | {"samples per second": {name: len(samples) / max(s, 1e-9) for name, s in seconds.items()}}


def _shown(figure: str, value: float) -> str:
    return f"{value:.4f}" if figure == "loss" else f"{value:,.1f}" if "per second" in figure else f"{value:.2%}"
