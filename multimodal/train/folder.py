"""What lies in a run folder, and the files in it that are rows of JSON."""

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

from multimodal.checkpoint import RUN
from multimodal.files import check_fields, free_name, parse_json, put
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.train.state import CHECKPOINTS, OLD

MODEL = RUN
BEST, LOG, CURVES, CONFIG, BROKEN = "best", "log.jsonl", "curves.png", "config.json", "bad.jsonl"
TABLE, ENVIRONMENT, LOCK = "log.csv", "environment.json", ".lock"


def lock(folder: Path, patience_s: float = 15.0) -> Any:
    """Make this the only process that trains in a folder, until it ends or closes what is returned; a dead one holds no lock.

    Raises:
        ConfigError: another one trains there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = (folder / LOCK).open("w")
    for patience in range(int(patience_s * 10), -1, -1):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if not patience:
                file.close()
                raise ConfigError(
                    f"{folder}: another process trains here; wait for it, stop it, or choose another folder"
                ) from None
            time.sleep(0.1)
    return None


def read_rows(path: Path, numbers: bool = False) -> list[dict[str, Any]]:
    """The rows of a log, each with its step; numbers: they hold nothing but numbers. A last line that was cut short is left out.

    Raises:
        CheckpointError: a line that is no such row.
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
            if number == len(lines) and line.startswith(b"{"):  # of a run that was killed while it wrote
                break
            raise CheckpointError(
                f"{path}: line {number} is no row of a log ({error}); put it right, or move the file away"
            ) from error
        rows.append(row)
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and (isinstance(value, float) or -(2**63) <= value < 2**63)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    put(path, "".join(json.dumps(row) + "\n" for row in rows))


def add_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append; a disk that is full is told by a warning, as the rows are written once more at the end of a run."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        warnings.warn(f"fit: {path} could not be written to ({error}); training goes on", stacklevel=3)


def make_room(folder: Path, quiet: bool) -> bool:
    """Move a run that is already in the folder to the first free name beside it; nothing is written over."""
    if not any((folder / name).exists() for name in (CHECKPOINTS, OLD, RUN, LOG)):
        return False
    folder = folder.resolve()
    free = free_name(folder)
    os.replace(folder, free)
    if not quiet:
        print(f"fit: the run that was in {folder} is now in {free}")
    return True
