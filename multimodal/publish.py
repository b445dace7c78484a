"""Pushes a model to the hub: only the files of its checkpoint, and its model card."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimodal import checkpoint
from multimodal.card import card, is_as_written
from multimodal.checkpoint import CONFIG, FILES, WEIGHTS
from multimodal.files import parse_json
from multimodal.hub import Repository, full_name, look_up
from multimodal.model import Model
from multimodal.saving import stored
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.texts import listed, short_repr
from multimodal.train.run_folder import BEST, is_run

README = "README.md"
ENDINGS = (".json", ".safetensors", ".txt")  # allowed file names of tokenizers: formats that hold no code


@dataclass(frozen=True)
class Published:
    """The result of a push.

    name, url: of the repository. commit: the commit that has these files. private: whether the repository is private.
    written, unchanged, deleted: names of files.
    kept: names of files that somebody changed on the hub, and that the push did not overwrite.
    """

    name: str
    url: str
    commit: str
    private: bool
    written: tuple[str, ...]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]


def push(
    model: Model,
    name: str,
    *,
    run: str | Path | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    limits: str = "",
    **options: Any,
) -> Published:
    """Push a model with its card as one commit. The arguments are those of `Model.push_to_hub`; `options` go to `push_files`.

    Raises:
        ConfigError: there is no token or connection, the token may not write, the repository holds another model, or the model has
            parts that others cannot load.
    """
    name = full_name(name, options.get("token"))
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        text = card(model, name, run=run, license=license, datasets=datasets, limits=limits)
        files = files_of(Path(folder), text)
        return push_files(name, files, **options)


def run_of(folder: Path) -> tuple[Path | None, bool]:
    """Return (the run folder that is or contains `folder`, or None; whether the model is the best of that run, not the last)."""
    folder = folder.resolve()
    around = next((path for path in (folder, folder.parent) if is_run(path)), None)
    return around, around is not None and folder == around / BEST


def files_of(folder: Path, readme: str) -> dict[str, bytes | Path]:
    """{file name: content or path} of all that a push uploads: the files of a checkpoint, and the card `readme`.

    Raises:
        CheckpointError: the folder holds no checkpoint.
        ConfigError: a file might hold code, or config.json contains a path of this machine.
    """
    config = checkpoint.read_config(folder)
    origin = config.get("origin")
    if isinstance(origin, dict):
        config["origin"] = _without_paths(origin)
    for where, text in _texts(config):
        if os.path.isabs(text) and len(Path(text).parts) > 2 and len(text) < 1000 and os.path.exists(text):
            raise ConfigError(
                f"push: {CONFIG} of {folder} names a path of this machine, {short_repr(text)} as {where}, which others do not "
                "have; declare this part without a path"
            )
    files: dict[str, bytes | Path] = {README: readme.encode("utf-8"), CONFIG: checkpoint.config_file(config)}
    named = [
        f"{FILES}/{kind}/{file}" for kind, entry in config["tokenizers"].items() for file in entry.get("files", [])
    ]
    for file in (WEIGHTS, *named):
        if not file.endswith(ENDINGS):
            raise ConfigError(
                f"push: {file} of {folder} is not one of {', '.join(ENDINGS)}; a push uploads only text, JSON and safetensors"
            )
        path = stored(folder, config, file)
        if not path.is_file():
            raise CheckpointError(f"{folder}: {file} is missing")
        files[file] = path
    return files


def push_files(
    name: str,
    files: Mapping[str, bytes | Path],
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Published:
    """Push the files of `files_of`, and delete tokenizer files of the former model. The options are those of `Model.push_to_hub`.

    Raises:
        ConfigError: see `push`.
    """
    from huggingface_hub import constants

    there = look_up(name, revision, token)
    if private and there.private is False:
        raise ConfigError(
            f"push: {name} is public already, which a push does not change; make it private in its settings, or choose another name"
        )
    before = _config_of(there)
    new = parse_json(_read(files[CONFIG]))
    same = before is not None and _patterns(before) == _patterns(new)
    changed = [file for file in files if not there.has(file, files[file])]
    other = [] if same or overwrite else [file for file in changed if file in there.sums and file != README]
    if other:
        what = "other files" if before is None else f"a model for other tasks ({listed(_patterns(before))})"
        raise ConfigError(
            f"push: {name} holds {what}; {listed(other)} would be overwritten. Choose another name, or push with overwrite=True "
            "(--overwrite), which leaves them in the history of the repository"
        )
    kept = [README] if not overwrite and README in changed and not _is_ours(there) else []
    written = [file for file in changed if file not in kept]
    old = (
        []
        if before is None
        else [f"{FILES}/{kind}/{f}" for kind, t in before["tokenizers"].items() for f in t["files"]]
    )
    deleted = [file for file in old if file in there.sums and file not in files]
    commit = there.commit
    if written or deleted or commit is None:
        text = message or f"{listed(_patterns(new))} by {new['made_by']}"
        chosen = {file: files[file] for file in written}
        commit = there.write(chosen, deleted, text, private=True if private is None else private)
    return Published(
        name,
        f"{constants.ENDPOINT}/{name}",
        commit,
        (private is not False) if there.private is None else there.private,
        tuple(written),
        tuple(file for file in files if file not in changed),
        tuple(deleted),
        tuple(kept),
    )


def _config_of(there: Repository) -> dict[str, Any] | None:
    """The config.json of a repository; None: there is none, or it is not of this library."""
    if CONFIG not in there.sums:
        return None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CONFIG).write_bytes(there.read(CONFIG))
        return checkpoint.own_config(Path(folder))


def _is_ours(there: Repository) -> bool:
    """Whether the repository has no card, or one that nobody changed since a push wrote it."""
    return README not in there.sums or is_as_written(there.read(README).decode("utf-8", "replace"))


def _patterns(config: Mapping[str, Any]) -> list[str]:
    return sorted(str(task.get("pattern")) for task in config["tasks"] if isinstance(task, Mapping))


def _read(data: bytes | Path) -> bytes:
    return data if isinstance(data, bytes) else data.read_bytes()


def _without_paths(origin: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of a model without paths of this machine: a name on the hub, or only the last part of a path."""
    local = not origin.get("revision")
    return {
        **origin,
        "name": Path(str(origin.get("name"))).name if local else origin["name"],
        "config": _with_short_paths(origin.get("config", {})),
    }


def _with_short_paths(config: Any) -> Any:
    """A configuration of transformers, with only the last part of a path in "_name_or_path"."""
    if not isinstance(config, Mapping):
        return config
    return {
        name: Path(value).name if name == "_name_or_path" and _is_path(value) else _with_short_paths(value)
        for name, value in config.items()
    }


def _is_path(text: Any) -> bool:
    return isinstance(text, str) and (os.path.isabs(text) or text.startswith((".", "~")))


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield (where, text) for every text in a JSON value; where: its keys joined by dots."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, (Mapping, list)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in pairs:
            yield from _texts(inner, f"{where}.{key}" if where else str(key))
