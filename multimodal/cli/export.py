"""`export` writes a task as programs that run elsewhere, or the model in the layout of another library."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from multimodal.cli.arguments import Json, Plugins, choose_task
from multimodal.cli.loading import load
from multimodal.cli.output import print_json


def export(
    checkpoint: Path,
    /,
    *,
    to: Literal["onnx", "pt2", "hf", "timm"],
    out: Annotated[Path, Parameter(help="The folder that is made; it must be new or empty.")],
    task: str | None = None,
    as_json: Json = False,
    plugin: Plugins = None,
) -> int:
    """Write one task as programs for other runtimes, compared with the model first; or the whole model as others have it.

    Example: multimodal export runs/digits --to onnx --out digits

    Example: multimodal export runs/captions --task "image -> text" --to pt2 --out captions

    Parameters
    ----------
    checkpoint
        A run folder, the model folder in it, or a name on the hub: OWNER/MODEL, or OWNER/MODEL@REVISION.
    to
        "onnx": for onnxruntime; needs pip install 'multimodal-stream[export]'. "pt2": for torch.export.load. "hf" and "timm": the
        whole model, for transformers or timm.
    task
        For onnx and pt2, which task, such as "image -> label"; needed only if there are several.
    """
    model = load(checkpoint, plugin, "cpu")
    folder = model.export(to, out, task=None if task is None else choose_task(model, task, []))
    manifest = folder / "manifest.json"
    known = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if as_json:
        print_json({"folder": str(folder), "files": files, "difference": known.get("difference")}, indent=2)
        return 0
    print(f"{folder}: {', '.join(files)}")
    if known:
        largest, allowed, shapes = (known["difference"][name] for name in ("largest", "allowed", "shapes"))
        print(f"largest difference from the model on samples of {shapes} shapes: {largest:.1e} (at most {allowed:g})")
    return 0
