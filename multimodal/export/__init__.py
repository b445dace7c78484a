"""Exports a task to ONNX or torch.export, and compares the files with the model before it keeps them.

Model --programs--> modules for padded batches, same weights --formats--> files        compare: files against the packed model
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from multimodal.checkpoint import FILES
from multimodal.declare import declaration
from multimodal.export.compare import SHAPES, RunProgram, agreement, largest_difference, most_written, read_bounds
from multimodal.export.formats import FORMATS, Format
from multimodal.export.programs import Entry, FieldProgram, Program, pair_bytes, programs_of
from multimodal.files import new_folder
from multimodal.heads import CTC, Classify, Contrast, NextToken
from multimodal.heads.classify import class_names
from multimodal.heads.contrast import ContrastReadout
from multimodal.network import Network
from multimodal.shapes import ConfigError
from multimodal.texts import shortened
from multimodal.versions import package_version

MANIFEST = "manifest.json"
MOST = 1e-4
"""The largest allowed difference from the packed model, relative to the largest output (or to 1)."""
MOST_BYTES = 2**31
"""Bytes that the attention of one call may take, unless somebody changes the manifest."""


def export(
    model: Network,
    to: str,
    folder: str | Path,
    task: str | None = None,
    *,
    int8: bool = False,
    data: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write one task as programs that run without this library, and return the folder.

    to: "onnx" or "pt2" (torch.export).
    task: the pattern of the task; None: the only one.
    int8: only for "onnx": quantize the matrices to int8, after the float32 programs passed the comparison.
    data: samples on which the int8 programs are compared with the model; the manifest has the result.

    Raises:
        ConfigError: a part cannot be exported, a package is missing, or the programs differ too much from the model.
        TaskError: there is no such task.
        CheckpointError: the folder has files already, or cannot be written.
    """
    if to not in FORMATS:
        raise ConfigError(f"export: to={to!r} is unknown; there are {', '.join(map(repr, FORMATS))}")
    if model.quantization is not None:
        raise ConfigError(
            "export: the model is quantized, but programs compute in float32; export the original, for onnx with int8=True if you "
            "like"
        )
    folder, form, task = Path(folder), FORMATS[to], _chosen_task(model, task)
    if int8:
        form.check_int8()
    elif len(data):
        raise ConfigError("export: data is for int8=True; programs in float32 are compared on samples of their own")
    form.check_installed()
    # written to a temporary folder first, so that there is a whole export or none
    with new_folder(folder) as beside:
        if model.training or model.device.type != "cpu":  # a copy, so that the user's model does not change
            model = copy.deepcopy(model).cpu().eval()
        made = programs_of(model, task)
        for program in made:
            form.write(program, beside / f"{program.name}{form.ending}")
        run = form.read({program.name: beside / f"{program.name}{form.ending}" for program in made})
        difference = _check_programs(model, task, to, made, run)
        if not difference <= MOST:
            raise ConfigError(
                f"export of {task!r} to {to}: what the programs compute differs from the model by {difference:.1e}, and at most "
                f"{MOST:g} is allowed; a part of your own may depend on values or lengths that are constants in the trace"
            )
        manifest = _manifest(model, task, to, form, made, difference)
        if int8:
            manifest["int8"] = _quantize_programs(model, task, form, made, beside, data)
        for kind in manifest["tokenizers"]:
            for name, content in model.packer.tokenizers[kind].files().items():
                path = beside / FILES / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        text = json.dumps(manifest, indent=2, ensure_ascii=False, default=str)
        (beside / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return folder


def _quantize_programs(
    model: Network, task: str, form: Format, made: tuple[Program, ...], folder: Path, data: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Replace the programs by int8 ones, and return the entry "int8" of the manifest."""
    paths = {program.name: folder / f"{program.name}{form.ending}" for program in made}
    before = sum(path.stat().st_size for path in paths.values())
    for path in paths.values():
        form.make_int8(path)
    run = form.read(paths)
    largest = largest_difference(model, task, made, run)
    if largest == torch.inf:
        raise ConfigError(
            f"export of {task!r} to int8: the programs return NaN, or outputs of another shape than the model"
        )
    return {
        "bytes": sum(path.stat().st_size for path in paths.values()),
        "bytes_before": before,
        "largest": largest,
        "data": agreement(model, task, made, run, data) if len(data) else None,
    }


def _check_programs(model: Network, task: str, to: str, made: tuple[Program, ...], run: RunProgram) -> float:
    """`largest_difference`, with a ConfigError if a program does not run."""
    try:
        return largest_difference(model, task, made, run)
    except ConfigError:
        raise
    except Exception as error:  # a runtime may raise errors of any class
        raise ConfigError(
            f"export of {task!r} to {to}: the programs were written, but do not run on samples of other sizes: "
            f"{type(error).__name__}: {shortened(str(error), 600)}"
        ) from error


def _chosen_task(model: Network, task: str | None) -> str:
    """The task of this pattern, or the only one."""
    if task is None and len(model.tasks) == 1:
        return next(iter(model.tasks))
    if task is None:
        raise ConfigError(f"export: this model has several tasks; name one of {', '.join(map(repr, model.tasks))}")
    model.packer.check_task(task)
    return task


def _manifest(
    model: Network, task: str, to: str, form: Format, made: tuple[Program, ...], difference: float
) -> dict[str, Any]:
    """The content of manifest.json."""
    packer, pattern = model.packer, model.packer.patterns[task]
    kinds = dict.fromkeys(field.kind for field in pattern.fields)
    return {
        "format": 1,
        "made_by": f"multimodal-stream {package_version()}",
        "to": to,
        **form.versions(),
        "task": task,
        "head": type(packer.heads[task]).__name__,
        "difference": {"largest": difference, "allowed": MOST, "shapes": len(SHAPES)},
        "most_bytes": MOST_BYTES,
        "most_tokens": model.most_tokens,
        "most_written": model.most_written,
        "tokenizers": {
            kind: {**declaration(packer.tokenizers[kind]), "files": sorted(packer.tokenizers[kind].files())}
            for kind in kinds
        },
        "programs": {
            program.name: {
                "file": f"{program.name}{form.ending}",
                "fields": {field.name: field.kind for field in getattr(program, "fields", ())},
                **({"pair_bytes": pair_bytes(program)} if isinstance(program, FieldProgram) else {}),
                **_bounds(model, program),
                "inputs": [_entry_json(entry) for entry in program.inputs],
                "outputs": [_entry_json(entry) for entry in program.outputs],
            }
            for program in made
        },
        "answer": _answer(model, task),
    }


def _bounds(model: Network, program: Program) -> dict[str, Any]:
    if not isinstance(program, FieldProgram):
        return {}
    least, most = read_bounds(model, program)
    return {"tokens": {"least": least, "most": most}}


def _entry_json(entry: Entry) -> dict[str, Any]:
    kind = str(entry.dtype).removeprefix("torch.")
    return {"name": entry.name, "type": kind, "axes": list(entry.axes), "meaning": entry.meaning}


def _answer(model: Network, task: str) -> dict[str, Any]:
    """How to read the outputs; depends on the head."""
    head, tokenizer, readout = model.packer.heads[task], model.packer.answer_tokenizers[task], model.readout(task)
    written = model.packer.patterns[task].written
    kind = {} if written is None else {"kind": written.kind, "field": written.name}
    if isinstance(head, Classify):
        several = tokenizer.vocab_size is None
        return {**kind, "labels": class_names(tokenizer), "probability": "sigmoid" if several else "softmax"}
    if isinstance(head, CTC):
        return {**kind, "blank": readout.linear.out_features - 1}
    if isinstance(head, NextToken):
        never, never_first = head.forbidden()
        return {
            **kind,
            "stop": head.stop(tokenizer),
            "length": tokenizer.length,
            "most": most_written(model, task),
            "never": list(never),
            "never_first": list(never_first),
        }
    assert isinstance(head, Contrast)
    assert isinstance(readout, ContrastReadout)
    one = torch.ones(1, 1)
    with torch.no_grad():
        bias = float(readout.scores(one * 0, one))
        scale = float(readout.scores(one, one)) - bias
    return {"width": head.width, "scale": scale, "bias": bias, "probability": head.form}
