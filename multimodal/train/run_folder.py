"""The files of a run folder, its lock, and files of JSON rows."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from multimodal import files
from multimodal.checkpoint import RUN, own_config
from multimodal.files import check_fields, parse_json, unused_path, write_atomic
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.train.spikes import FOLDER as SPIKES
from multimodal.train.state import CHECKPOINTS, OLD, STATE, is_of_a_run

MODEL = RUN
BEST, LOG, CURVES, CONFIG, BROKEN = "best", "log.jsonl", "curves.png", "config.json", "bad.jsonl"
TABLE, ENVIRONMENT, LOCK = "log.csv", "environment.json", ".lock"
BOARD = "tensorboard"  # written by the command line
REMOTE = "trackers.json"  # by what trackers find the run in their services
FILES = (CONFIG, LOG, TABLE, CURVES, BROKEN, ENVIRONMENT)
WRITTEN = (CONFIG, MODEL, BEST, CHECKPOINTS, OLD, SPIKES, LOG, TABLE, CURVES, BROKEN, ENVIRONMENT)


def lock(folder: Path, patience_s: float = 15.0) -> Any:
    """Lock a run folder, so that no other process trains in it, until this process ends or closes the returned file.

    Raises:
        ConfigError: another one trains there.
    """
    try:
        return files.lock(folder / LOCK, patience_s)
    except BlockingIOError:
        raise ConfigError(
            f"{folder}: another process trains here; wait for it, stop it, or choose another folder"
        ) from None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: `fit` wrote its configuration or a state in it."""
    return any(
        map(is_of_a_run, (folder / CONFIG, folder / OLD / STATE, *(folder / CHECKPOINTS).glob(f"step-*/{STATE}")))
    )


def check_folder(folder: Path) -> None:
    """Refuse a folder in which a run would overwrite files that no run wrote.

    Raises:
        ConfigError: says what is there.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"fit: {folder} is a file, and a run needs a folder; choose another name")
    if own_config(folder) is not None:
        raise ConfigError(
            f"fit: {folder} holds a saved model, and a run would write over its {CONFIG}; choose another folder"
        )
    if linked := [name for name in FILES if (folder / name).is_symlink()]:
        raise ConfigError(
            f"fit: {folder / linked[0]} is a link, and a run would write to where it leads; remove it, or choose another folder"
        )
    there = [name for name in WRITTEN if os.path.lexists(folder / name)]
    if there and not is_run(folder):
        raise ConfigError(
            f"fit: {folder} holds {', '.join(there)}, which no run wrote, and a run would write over it; choose another folder"
        )


def read_rows(path: Path, numbers: bool = False) -> list[dict[str, Any]]:
    """The rows of a log, each with its step. numbers: all values must be numbers. An incomplete last line is left out.

    Raises:
        CheckpointError: another line is no such row.
    """
    if not path.is_file():
        return []
    rows = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            check_fields(path, row, {"step": int}, ValueError)
            if wrong := [key for key, value in row.items() if numbers and not _is_number(value)]:
                raise ValueError(f"{wrong[0][:60]!r} is no number")
        except ValueError as error:
            if number == len(lines) and line.startswith(b"{"):  # the run was killed while it wrote this line
                break
            raise CheckpointError(
                f"{path}: line {number} is no row of a log ({error}); put it right, or move the file away"
            ) from error
        rows.append(row)
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and (isinstance(value, float) or -(2**63) <= value < 2**63)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def add_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows. A full disk is only a warning, since all rows are written again at the end of a run."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        warnings.warn(f"fit: {path} could not be written to ({error}); training goes on", stacklevel=3)


def move_old_run(folder: Path, quiet: bool) -> None:
    """Move the files of a run to FOLDER.1, or the next unused number, beside it. Other files stay, and nothing is overwritten.

    Raises:
        ConfigError: the files cannot be moved.
    """
    if not any(os.path.lexists(folder / name) for name in WRITTEN):
        return
    folder = folder.resolve()
    target = unused_path(folder)
    try:
        target.mkdir()
        for name in (BOARD, REMOTE, *reversed(WRITTEN)):  # the configuration last: it shows that a run wrote the others
            if os.path.lexists(folder / name):
                os.rename(folder / name, target / name)
    except OSError as error:
        raise ConfigError(
            f"fit: a run is in {folder}, and it cannot be moved to {target} to make room ({error}); choose another folder"
        ) from error
    if not quiet:
        print(f"fit: the run that was in {folder} is now in {target}; resume=True would have gone on with it")
