"""What lies in a run folder, and the files in it that are rows of JSON."""

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

from multimodal.checkpoint import RUN
from multimodal.shapes import ConfigError
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed while it wrote
            break
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    aside = path.with_name(path.name + ".writing")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, path)


def make_room(folder: Path, quiet: bool) -> None:
    """Move a run that is already in the folder to the first free name beside it; nothing is written over."""
    if not any((folder / name).exists() for name in (CHECKPOINTS, OLD, RUN, LOG)):
        return
    free = next(path for n in itertools.count(1) if not (path := folder.with_name(f"{folder.name}.{n}")).exists())
    os.replace(folder, free)
    if not quiet:
        print(f"fit: the run that was in {folder} is now in {free}")
