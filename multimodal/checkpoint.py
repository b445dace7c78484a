"""A model as one folder: config.json, weights.safetensors, and the tokenizers' own files. No pickle, no code."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import multimodal.flow
import multimodal.masked
import multimodal.pointer
import multimodal.rows  # noqa: F401  heads that a checkpoint may name
from multimodal.core import Core
from multimodal.declare import OURS, declaration, part_types, rebuild
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.files import check_fields, check_inside, file_hash, flush, parse_json, read_json, shown_short
from multimodal.shapes import CheckpointError, did_you_mean
from multimodal.stream import Task

if TYPE_CHECKING:
    from multimodal.model import Model

_T = TypeVar("_T")
FORMAT = 1
CONFIG, WEIGHTS, FILES = "config.json", "weights.safetensors", "tokenizers"
RUN = "model"  # the folder of the model in a run folder
MOST_PARTS = 10_000  # tokenizers or tasks in a checkpoint; more would take longer to build than anybody waits
FEW_LAYERS = 256  # of a core are built (in a second), to tell which tensors are missing
MOST_HEADER_BYTES, MOST_FILE_BYTES = 2**25, 2**30  # of the weights' header, of a tokenizer's file
KINDS = {  # how safetensors writes the types of numbers
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
Header = dict[str, tuple[tuple[int, ...], str]]  # name -> (shape, type as safetensors writes it)
FLOATS = tuple(name for name, kind in KINDS.items() if kind.is_floating_point)


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


def load(cls: type["Model"], folder: Path, *, finite: bool = True) -> Any:
    """Rebuild declarations, then the model, then its weights. What the config declares is compared with the header of the
    weights before it takes time or memory. finite: refuse weights that are NaN or infinite."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and (old / CONFIG).is_file():
        folder = old  # a save was stopped between its two moves; only the next save puts things right
    elif (folder / RUN / CONFIG).is_file():  # a run folder, which has a config.json of its own
        folder = folder / RUN
    elif (folder / f"{RUN}.old" / CONFIG).is_file():
        folder = folder / f"{RUN}.old"
    config = read_config(folder)
    header = read_header(folder / WEIGHTS)
    try:
        tokenizers = {name: _tokenizer(folder, name, entry) for name, entry in config["tokenizers"].items()}
        core = rebuild(config["core"])
        _check_depth(core, len(header))
        tasks = [Task(t["pattern"], rebuild(t["head"]), t["weight"]) for t in config["tasks"]]
        outline = _outline(lambda: cls(tokenizers, core, tasks, seed=config["seed"]), config)
        if outline is not None:
            check_tensors(header, outline.state_dict(), folder)
        model = cls(tokenizers, core, tasks, seed=config["seed"])
    except CheckpointError as error:
        raise CheckpointError(_begun_by(folder, error)) from None
    except Exception as error:  # a config that was edited by hand can be wrong in any way
        raise CheckpointError(
            f"{folder / CONFIG}: what it declares cannot be built: {type(error).__name__}: {_short(str(error))}"
        ) from error
    try:
        put_weights(model, read_tensors(folder / WEIGHTS), folder, finite=finite)
    except RuntimeError as error:  # tensors of numbers that PyTorch cannot convert
        raise CheckpointError(f"{folder / WEIGHTS}: cannot be used: {_short(str(error))}") from error
    # last, as whatever else was wrong says more; checkpoints of version 0.1 have no checksums
    for name, sha256 in config.get("sha256", {}).items():
        if (folder / name).is_file() and file_hash(folder / name) != sha256:
            raise CheckpointError(f"{folder / name}: damaged: its checksum is not the one it was saved with")
    return model


def _begun_by(folder: Path, error: Exception) -> str:
    text = str(error)
    return text if text.startswith(str(folder)) else f"{folder}: {_short(text)}"


def _short(text: str) -> str:
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def _check_depth(core: Any, tensors: int) -> None:
    """Refuse a core of many layers where there are not as many tensors, as each layer has a norm: building it takes minutes."""
    for one in (core.reader, core.writer) if isinstance(core, EncoderDecoder) else (core,):
        if isinstance(one, Core) and one.depth * len(one.block) > max(tensors, FEW_LAYERS):
            raise CheckpointError(
                f"the weights do not fit the config: its core has depth={one.depth} of {len(one.block)} layers each, and "
                f"{WEIGHTS} holds {tensors} tensors"
            )


def _outline(build: Callable[[], "Model"], config: Any) -> "Model | None":
    """The model without memory for its weights; None where a part is not ours, which may remember tensors that it made there."""
    if not all(name.partition(":")[0].partition(".")[0] in OURS for name in part_types(config)):
        return None
    with torch.device("meta"):
        return build()


