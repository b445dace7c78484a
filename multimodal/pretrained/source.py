"""Finds a pretrained model: a folder or file, a name on the Hugging Face hub, or a model object of transformers or timm."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from multimodal.checkpoint import model_folder, own_config, write_tensors
from multimodal.files import new_folder, parse_json
from multimodal.hub import fetch
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.texts import short_repr, shortened

CONFIG = "config.json"
OTHER_FILES = ("tokenizer.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Source:
    """A pretrained model that was found; most of its weights are not read yet.

    name: the name, path or class that the user gave.
    config: the content of config.json.
    tensors: its tensors by name; a tensor in a safetensors file is read when it is looked up.
    files: by name, the contents of files beside the weights, such as tokenizer.json.
    revision: the commit on the hub; None: it is not from the hub.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, bytes] = field(default_factory=dict)
    revision: str | None = None


def find(source: Any, *, revision: str | None = None, pickle: bool = False) -> Source:
    """Find a pretrained model.

    source: a folder with config.json and weights, a file of weights in such a folder, a name on the hub such as
        "facebook/dinov2-small", or a model object of transformers or timm.
    revision: the branch, tag or commit to load from the hub.
    pickle: whether weights may be a pickle (.bin), which is read with `torch.load(weights_only=True)`.

    Raises:
        CheckpointError: there is no such model, or its files cannot be read.
        ConfigError: `source` is of another type.
    """
    if isinstance(source, torch.nn.Module):
        return _of_module(source)
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"pretrained: give a folder, a name on the hub, or a model of transformers or timm, not {type(source).__name__}"
        )
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise ConfigError(f"pretrained: {path} is a local path, which has no revision={revision!r}; leave it out")
        return _of_folder(str(source), path if path.is_dir() else path.parent, pickle, path if path.is_file() else None)
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise CheckpointError(
            f"pretrained: there is no folder or file {str(source)!r}, and it is no name such as 'owner/model'"
        )
    return _of_hub(str(source), revision, pickle)


def _of_folder(name: str, folder: Path, pickle: bool, file: Path | None = None, revision: str | None = None) -> Source:
    if (own := own_config(model_folder(folder))) is not None:
        origin = own.get("origin")
        known = origin.get("name") if isinstance(origin, dict) else None
        began = f"; it began with the weights of {known}, which mm.pretrained reads" if known else ""
        raise CheckpointError(
            f"{name}: a checkpoint of this library, which mm.Model.load reads, and no model of another one{began}"
        )
    config = _json(folder / CONFIG)
    files = {beside: _text(folder / beside) for beside in OTHER_FILES if (folder / beside).is_file()}
    found = [file] if file else [folder / name for name in (*WEIGHTS, *PICKLES) if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder}: there are no weights here; wanted {' or '.join(WEIGHTS)}")
    weights = found[0]
    parts, file_of = [weights], {}
    if weights.name.endswith(".index.json"):
        file_of = _weight_map(weights)
        parts = [folder / part for part in sorted(set(file_of.values()))]
    if any(part.suffix != ".safetensors" for part in parts):
        if not pickle:
            raise CheckpointError(
                f"{weights}: a pickle, which is read only with pretrained(.., pickle=True), and then with "
                "torch.load(weights_only=True), which runs no code; use safetensors if there are any"
            )
        return Source(name, config, _read_pickles(parts), files, revision)
    return Source(name, config, _LazyTensors(parts, file_of), files, revision)


def _weight_map(index: Path) -> dict[str, str]:
    """{name of a tensor: name of its file}, from an index file."""
    file_of = _json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(file, str) for file in file_of.values()):
        raise CheckpointError(
            f"{index}: its weight_map is {short_repr(file_of)}; wanted the name of a file for each tensor"
        )
    for name, file in file_of.items():
        if file != Path(file).name or file in ("", "..") or "\0" in file:
            raise CheckpointError(f"{index}: it names files outside its folder: {name} in {file!r}")
    return file_of


