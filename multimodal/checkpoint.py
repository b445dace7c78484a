"""A model as one folder: config.json, weights.safetensors, and the tokenizers' own files. No pickle, no code.

How a new version takes the place of an old one, and what a reader sees meanwhile, is said in multimodal/saving.py.
"""

import json
import os
import random
import time
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import multimodal.flow
import multimodal.masked
import multimodal.pointer
import multimodal.rows  # noqa: F401  heads that a checkpoint may name
from multimodal.declare import declaration, rebuild
from multimodal.files import file_hash
from multimodal.saving import PLACE, SHA256, Saving, check_names, stored, version_of
from multimodal.shapes import CheckpointError, did_you_mean
from multimodal.stream import Task

if TYPE_CHECKING:
    from multimodal.model import Model

FORMAT = 1
CONFIG, WEIGHTS, FILES = "config.json", "weights.safetensors", "tokenizers"
CHECK = "sha256_of_config"  # in it: of all the rest of it
RUN = "model"  # the folder of the model in a run folder
TRIES = 20  # readings of a checkpoint that is saved anew again and again


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
    """Write a checkpoint, or a new version of the one that is there: at any moment the old or the new one is whole.

    weights: saved instead of the model's own, with the same names. Only files that a save wrote are replaced; whatever else is
    in the folder stays, and of one of ours that was changed by hand a copy, NAME.1.

    Raises:
        CheckpointError: the folder is there and holds other things than a checkpoint, or a file of a name that is needed.
        OSError: a disk that is full, or the like; what was there is as it was.
    """
    folder = folder.resolve()
    check_room(folder)
    files = {
        f"{FILES}/{name}/{file}": data
        for name, tokenizer in model.packer.tokenizers.items()
        for file, data in tokenizer.files().items()
    }
    # clones, because safetensors refuses tensors that share memory
    given = model.state_dict() if weights is None else weights
    tensors = {name: t.detach().clone().contiguous() for name, t in given.items()}
    try:
        with Saving(folder, CONFIG) as saving:
            before = check_room(folder)
            check_names(folder, [CONFIG, WEIGHTS, *files], before)
            for name, data in files.items():
                saving.add(name, partial(Path.write_bytes, data=data))
            saving.add(WEIGHTS, partial(write_tensors, tensors))
            config = {"format": FORMAT, "made_by": f"multimodal-stream {package_version()}", **declarations(model)}
            config[SHA256] = dict(sorted(saving.sums.items()))
            saving.commit(_as_json({**config, CHECK: _checksum(config)}), before)
    except OSError as error:
        said = f"{folder}: the model cannot be saved here: {error}"
        raise (OSError(error.errno, said) if error.errno else OSError(said)) from error
    return folder


def check_room(folder: Path) -> dict[str, str | None]:
    """The files of the checkpoint that is in a folder, which a save may replace, with their checksums (None: not known).

    Raises:
        CheckpointError: the folder holds other things, or is a file.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and set(os.listdir(folder)) <= {PLACE}):
        return {}
    config = own_config(folder)
    if config is None:
        what = ", ".join(sorted(os.listdir(folder))[:4]) if folder.is_dir() else "a file"
        raise CheckpointError(
            f"{folder} ({what}): this is no checkpoint, and saving here would replace it; choose another folder"
        )
    named = [WEIGHTS, *(f"{FILES}/{name}/{file}" for name, t in config["tokenizers"].items() for file in t["files"])]
    sums = config.get(SHA256)
    known = sums if isinstance(sums, dict) else dict.fromkeys(named)  # version 0.1 wrote no checksums
    before = {name: known[name] for name in named if name in known and ".." not in Path(name).parts}
    # one that was changed has another checksum than any
    as_saved = CHECK not in config or config[CHECK] == _checksum(config)
    return {**before, CONFIG: file_hash(folder / CONFIG) if as_saved else ""}


def own_config(folder: Path) -> dict[str, Any] | None:
    """The config.json that a save wrote; None where there is none, or it is something else's."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        ours = isinstance(config["format"], int) and config["made_by"].startswith("multimodal-stream")
        ours = ours and all(isinstance(t["files"], list) for t in config["tokenizers"].values())
        return config if ours and isinstance(config["core"], dict) and isinstance(config["tasks"], list) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _checksum(config: Mapping[str, Any]) -> str:
    """Of the configuration itself, to tell whether it was changed by hand."""
    return sha256(json.dumps({name: part for name, part in config.items() if name != CHECK}).encode()).hexdigest()