def _tokenizer(folder: Path, name: str, entry: dict[str, Any]) -> Any:
    check_fields(f"tokenizer {name!r}", entry, {"type": str, "config": dict}, CheckpointError)
    named = entry.get("files", [])
    if not isinstance(named, list) or not all(isinstance(file, str) for file in named):
        raise CheckpointError(f"tokenizer {name!r}: 'files' is {shown_short(named)}, wanted a list of names")
    files = {}
    for file in named:
        inside = Path(name, file)
        if inside.anchor or ".." in inside.parts or "\0" in file:
            raise CheckpointError(f"tokenizer {name!r}: its file {file!r} would lie outside the checkpoint; refused")
        if not (folder / FILES / inside).is_file():
            raise CheckpointError(f"tokenizer {name!r}: its file {FILES}/{name}/{file} is missing")
        if (size := (folder / FILES / inside).stat().st_size) > MOST_FILE_BYTES:
            raise CheckpointError(
                f"tokenizer {name!r}: its file {FILES}/{name}/{file} has {size} bytes, and {MOST_FILE_BYTES} are read at most"
            )
        files[file] = (folder / FILES / inside).read_bytes()
    try:
        return rebuild(entry, files)
    except CheckpointError as error:
        raise CheckpointError(f"tokenizer {name!r}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked as far as loading needs it.

    Raises:
        CheckpointError: no such folder or file, damaged JSON, a format from the future, parts that are missing or of another kind.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG} here; a checkpoint is a folder that Model.save wrote")
    config = read_json(path, CheckpointError)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {shown_short(config.get('format'))}, but this version reads {FORMAT}; update multimodal-stream"
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
        raise CheckpointError(f"{path}: 'sha256' is {shown_short(hashes)}, wanted a checksum by the name of each file")
    check_inside(path, hashes, CheckpointError)
    return config


def read_header(path: Path) -> Header:
    """{name: (shape, type)} of a safetensors file, whose tensors are not read.

    Raises:
        CheckpointError: missing, or no such header.
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
                    raise ValueError(f"the header of {shown_short(name)} is {shown_short(entry)}")
                found[name] = shape, kind
        return found
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged or cut short: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: missing, truncated or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: damaged or cut short: {error}") from error


def below(tensors: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    """The tensors (or what is said of them) whose names begin so, named without it."""
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


def check_tensors(header: Header, wanted: Mapping[str, Tensor], where: Path) -> None:
    """Compare what a file holds (see `read_header`) with the tensors that it is for, one for one. Another precision is taken.

    Raises:
        CheckpointError: lists missing tensors, foreign ones, and those of another shape or kind of number.
    """
    problems: list[tuple[str, str]] = [("missing", name) for name in wanted if name not in header]
    problems += [("foreign", name) for name in header if name not in wanted]
    for name, tensor in wanted.items():
        if name in header:
            shape, kind = header[name]
            if shape != tuple(tensor.shape):
                problems.append((f"{name} is {shown_short(shape)}, wanted {tuple(tensor.shape)}", ""))
            elif (kind not in FLOATS) if tensor.is_floating_point() else (KINDS.get(kind) != tensor.dtype):
                wanted_kind = "floating-point numbers" if tensor.is_floating_point() else _name(tensor.dtype)
                problems.append((f"{name} holds {_name(KINDS.get(kind, kind))}, wanted {wanted_kind}", ""))
    if problems:
        shown = [  # a close name is looked for only where it is shown, which takes long
            f"{what} {shown_short(name)[1:-1]}{did_you_mean(name, wanted) if what == 'foreign' and len(name) < 200 else ''}"
            if name
            else what
            for what, name in problems[:6]
        ]
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"{where}: the weights do not fit the config: {'; '.join(shown)}{more}")


def header_of(tensors: Mapping[str, Tensor]) -> Header:
    """What `read_header` would say of a file of these tensors."""
    names = {kind: name for name, kind in KINDS.items()}
    return {name: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for name, t in tensors.items()}


def _name(kind: Any) -> str:
    return str(kind).removeprefix("torch.")


def put_weights(model: "Model", weights: dict[str, Tensor], where: Path, *, finite: bool = True) -> None:
    """Load weights that must match the model one for one.

    Raises:
        CheckpointError: lists missing tensors, foreign ones and those of another shape or kind; (finite) one with NaN or infinity.
    """
    check_tensors(header_of(weights), model.state_dict(), where)
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in weights.items() if finite else ():
        full = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
        if full.is_floating_point() and not bool((full.isfinite() if name in parameters else ~full.isnan()).all()):
            raise CheckpointError(
                f"{where}: the weights in {name} are not all finite (NaN or infinity), so its answers would mean nothing"
            )
    model.load_state_dict(weights)


def package_version() -> str:
    """The installed version, or 'unknown' when run from a bare source tree."""
    try:
        return version("multimodal-stream")
    except PackageNotFoundError:
        return "unknown"