def _text(path: Path) -> bytes:
    """The content of a file, which must be UTF-8 text."""
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: cannot be read: {shortened(error, 300)}") from None
    return data


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: there is no {path.name} here")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read: {shortened(error, 300)}") from None


class _LazyTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files; each is read when it is looked up.

    said: {name of a tensor: its file by the index}. Files of different versions of a model do not match their index.
    """

    def __init__(self, parts: list[Path], said: Mapping[str, str]) -> None:
        self._file_of: dict[str, Any] = {}
        for part in parts:
            try:
                opened = safe_open(part, framework="pt")
                names = set(opened.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{part}: cannot be read: {shortened(error, 300)}") from None
            if twice := sorted(names & set(self._file_of)):
                raise CheckpointError(
                    f"{part}: another file has a tensor {twice[0]!r} too; remove the file that does not belong to the model"
                )
            if missing := sorted(name for name, file in said.items() if file == part.name and name not in names):
                raise CheckpointError(
                    f"{part}: it has no tensor {missing[0]!r}, although the index says so; get all files of one version"
                )
            self._file_of |= dict.fromkeys(names, opened)

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _read_pickles(parts: list[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part in parts:
        try:
            state = torch.load(part, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or foreign pickle may raise any error
            raise CheckpointError(f"{part}: cannot be read: {type(error).__name__}: {shortened(error, 300)}") from None
        if not isinstance(state, Mapping) or not all(
            isinstance(name, str) and isinstance(x, Tensor) for name, x in state.items()
        ):
            raise CheckpointError(f"{part}: wanted tensors by name")
        found |= state
    return found


def _of_hub(name: str, revision: str | None, pickle: bool) -> Source:
    wanted = [CONFIG, *OTHER_FILES, "*.safetensors", "*.safetensors.index.json"]
    folder, commit = fetch("pretrained", name, wanted, revision=revision)
    if pickle and not any((folder / weights).is_file() for weights in WEIGHTS):
        folder, _ = fetch("pretrained", name, [*wanted, "*.bin", "*.bin.index.json"], revision=commit)
    return _of_folder(name, folder, pickle, revision=commit)


def _of_module(module: torch.nn.Module) -> Source:
    name = type(module).__name__
    if hasattr(module, "save_pretrained") and hasattr(module, "config"):
        # tensor names in memory differ from those in files, so the module is saved and read
        with tempfile.TemporaryDirectory() as folder:
            module.save_pretrained(folder)  # type: ignore[operator]
            source = _of_folder(name, Path(folder), False)
            return Source(name, source.config, {key: x.clone() for key, x in source.tensors.items()}, source.files)
    if hasattr(module, "pretrained_cfg"):  # a timm model, which has no configuration file
        from multimodal.pretrained.timm_vit import CLASSES, module_config

        config = {"model_type": f"timm:{name}", **(module_config(module) if name in CLASSES else {})}
        return Source(name, config, {key: x.clone() for key, x in module.state_dict().items()})
    raise ConfigError(
        f"pretrained: {name} is no model of transformers or timm; give a folder, a name on the hub, or such a model"
    )


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], files: Mapping[str, bytes]) -> None:
    """Write a folder that their library loads.

    Raises:
        CheckpointError: the folder has files already or cannot be written, or one of `files` has an unknown name.
    """
    known = {*OTHER_FILES, "tokenizer_config.json"}
    if foreign := [name for name in files if name not in known]:
        # a checkpoint from somebody else could name any path on this machine
        raise CheckpointError(
            f"{folder}: export does not write files named {foreign[0]!r}; known names are {', '.join(sorted(known))}"
        )
    with new_folder(folder) as part:
        write_tensors(
            {name: x.contiguous().clone() for name, x in tensors.items()}, part / WEIGHTS[0], {"format": "pt"}
        )
        (part / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, data in files.items():
            (part / name).write_bytes(data)
