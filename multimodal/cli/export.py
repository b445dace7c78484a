"""`export` writes a task as programs that run elsewhere, or the model in the layout of another library."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from multimodal.cli.arguments import Columns, DataFiles, DataSource, Json, Most, Plugins, choose_task
from multimodal.cli.loading import load, samples_of
from multimodal.cli.output import print_json


def export(
    checkpoint: Path,
    /,
    *,
    to: Literal["onnx", "pt2", "hf", "timm"],
    out: Annotated[Path, Parameter(help="The folder that is made; it must be new or empty.")],
    task: str | None = None,
    int8: Annotated[bool, Parameter(negative="")] = False,
    data: DataSource = None,
    fields: Columns = None,
    files: DataFiles = None,
    samples: Most = 200,
    only_original: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False,
    plugin: Plugins = None,
) -> int:
    """Write one task as programs for other runtimes, compared with the model first; or the whole model as others have it.

    Example: multimodal export runs/digits --to onnx --out digits

    Example: multimodal export runs/captions --task "image -> text" --to pt2 --out captions

    Example: multimodal export runs/digits --to onnx --int8 --data digits/test --out digits

    Parameters
    ----------
    checkpoint
        A run folder, the model folder in it, or a name on the hub: OWNER/MODEL, or OWNER/MODEL@REVISION.
    to
        "onnx": for onnxruntime; needs pip install 'multimodal-stream[export]'. "pt2": for torch.export.load. "hf" and "timm": the
        whole model, for transformers or timm.
    task
        For onnx and pt2, which task, such as "image -> label"; needed only if there are several.
    int8
        For onnx: programs whose matrices are int8, about a third of the bytes; with --data they are compared on it.
    only_original
        For hf and timm: leave out kinds and tasks that were added to the model after it was loaded.
    """
    from multimodal.shapes import ConfigError

    if data is None and (fields or files):
        raise ConfigError("export: --fields and --files are about data, and none are given; add --data")
    model = load(checkpoint, plugin, "cpu")
    found = [] if data is None else samples_of(data, fields, files, samples)
    chosen = None if task is None else choose_task(model, task, [])
    folder = model.export(to, out, task=chosen, int8=int8, data=found, only_original=only_original)
    manifest = folder / "manifest.json"
    known = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if as_json:
        int8_entry = {"int8": known["int8"]} if "int8" in known else {}
        print_json(
            {"folder": str(folder), "files": written, "difference": known.get("difference"), **int8_entry}, indent=2
        )
        return 0
    print(f"{folder}: {', '.join(written)}")
    if known:
        largest, allowed, shapes = (known["difference"][name] for name in ("largest", "allowed", "shapes"))
        print(f"largest difference from the model on samples of {shapes} shapes: {largest:.1e} (at most {allowed:g})")
    if "int8" in known:
        _show_int8(known["int8"])
    return 0


def _show_int8(entry: dict[str, Any]) -> None:
    """What became of the programs when their matrices were rounded."""
    before, after, on = entry["bytes_before"], entry["bytes"], entry["data"]
    print(f"in int8: {after:,} bytes of {before:,}; largest difference from the model: {entry['largest']:.1e}")
    if on is None:
        print("not compared on data; give --data")
    elif "same" in on:
        print(f"on {on['samples']:,} samples of the data the same answer in {on['same']:.2%} of {on['rows']:,} rows")
    else:
        print(
            f"on {on['samples']:,} samples of the data the cosine of its vectors with the model's is at least {on['cosine']:.4f}"
        )
