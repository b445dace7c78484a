"""A model as one folder: config.json, weights.safetensors, and the files of its tokenizers. No pickle, no code.

multimodal/saving.py describes how a new version replaces an old one while others read it.
"""

import importlib
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal.attention.exchange import local
from multimodal.core import Core
from multimodal.declare import OURS, declaration, part_types, rebuild
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.files import check_fields, check_inside, file_hash, parse_json, read_json
from multimodal.hub import fetch, hub_name, split_name
from multimodal.network import Network
from multimodal.saving import PLACE, SHA256, Saving, check_names, stored, version_of
from multimodal.shapes import CheckpointError, did_you_mean
from multimodal.task import Task
from multimodal.texts import short_repr, shortened
from multimodal.versions import package_version

_T = TypeVar("_T")
FORMAT = 1
CONFIG, WEIGHTS, FILES = "config.json", "weights.safetensors", "tokenizers"
CHECK = "sha256_of_config"  # the key of config.json that holds the checksum of its other entries
RUN = "model"  # the folder of the model in a run folder
TRIES = 20  # attempts to read a checkpoint that is being replaced again and again
MOST_PARTS = 10_000  # the most tokenizers, or tasks, of a checkpoint; more take too long to build
FEW_LAYERS = 256  # up to this many layers the model is built (in a second) to name the missing tensors
MOST_HEADER_BYTES, MOST_FILE_BYTES = 2**25, 2**30  # limits for the header of the weights and for a file of a tokenizer
KINDS = {  # by the name that safetensors has for a type
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES_OF_KINDS = {kind: name for name, kind in KINDS.items()}
Header = dict[str, tuple[tuple[int, ...], str]]  # name -> (shape, type by its name in safetensors)
FLOATS = tuple(name for name, kind in KINDS.items() if kind.is_floating_point)


def declarations(model: Network) -> dict[str, Any]:
    """What a model declares, as JSON values: all but its weights and the files of its tokenizers."""
    tokenizers = model.packer.tokenizers.items()
    parts = {"adapters": model.adapters, "quantization": model.quantization}
    return {
        "tokenizers": {name: {**declaration(t), "files": sorted(t.files())} for name, t in tokenizers},
        "core": declaration(model.core.core),
        "tasks": [
            {"pattern": pattern, "head": declaration(model.packer.head(pattern)), "weight": task.weight}
            for pattern, task in model.tasks.items()
        ],
        "seed": model.seed,
        **({} if model.origin is None else {"origin": model.origin}),
        **{name: declaration(part) for name, part in parts.items() if part is not None},
    }


def save(model: Network, folder: Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write a checkpoint, or replace the one that is there; at any moment either the old or the new one is complete.

    Only files that a save wrote are replaced. Other files in the folder stay, and a file of ours that was changed by hand is
    copied to NAME.1 first.

    weights: saved instead of the model's own, under the same names.

    Raises:
        CheckpointError: the folder is no checkpoint, or a file that a save did not write has a name that is needed.
        OSError: writing fails, for instance because the disk is full; the old version stays.
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
        with Saving(folder, CONFIG, _is_written) as saving:
            before = check_room(folder)
            check_names(folder, [CONFIG, WEIGHTS, *files], before)
            for name, data in files.items():
                saving.add(name, partial(Path.write_bytes, data=data))
            saving.add(WEIGHTS, partial(write_tensors, tensors))
            config = {"format": FORMAT, "made_by": f"multimodal-stream {package_version()}", **declarations(model)}
            config[SHA256] = dict(sorted(saving.sums.items()))
            saving.commit(config_file(config), before)
    except OSError as error:
        said = f"{folder}: the model cannot be saved here: {error}"
        raise (OSError(error.errno, said) if error.errno else OSError(said)) from error
    return folder


def _is_written(name: str) -> bool:
    """Whether a file of this name may be one that a save wrote, config.json aside."""
    return name == WEIGHTS or name.startswith(f"{FILES}/")


def _is_blank(folder: Path) -> bool:
    """Whether a folder holds nothing but a save that is under way, or was killed: it makes folders before the index."""
    found, made = set(os.listdir(folder)), folder / FILES
    empty = made.is_dir() and not any(files for _, _, files in os.walk(made))
    return found <= {PLACE, FILES} and (FILES not in found or empty)


def check_room(folder: Path) -> dict[str, str | None]:
    """Check that a save may write to a folder, and return {file: checksum} of the checkpoint there; None: checksum not known.

    Raises:
        CheckpointError: the folder has files but is no checkpoint, or is a file itself.
    """
    if not os.path.lexists(folder) or (folder.is_dir() and _is_blank(folder)):
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
    # "" equals no checksum: a config.json that was changed is copied
    as_saved = CHECK not in config or config[CHECK] == _checksum(config)
    return {**before, CONFIG: file_hash(folder / CONFIG) if as_saved else ""}


def own_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder if a save of ours wrote it, else None."""
    try:
        config = read_json(folder / CONFIG, ValueError)
        ours = isinstance(config["format"], int) and config["made_by"].startswith("multimodal-stream")
        ours = ours and all(isinstance(t["files"], list) for t in config["tokenizers"].values())
        ours = ours and all(isinstance(sha256, str) for sha256 in config.get(SHA256, {}).values())
        return config if ours and isinstance(config["core"], dict) and isinstance(config["tasks"], list) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _checksum(config: Mapping[str, Any]) -> str:
    """The checksum of config.json without its own entry; it shows whether the file was changed by hand."""
    return sha256(json.dumps({name: part for name, part in config.items() if name != CHECK}).encode()).hexdigest()


def config_file(config: Mapping[str, Any]) -> bytes:
    """The content of config.json, with the checksum of its entries."""
    config = {name: part for name, part in config.items() if name != CHECK}
    config[CHECK] = _checksum(config)
    try:
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a class name that comes from a file name and is not UTF-8
        return (json.dumps(config, indent=2) + "\n").encode()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, by name.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    config = own_config(folder)
    if config is None:
        raise CheckpointError(f"{folder}: there is no saved model")
    return read_tensors(stored(folder, config, WEIGHTS))


def holds(folder: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether a folder is a complete checkpoint with exactly these weights."""
    try:
        found = read_weights(folder)
    except CheckpointError:
        return False
    return found.keys() == weights.keys() and all(
        found[name].dtype == t.dtype and torch.equal(found[name], t.cpu()) for name, t in weights.items()
    )


def folder_of(source: str | Path) -> Path:
    """The folder of a checkpoint: a path of this machine, or a copy of a repository of the hub (see `hub.hub_name`).

    Raises:
        CheckpointError: as of `folder_from_hub`.
    """
    name = hub_name(source)
    return Path(source) if name is None else folder_from_hub(*split_name(name))


def folder_from_hub(name: str, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of the cache with a checkpoint from the hub, all of one commit, which is the folder's name.

    Raises:
        CheckpointError: no such repository, no right to read it, no connection, or a model of another library.
    """
    folder, _ = fetch("load", name, [CONFIG, WEIGHTS, f"{FILES}/*"], revision=revision, token=token)
    if own_config(folder) is None:
        foreign = _foreign_model(name, folder / CONFIG)
        raise CheckpointError(
            f"load: {name!r} on the hub holds no checkpoint of this library"
            + (f", but {foreign}" if foreign else "; Model.from_pretrained loads models of others")
        )
    return folder


def _foreign_model(source: str | Path, path: Path) -> str:
    """What a config.json of another library says of its model, and how to load that; "" if it is of none that is known."""
    try:
        config = read_json(path, ValueError)
    except (OSError, ValueError):
        return ""
    if "format" in config:
        return ""
    # by name, because the core must not depend on the families
    return importlib.import_module("multimodal.pretrained").foreign_model(str(source), config)


def model_folder(folder: Path) -> Path:
    """The folder of the model, where `folder` is that or the run folder around it."""
    inner = folder / RUN / CONFIG
    return folder / RUN if inner.is_file() and own_config(folder) is None else folder


def load(cls: type[Network], folder: Path, *, finite: bool = True) -> Any:
    """Read a checkpoint as a model of class `cls`; read it again if it is replaced meanwhile.

    finite: raise on weights that are NaN or infinite.

    Raises:
        CheckpointError: something is missing, damaged or does not fit; the message names it.
    """
    folder = model_folder(folder)
    for attempt in range(TRIES):
        before = version_of(folder, CONFIG)
        try:
            model = _load(cls, folder, finite)
            if version_of(folder, CONFIG)[0] == before[0] or attempt == TRIES - 1:
                return model
        except CheckpointError:
            if version_of(folder, CONFIG) == before or attempt == TRIES - 1:
                raise
        time.sleep(random.random() * 0.01 * attempt)  # random, so that reads do not stay in step with a periodic writer
    raise AssertionError


def _load(cls: type[Network], folder: Path, finite: bool) -> Any:
    """Rebuild the declarations, then the model, then its weights; the header of the weights is compared with the config first,
    before large tensors cost time and memory."""
    config = read_config(folder)
    weights = stored(folder, config, WEIGHTS)
    header = read_header(weights)
    try:
        tokenizers = {name: _tokenizer(folder, name, entry, config) for name, entry in config["tokenizers"].items()}
        core = rebuild(config["core"])
        _check_depth(core, len(header))
        tasks = [Task(t["pattern"], rebuild(t["head"]), t["weight"]) for t in config["tasks"]]
        attached = [rebuild(config[name]) for name in ("adapters", "quantization") if name in config]

        def build() -> Network:
            built = cls(tokenizers, core, tasks, seed=config["seed"])
            for part in attached:
                part.attach(built)
            return built

        outline = _outline(build, config)
        if outline is not None:
            check_tensors(header, outline.state_dict(), folder)
        model = build()
        model.origin = config.get("origin")
    except CheckpointError as error:
        raise CheckpointError(_with_folder(folder, error)) from None
    except Exception as error:  # a config that was edited by hand can be wrong in any way
        raise CheckpointError(
            f"{folder / CONFIG}: what it declares cannot be built: {type(error).__name__}: {shortened(error, 1000)}"
        ) from error
    try:
        put_weights(model, read_tensors(weights), folder, finite=finite)
    except RuntimeError as error:  # types that PyTorch cannot convert
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be used: {shortened(error, 1000)}") from error
    # checksums come last, because any other error says more; checkpoints of version 0.1 have none
    for name, checksum in config.get(SHA256, {}).items():
        path = stored(folder, config, name)
        if path.is_file() and file_hash(path) != checksum:
            raise CheckpointError(f"{folder / name}: damaged: its checksum is not the one it was saved with")
    return model


def _with_folder(folder: Path, error: Exception) -> str:
    text = str(error)
    return text if text.startswith(str(folder)) else f"{folder}: {shortened(text, 1000)}"


def _check_depth(core: Any, tensors: int) -> None:
    """Raise on a core with more layers than tensors, as each layer has a norm at least; building it could take minutes."""
    for one in (core.reader, core.writer) if isinstance(core, EncoderDecoder) else (core,):
        if not isinstance(one, Core):
            continue
        each = min(map(len, one.blocks), default=0) if one.depth <= FEW_LAYERS else 1
        if one.depth * each > max(tensors, FEW_LAYERS):
            raise CheckpointError(
                f"the weights do not fit the config: its core has depth={one.depth} of {each} layers each, and "
                f"{WEIGHTS} holds {tensors} tensors"
            )


def _outline(build: Callable[[], Network], config: Any) -> Network | None:
    """The model on the meta device; None if a part is of another package, which might cache tensors that it made there."""
    if not all(name.partition(":")[0].partition(".")[0] in OURS for name in part_types(config)):
        return None
    with torch.device("meta"):
        return build()


def _tokenizer(folder: Path, name: str, entry: dict[str, Any], config: dict[str, Any]) -> Any:
    """Rebuild one tokenizer with its files."""
    check_fields(f"tokenizer {name!r}", entry, {"type": str, "config": dict}, CheckpointError)
    named = entry.get("files", [])
    if not isinstance(named, list) or not all(isinstance(file, str) for file in named):
        raise CheckpointError(f"tokenizer {name!r}: 'files' is {short_repr(named)}, wanted a list of names")
    files = {}
    for file in named:
        inside = Path(name, file)
        if inside.anchor or ".." in inside.parts or "\0" in file:
            raise CheckpointError(f"tokenizer {name!r}: its file {file!r} would lie outside the checkpoint; refused")
        path = stored(folder, config, f"{FILES}/{name}/{file}")
        if not path.is_file():
            raise CheckpointError(f"tokenizer {name!r}: its file {FILES}/{name}/{file} is missing")
        if (size := path.stat().st_size) > MOST_FILE_BYTES:
            raise CheckpointError(
                f"tokenizer {name!r}: its file {FILES}/{name}/{file} has {size} bytes, and {MOST_FILE_BYTES} are read at most"
            )
        files[file] = path.read_bytes()
    try:
        return rebuild(entry, files)
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer {name!r}: {error}") from None


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """A SHA-256 of tensors with their names, shapes and types, in any order."""
    found = sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {short_name(tensor.dtype)} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, checked as far as loading needs it.

    Raises:
        CheckpointError: no such folder or file, damaged JSON, a newer format, or entries that are missing or of another type.
    """
    path = folder / CONFIG
    if not path.is_file():
        old = Path(f"{folder.resolve()}.old")
        hint = (
            f" ({old} holds one: if a save of version 0.1 was interrupted here, rename it)" if own_config(old) else ""
        )
        raise CheckpointError(f"{folder}: no {CONFIG} here; a checkpoint is a folder that Model.save wrote{hint}")
    config = read_json(path, CheckpointError)
    if foreign := _foreign_model(folder, path):
        raise CheckpointError(f"{folder}: no checkpoint of this library, but {foreign}")
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {short_repr(config.get('format'))}, but this version reads {FORMAT}; update multimodal-stream"
        )
    check_fields(path, config, {"tokenizers": dict, "core": dict, "tasks": list, "seed": int}, CheckpointError)
    for task in config["tasks"]:
        kinds = {"pattern": str, "head": dict, "weight": (int, float)}
        check_fields(f"{path}: tasks", task, kinds, CheckpointError)
    for name in ("tokenizers", "tasks"):
        if len(config[name]) > MOST_PARTS:
            raise CheckpointError(f"{path}: it has {len(config[name])} {name}, and {MOST_PARTS} are read at most")
    hashes = config.get("sha256", {})
    if not isinstance(hashes, dict) or not all(isinstance(sha256, str) for sha256 in hashes.values()):
        raise CheckpointError(f"{path}: 'sha256' is {short_repr(hashes)}, wanted a checksum by the name of each file")
    check_inside(path, hashes, CheckpointError)
    return config


def read_header(path: Path) -> Header:
    """{name: (shape, type)} from the header of a safetensors file, without reading its tensors.

    Raises:
        CheckpointError: the file is missing, or its header is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(MOST_HEADER_BYTES, path.stat().st_size - 8):
                raise ValueError(f"its header cannot have {size} bytes")
            entries = parse_json(file.read(size))
        found = {}
        for name, entry in entries.items():
            if name != "__metadata__":
                shape, kind = tuple(entry["shape"]), entry["dtype"]
                if not isinstance(kind, str) or not all(type(n) is int and n >= 0 for n in shape):
                    raise ValueError(f"the header of {short_repr(name)} is {short_repr(entry)}")
                found[name] = shape, kind
        return found
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged or cut short: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: damaged or cut short: {error}") from error


def below(tensors: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    """The entries whose names begin with a prefix, under their names without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: writing fails, for instance because the disk is full.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777  # restored below, because safetensors makes files that only their owner can read
    try:
        save_file(tensors, path, metadata)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def check_tensors(header: Header, wanted: Mapping[str, Tensor], where: Path) -> None:
    """Compare the header of a file (see `read_header`) with the wanted tensors; any floating-point precision fits any other.

    Raises:
        CheckpointError: lists the tensors that are missing, foreign, or of another shape or type.
    """
    problems: list[tuple[str, str]] = [("missing", name) for name in wanted if name not in header]
    problems += [("foreign", name) for name in header if name not in wanted]
    for name, tensor in wanted.items():
        if name in header:
            shape, kind = header[name]
            if shape != tuple(tensor.shape) and (shape, tuple(tensor.shape)) != ((), (1,)):  # see `with_axis`
                problems.append((f"{name} is {short_repr(shape)}, wanted {tuple(tensor.shape)}", ""))
            elif (kind not in FLOATS) if tensor.is_floating_point() else (KINDS.get(kind) != tensor.dtype):
                wanted_kind = "floating-point numbers" if tensor.is_floating_point() else short_name(tensor.dtype)
                problems.append((f"{name} holds {short_name(KINDS.get(kind, kind))}, wanted {wanted_kind}", ""))
    if problems:
        shown = [  # similar names are searched only for those shown, since that takes long
            f"{what} {short_repr(name)[1:-1]}{did_you_mean(name, wanted) if what == 'foreign' and len(name) < 200 else ''}"
            if name
            else what
            for what, name in problems[:6]
        ]
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"{where}: the weights do not fit the config: {'; '.join(shown)}{more}")


def header_of(tensors: Mapping[str, Tensor]) -> Header:
    """The header that a safetensors file of these tensors would have."""
    return {name: (tuple(t.shape), NAMES_OF_KINDS.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}


def short_name(kind: Any) -> str:
    """'float32' for torch.float32."""
    return str(kind).removeprefix("torch.")


def with_axis(tensor: Tensor, wanted: Tensor) -> Tensor:
    """The tensor, with an axis if it is a scalar that version 0.1 saved without the axis (1,) that it has now."""
    return tensor.reshape(1) if tensor.dim() == 0 and wanted.shape == (1,) else tensor


def put_weights(model: Network, weights: dict[str, Tensor], where: Path, *, finite: bool = True) -> None:
    """Load weights, which must match those of the model one for one.

    finite: raise also on NaN or infinity in a parameter, and on NaN in a buffer (which may be infinite on purpose).

    Raises:
        CheckpointError: tensors that are missing, foreign, of another shape or type, or not finite.
    """
    wanted = model.state_dict()
    check_tensors(header_of(weights), wanted, where)
    weights = {name: with_axis(t, wanted[name]) for name, t in weights.items()}
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in weights.items() if finite else ():
        own = local(tensor)
        if own.is_floating_point() and not bool((own.isfinite() if name in parameters else ~own.isnan()).all()):
            raise CheckpointError(
                f"{where}: the weights in {name} are not all finite (NaN or infinity), so its answers would mean nothing"
            )
    model.load_state_dict(weights)
