"""Replaces several files of a folder in one atomic step; all other files in the folder stay.

FOLDER/config.json             the index: holds the SHA-256 of each file. Replacing it, atomically, makes the new version valid
FOLDER/.multimodal-saving/     exists only during a save, or after a killed save:
    lock                       marks the folder as ours; the process that saves holds a lock on it until it ends
    plan.json                  the files of the old and of the new version, with their checksums
    0f3a...                    a complete new file, named by `key` until it replaces the old one

A reader takes a file from this folder if it is there, and else from its final place. So there is one complete version at any
moment: the old one until the index is replaced, the new one from then on. The next save finishes a save that was killed.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from multimodal.files import (
    back_up,
    check_fields,
    check_inside,
    file_hash,
    flush,
    is_part_path,
    lock,
    part_path,
    read_json,
    write_atomic,
)
from multimodal.shapes import CheckpointError

PLACE, LOCK, PLAN = ".multimodal-saving", "lock", "plan.json"
MARK = "multimodal-stream is saving here\n"
SHA256 = "sha256"  # the key of the index that holds {name: checksum}
PATIENCE_S = 60.0
Sums = Mapping[str, str | None]  # {file of a folder: its SHA-256}; None: unknown

# folders that threads of this process save to: file locks do not exclude threads
_change, _busy = threading.Condition(), set[Path]()


def stored(folder: Path, index: Mapping[str, Any], name: str) -> Path:
    """The path of a file of a saved folder: in PLACE until it is moved, then its final path."""
    waiting = folder / PLACE / key(name, _sums(index).get(name))
    return waiting if waiting.is_file() else folder / name


def key(name: str, sha256: Any) -> str:
    """The name of a file in PLACE."""
    return hashlib.sha256(f"{sha256}/{name}".encode("utf-8", "surrogatepass")).hexdigest()


def version_of(folder: Path, index: str) -> Any:
    """A value that changes with each save, and while a save moves its files to their final paths."""
    found: tuple[Any, ...] = ()
    waiting: list[str] = []
    with suppress(OSError):
        status = os.stat(folder / index)
        found = status.st_ino, status.st_mtime_ns, status.st_size
    with suppress(OSError):
        waiting = sorted(name for name in os.listdir(folder / PLACE) if _is_part(name))
    return found, waiting


def check_names(folder: Path, names: Iterable[str], before: Sums) -> None:
    """Check that files of these names can be written.

    Raises:
        CheckpointError: a file of such a name exists and is not in `before`, or a parent is a link that may lead out of the folder.
    """
    for name in names:
        path = folder / name
        if name not in before and os.path.lexists(path):
            raise CheckpointError(f"{path} is in the way: it is not of the checkpoint that is here; move it away")
        for parent in _parents(folder, name):
            if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
                raise CheckpointError(f"{parent} is in the way: saving needs a folder there, and no link; move it away")


class Saving:
    """One save: `with Saving(folder, "config.json") as saving: saving.add(..); saving.commit(..)`.

    Without `commit` nothing in the folder changes.

    Raises:
        CheckpointError: PLACE holds files of something else, or another process or thread saves here for too long.
    """

    def __init__(self, folder: Path, index: str, writes: Callable[[str], bool]) -> None:
        self.folder, self.index, self.place, self.writes = folder, index, folder / PLACE, writes
        self.sums: dict[str, str] = {}
        self.lock: Any = None
        self.committed = False
        self.made = not folder.exists()

    def __enter__(self) -> Self:
        until = time.monotonic() + PATIENCE_S
        with _change:
            if not _change.wait_for(lambda: self.folder not in _busy, PATIENCE_S):
                raise CheckpointError(f"{self.folder}: another thread is saving here; wait until it is done")
            _busy.add(self.folder)
        try:
            self._acquire(until)
            self._finish_interrupted()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self.committed:
                self._clear()
        finally:
            self._release()

    def add(self, name: str, write: Callable[[Path], Any]) -> None:
        """Add a file to the new version. `write` is called with the path to write it to."""
        folder = part_path(self.place)  # a separate folder, as `write` may make temporary files too: safetensors does
        folder.mkdir()
        part = folder / "part"
        write(part)
        flush(part)
        self.sums[name] = file_hash(part)
        os.replace(part, self.place / key(name, self.sums[name]))
        folder.rmdir()

    def commit(self, index: bytes, before: Sums) -> None:
        """Replace the files of `before` by the added ones, which the index lists in "sha256".

        A file that was changed since it was saved is copied to NAME.1 first, with a warning.
        """
        for name, sha256 in before.items():
            if name in self.sums or name == self.index:
                self._back_up_if_changed(name, {sha256})
        write_atomic(self.place / PLAN, json.dumps({"before": dict(before), "after": self.sums}))
        for name in self.sums:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        part = part_path(self.place)
        part.write_bytes(index)
        flush(part)
        flush(self.place)
        self.committed = True  # before the move: if it is interrupted right after it, the files in PLACE are needed
        try:
            os.replace(part, self.folder / self.index)
        except OSError:
            self.committed = False
            raise
        flush(self.folder)
        self._move_into_place(self.sums, before)

    def _back_up_if_changed(self, name: str, known: set[str | None]) -> None:
        """Copy a file to NAME.1, with a warning, if its checksum is none of the known ones."""
        path = self.folder / name
        if path.is_file() and None not in known and file_hash(path) not in known:
            copy = back_up(path)
            warnings.warn(
                f"{path} was changed since it was saved; what was in it is now in {copy.name} beside it", stacklevel=5
            )

    def _move_into_place(self, after: Mapping[str, str], before: Sums) -> None:
        for name, sha256 in after.items():
            waiting = self.place / key(name, sha256)
            if waiting.is_file():
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(waiting, path)
                flush(path.parent)
        for name, sha256 in before.items():
            path, parents = self.folder / name, _parents(self.folder, name)
            inside = not any(parent.is_symlink() for parent in parents)
            if name not in after and name != self.index and inside and path.is_file():
                if sha256 == file_hash(path):  # one whose checksum is not known stays
                    path.unlink()
                for parent in parents:
                    with suppress(OSError):  # it is not empty
                        parent.rmdir()
        self._clear()

    def _acquire(self, until: float) -> None:
        while self.lock is None:
            self.place.mkdir(parents=True, exist_ok=True)
            self._check_place()
            try:
                file = lock(self.place / LOCK, max(0.0, until - time.monotonic()))
            except FileNotFoundError:
                continue  # the previous save has just removed PLACE
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.folder}: another process is saving here; wait until it is done, or choose another folder"
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.place / LOCK)):
                    self.lock = file
            if self.lock is None:
                file.close()
        if not self.lock.tell():
            self.lock.write(MARK.encode())
            self.lock.flush()

    def _check_place(self) -> None:
        """Refuse a folder of this name that no save made."""
        with suppress(FileNotFoundError):
            there = os.listdir(self.place)
            ours = all(map(_is_part, there)) or (
                LOCK in there and (self.place / LOCK).read_text("utf-8", "replace") in ("", MARK)
            )
            if there and (self.place.is_symlink() or not ours):
                raise CheckpointError(f"{self.place} is in the way: it is not what a save made; move it away")

    def _finish_interrupted(self) -> None:
        """Complete the save of a killed process if its new index is in place; else delete its files."""
        try:
            index = read_json(self.folder / self.index, CheckpointError)
            plan = read_json(self.place / PLAN, CheckpointError)
            check_fields(self.place / PLAN, plan, {"before": dict, "after": dict}, CheckpointError)
            before, after = plan["before"], plan["after"]
            self._check_plan(before, after)
        except CheckpointError:
            index, before, after = None, {}, {}
        if not after or _sums(index) != after:
            self._clear()
            return
        for name, sha256 in after.items():
            if (self.place / key(name, sha256)).is_file():  # else it was moved already
                # what is not known counts as changed here
                self._back_up_if_changed(name, {sha256, before.get(name)} - {None})
        self._move_into_place(after, before)

    def _check_plan(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Refuse a plan that no save made: it is not trusted, and the files that it names are moved and removed.

        Raises:
            CheckpointError: a name that a save does not write, or one that lies outside, also through a link.
        """
        names = {name for name in (*before, *after) if name != self.index}
        check_inside(self.place / PLAN, names, CheckpointError)
        linked = [name for name in names if any(parent.is_symlink() for parent in _parents(self.folder, name))]
        if linked or not all(map(self.writes, names)) or not all(isinstance(sha256, str) for sha256 in after.values()):
            raise CheckpointError(f"{self.place / PLAN} is of no save")

    def _clear(self) -> None:
        for name in self._parts():
            path = self.place / name
            if is_part_path(name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _parts(self) -> list[str]:
        return [name for name in os.listdir(self.place) if _is_part(name) or name == PLAN]

    def _release(self) -> None:
        try:
            if self.lock is not None and not self._parts():
                (self.place / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # it holds a file that is not ours
                    self.place.rmdir()
                    if self.made and not self.committed:
                        self.folder.rmdir()
        finally:
            if self.lock is not None:
                self.lock.close()
            with _change:
                _busy.discard(self.folder)
                _change.notify_all()


def _sums(index: Any) -> dict[str, str]:
    found = index.get(SHA256) if isinstance(index, Mapping) else None
    return found if isinstance(found, dict) else {}


def _is_part(name: str) -> bool:
    return is_part_path(name) or re.fullmatch(r"[0-9a-f]{64}", name) is not None


def _parents(folder: Path, name: str) -> list[Path]:
    """The folders between `folder` and the file, innermost first."""
    return [folder / parent for parent in Path(name).parents][:-1]
