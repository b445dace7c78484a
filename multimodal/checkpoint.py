"""A model as one folder: config.json, weights.safetensors, and the tokenizers' own files. No pickle, no code."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import multimodal.flow
import multimodal.masked
import multimodal.pointer
import multimodal.rows  # noqa: F401  heads that a checkpoint may name
from multimodal.declare import declaration, rebuild
from multimodal.files import file_hash, flush
from multimodal.shapes import CheckpointError, did_you_mean
from multimodal.stream import Task

if TYPE_CHECKING:
    from multimodal.model import Model

FORMAT = 1
CONFIG, WEIGHTS, FILES = "config.json", "weights.safetensors", "tokenizers"
RUN = "model"  # the folder of the model in a run folder


def declarations(model: "Model") -> dict[str, Any]:
    """Everything about a model but its weights and its tokenizers' files, as JSON values."""
    tokenizers = model.packer.tokenizers.items()
    return {
        "tokenizers": {name: {**declaration(t), "files": sorted(t.files())} for name, t in tokenizers},
        "core": declaration(model.core.core),
        "tasks": [
            {"pattern": pattern, "head": declaration(model.packer.head(pattern)), "weight": task.weight}
            for pattern, task in model.tasks.items()
        ],
        "seed": model.seed,
    }


def save(model: "Model", folder: Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write the folder aside, then put it in place, so that what was there survives a failed write.

    weights: saved instead of the model's own, with the same names.

    Raises:
        CheckpointError: the folder is there and holds other things than a checkpoint.
    """
    folder = folder.resolve()
    check_room(folder)
    for left in folder.parent.glob(f"{folder.name}.*.writing"):  # by a process that was killed
        process = left.name.split(".")[-3]
        if process.isdigit() and not _lives(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.{time.monotonic_ns()}.writing")
    aside.mkdir(parents=True)
    try:
        for name, tokenizer in model.packer.tokenizers.items():
            for file, data in tokenizer.files().items():
                path = aside / FILES / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        # clones, because safetensors refuses tensors that share memory
        tensors = model.state_dict() if weights is None else weights
        write_tensors({name: t.detach().clone().contiguous() for name, t in tensors.items()}, aside / WEIGHTS)
        files = {p.relative_to(aside).as_posix(): file_hash(p) for p in sorted(aside.rglob("*")) if p.is_file()}
        config = {"format": FORMAT, "made_by": f"multimodal-stream {package_version()}", **declarations(model)}
        config["sha256"] = files
        (aside / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in (*aside.rglob("*"), aside):
            flush(path)
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def check_room(folder: Path) -> None:
    """Refuse to replace a folder (or a file) that is no checkpoint."""
    is_checkpoint = (folder / CONFIG).is_file() and not (folder / RUN).is_dir()
    if folder.exists() and not is_checkpoint and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(
            f"{folder}: this is no checkpoint, and saving here would replace it; choose another folder"
        )


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` where `folder` is; at every moment one of the two versions is whole on disk."""
    recover(folder)
    old = folder.with_name(folder.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    finally:
        recover(folder)
    if old.exists():
        shutil.rmtree(old)


def recover(folder: Path) -> None:
    """Put back what `replace_folder` had moved aside when it was stopped half-way."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def load(cls: type["Model"], folder: Path) -> Any:
    """Rebuild declarations, then the model, then its weights."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and (old / CONFIG).is_file():
        folder = old  # a save was stopped between its two moves; only the next save puts things right
    elif (folder / RUN / CONFIG).is_file():  # a run folder, which has a config.json of its own
        folder = folder / RUN
    elif (folder / f"{RUN}.old" / CONFIG).is_file():
        folder = folder / f"{RUN}.old"
    config = read_config(folder)
    try:
        tokenizers = {name: _tokenizer(folder, name, entry) for name, entry in config["tokenizers"].items()}
        core = rebuild(config["core"])
        tasks = [Task(t["pattern"], rebuild(t["head"]), t["weight"]) for t in config["tasks"]]
        model = cls(tokenizers, core, tasks, seed=config["seed"])
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except Exception as error:  # a config that was edited by hand can be wrong in any way
        raise CheckpointError(
            f"{folder / CONFIG}: what it declares cannot be built: {type(error).__name__}: {error}"
        ) from error
    put_weights(model, read_tensors(folder / WEIGHTS), folder)
    # last, as whatever else was wrong says more; checkpoints of version 0.1 have no checksums
    for name, sha256 in config.get("sha256", {}).items():
        if (folder / name).is_file() and file_hash(folder / name) != sha256:
            raise CheckpointError(f"{folder / name}: damaged: its checksum is not the one it was saved with")
    return model


def _tokenizer(folder: Path, name: str, entry: dict[str, Any]) -> Any:
    files = {}
    for file in entry.get("files", []):
        inside = Path(name, file)
        if inside.anchor or ".." in inside.parts:
            raise CheckpointError(f"tokenizer {name!r}: its file {file!r} would lie outside the checkpoint; refused")
        if not (folder / FILES / inside).is_file():
            raise CheckpointError(f"tokenizer {name!r}: its file {FILES}/{name}/{file} is missing")
        files[file] = (folder / FILES / inside).read_bytes()
    try:
        return rebuild(entry, files)
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer {name!r}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked as far as loading needs it.

    Raises:
        CheckpointError: no such folder or file, damaged JSON, a format from the future, missing parts.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG} here; a checkpoint is a folder that Model.save wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: damaged: holds a {type(config).__name__}, wanted an object")
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {config.get('format')!r}, but this version reads {FORMAT}; update multimodal-stream"
        )
    for part in ("tokenizers", "core", "tasks", "seed"):
        if part not in config:
            raise CheckpointError(f"{path}: the part {part!r} is missing")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: missing, truncated or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or cut short: {error}") from error


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, named without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file.

    Raises:
        OSError: a disk that is full, or the like.
    """
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def with_axis(tensor: Tensor, wanted: Tensor) -> Tensor:
    """A single number that had no axis when it was saved, and has one now."""
    return tensor.reshape(1) if tensor.dim() == 0 and wanted.shape == (1,) else tensor


def put_weights(model: "Model", weights: dict[str, Tensor], where: Path) -> None:
    """Load weights that must match the model one for one.

    Raises:
        CheckpointError: lists missing tensors, foreign ones, and those of another shape.
    """
    wanted = model.state_dict()
    weights = {name: with_axis(t, wanted[name]) if name in wanted else t for name, t in weights.items()}
    problems = [f"missing {name}" for name in wanted if name not in weights]
    problems += [f"foreign {name}{did_you_mean(name, wanted)}" for name in weights if name not in wanted]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, wanted {tuple(t.shape)}"
        for name, t in wanted.items()
        if name in weights and weights[name].shape != t.shape
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"{where}: the weights do not fit the config: {shown}")
    model.load_state_dict(weights)


def package_version() -> str:
    """The installed version, or 'unknown' when run from a bare source tree."""
    try:
        return version("multimodal-stream")
    except PackageNotFoundError:
        return "unknown"