def _as_json(config: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a class that is called like a file whose name is no UTF-8
        return (json.dumps(config, indent=2) + "\n").encode()


def holds(folder: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint is in a folder, whole, with exactly these weights."""
    config = own_config(folder)
    try:
        found = {} if config is None else read_tensors(stored(folder, config, WEIGHTS))
    except CheckpointError:
        return False
    return found.keys() == weights.keys() and all(
        found[name].dtype == t.dtype and torch.equal(found[name], t.cpu()) for name, t in weights.items()
    )


def model_folder(folder: Path) -> Path:
    """The model's folder, for that folder or for the run folder around it."""
    inner = folder / RUN / CONFIG
    return folder / RUN if inner.is_file() and own_config(folder) is None else folder


def load(cls: type["Model"], folder: Path) -> Any:
    """Read a checkpoint; one that is saved anew meanwhile is read again.

    Raises:
        CheckpointError: what is missing, damaged or does not fit.
    """
    folder = model_folder(folder)
    for attempt in range(TRIES):
        before = version_of(folder, CONFIG)
        try:
            model = _load(cls, folder)
            if version_of(folder, CONFIG)[0] == before[0] or attempt == TRIES - 1:
                return model
        except CheckpointError:
            if version_of(folder, CONFIG) == before or attempt == TRIES - 1:
                raise
        time.sleep(random.random() * 0.01 * attempt)  # else two that go on alike could meet each time
    raise AssertionError


def _load(cls: type["Model"], folder: Path) -> Any:
    """Rebuild declarations, then the model, then its weights."""
    config = read_config(folder)
    try:
        tokenizers = {name: _tokenizer(folder, name, entry, config) for name, entry in config["tokenizers"].items()}
        core = rebuild(config["core"])
        tasks = [Task(t["pattern"], rebuild(t["head"]), t["weight"]) for t in config["tasks"]]
        model = cls(tokenizers, core, tasks, seed=config["seed"])
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except Exception as error:  # a config that was edited by hand can be wrong in any way
        raise CheckpointError(
            f"{folder / CONFIG}: what it declares cannot be built: {type(error).__name__}: {error}"
        ) from error
    put_weights(model, read_tensors(stored(folder, config, WEIGHTS)), folder)
    # last, as whatever else was wrong says more; checkpoints of version 0.1 have no checksums
    for name, checksum in config.get(SHA256, {}).items():
        path = stored(folder, config, name)
        if path.is_file() and file_hash(path) != checksum:
            raise CheckpointError(f"{folder / name}: damaged: its checksum is not the one it was saved with")
    return model


def _tokenizer(folder: Path, name: str, entry: dict[str, Any], config: dict[str, Any]) -> Any:
    files = {}
    for file in entry.get("files", []):
        inside = Path(name, file)
        if inside.anchor or ".." in inside.parts:
            raise CheckpointError(f"tokenizer {name!r}: its file {file!r} would lie outside the checkpoint; refused")
        path = stored(folder, config, f"{FILES}/{name}/{file}")
        if not path.is_file():
            raise CheckpointError(f"tokenizer {name!r}: its file {FILES}/{name}/{file} is missing")
        files[file] = path.read_bytes()
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
        old = Path(f"{folder.resolve()}.old")
        hint = (
            f" ({old} holds one: if a save of version 0.1 was interrupted here, rename it)" if own_config(old) else ""
        )
        raise CheckpointError(f"{folder}: no {CONFIG} here; a checkpoint is a folder that Model.save wrote{hint}")
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
    path.touch()
    mode = path.stat().st_mode & 0o777  # safetensors would let nobody else read it
    try:
        save_file(tensors, path)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def put_weights(model: "Model", weights: dict[str, Tensor], where: Path) -> None:
    """Load weights that must match the model one for one.

    Raises:
        CheckpointError: lists missing tensors, foreign ones, and those of another shape.
    """
    wanted = model.state_dict()
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
