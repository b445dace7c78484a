"""Files of a folder that change all together, while everything else in the folder stays as it is.

FOLDER/config.json             the index: says what each file's SHA-256 is. Replacing it, in one move, makes the new files count
FOLDER/.multimodal-saving/     only while something is being saved, or after a save that was killed:
    lock                       says that this is ours, and is locked as long as the process that saves lives
    plan.json                  the files before and after, with their checksums
    0f3a...                    a new file, whole, called by `key` until it is put in the place of the old one

A reader takes each file from here as long as it is here. So at any moment there is one whole version: the old one until the
index is replaced, and the new one from then on. The next save ends what one that was killed had begun.
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
    aside,
    check_fields,
    check_inside,
    file_hash,
    flush,
    is_aside,
    keep_copy,
    lock,
    put,
    read_json,
)
from multimodal.shapes import CheckpointError

PLACE, LOCK, PLAN = ".multimodal-saving", "lock", "plan.json"
MARK = "multimodal-stream is saving here\n"
SHA256 = "sha256"  # where the index says {name: checksum}
PATIENCE_S = 60.0
Sums = Mapping[str, str | None]  # files of a folder by their checksums; None: not known

_change, _busy = threading.Condition(), set[Path]()  # folders; file locks tell processes apart, not threads


def stored(folder: Path, index: Mapping[str, Any], name: str) -> Path:
    """Where a file of a saved folder lies: in its place, or still in PLACE."""
    waiting = folder / PLACE / key(name, _sums(index).get(name))
    return waiting if waiting.is_file() else folder / name


def key(name: str, sha256: Any) -> str:
    """What a file is called in PLACE."""
    return hashlib.sha256(f"{sha256}/{name}".encode("utf-8", "surrogatepass")).hexdigest()


def version_of(folder: Path, index: str) -> Any:
    """Something that is another after each save, and while one puts files in place."""
    found: tuple[Any, ...] = ()
    waiting: list[str] = []
    with suppress(OSError):
        facts = os.stat(folder / index)
        found = facts.st_ino, facts.st_mtime_ns, facts.st_size
    with suppress(OSError):
        waiting = sorted(name for name in os.listdir(folder / PLACE) if _is_part(name))
    return found, waiting


def check_names(folder: Path, names: Iterable[str], before: Sums) -> None:
    """See to it that files of these names can be written.

    Raises:
        CheckpointError: one is there that is not among those before, or would lie outside, behind a link.
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

    Without `commit` the folder is as it was.

    Raises:
        CheckpointError: PLACE is somebody else's, or another process saves here and does not end.
    """

    def __init__(self, folder: Path, index: str) -> None:
        self.folder, self.index, self.place = folder, index, folder / PLACE
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
            self._hold(until)
            self._end_what_was_begun()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self.committed:
                self._clear()
        finally:
            self._leave()

    def add(self, name: str, write: Callable[[Path], Any]) -> None:
        """A file of the new version, which `write` writes to the path that it is given."""
        folder = aside(self.place)  # of its own, as who writes may have temporary files too: safetensors does
        folder.mkdir()
        part = folder / "part"
        write(part)
        flush(part)
        self.sums[name] = file_hash(part)
        os.replace(part, self.place / key(name, self.sums[name]))
        folder.rmdir()

    def commit(self, index: bytes, before: Sums) -> None:
        """Let the new files, which the index lists in "sha256", take the place of those before.

        A file that was changed since it was saved is copied to NAME.1 first, with a warning.
        """
        for name, sha256 in before.items():
            if name in self.sums or name == self.index:
                self._keep_if_changed(name, {sha256})
        put(self.place / PLAN, json.dumps({"before": dict(before), "after": self.sums}))
        for name in self.sums:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        part = aside(self.place)
        part.write_bytes(index)
        flush(part)
        flush(self.place)
        self.committed = True  # already now: when interrupted behind the next line, what is in PLACE is needed
        try:
            os.replace(part, self.folder / self.index)
        except OSError:
            self.committed = False
            raise
        flush(self.folder)
        self._put_in_place(self.sums, before)

    def _keep_if_changed(self, name: str, known: set[str | None]) -> None:
        path = self.folder / name
        if path.is_file() and None not in known and file_hash(path) not in known:
            copy = keep_copy(path)
            warnings.warn(
                f"{path} was changed since it was saved; what was in it is now in {copy.name} beside it", stacklevel=5
            )

    def _put_in_place(self, after: Mapping[str, str], before: Sums) -> None:
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
                if sha256 in (None, file_hash(path)):
                    path.unlink()
                for parent in parents:
                    with suppress(OSError):  # it is not empty
                        parent.rmdir()
        self._clear()

    def _hold(self, until: float) -> None:
        while self.lock is None:
            self.place.mkdir(parents=True, exist_ok=True)
            self._check_place()
            try:
                held = lock(self.place / LOCK, max(0.0, until - time.monotonic()))
            except FileNotFoundError:
                continue  # who saved before removed PLACE just now
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.folder}: another process is saving here; wait until it is done, or choose another folder"
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(held.fileno()), os.stat(self.place / LOCK)):
                    self.lock = held
            if self.lock is None:
                held.close()
        if not self.lock.tell():
            self.lock.write(MARK.encode())
            self.lock.flush()

    def _check_place(self) -> None:
        """Refuse what only has the name."""
        with suppress(FileNotFoundError):
            there = os.listdir(self.place)
            ours = all(map(_is_part, there)) or (
                LOCK in there and (self.place / LOCK).read_text("utf-8", "replace") in ("", MARK)
            )
            if there and (self.place.is_symlink() or not ours):
                raise CheckpointError(f"{self.place} is in the way: it is not what a save made; move it away")

    def _end_what_was_begun(self) -> None:
        """By a process that was killed: to its end where the new version counts already, else back."""
        try:
            index = read_json(self.folder / self.index, CheckpointError)
            plan = read_json(self.place / PLAN, CheckpointError)
            check_fields(self.place / PLAN, plan, {"before": dict, "after": dict}, CheckpointError)
            before, after = plan["before"], plan["after"]
            # a folder may have been made by anybody, and what a plan names is moved and removed
            check_inside(self.place / PLAN, [*before, *after], CheckpointError)
        except CheckpointError:
            index, before, after = None, {}, {}
        if not after or _sums(index) != after:
            self._clear()
            return
        for name, sha256 in after.items():
            if (self.place / key(name, sha256)).is_file():  # else it is in its place
                self._keep_if_changed(name, {sha256, before[name]} if name in before else {sha256})
        self._put_in_place(after, before)

    def _clear(self) -> None:
        for name in self._parts():
            path = self.place / name
            if is_aside(name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _parts(self) -> list[str]:
        return [name for name in os.listdir(self.place) if _is_part(name) or name == PLAN]

    def _leave(self) -> None:
        try:
            if self.lock is not None and not self._parts():
                (self.place / LOCK).unlink(missing_ok=True)
                with suppress(OSError):  # something is in it that we did not put there
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
    return is_aside(name) or re.fullmatch(r"[0-9a-f]{64}", name) is not None


def _parents(folder: Path, name: str) -> list[Path]:
    """The folders between, innermost first."""
    return [folder / parent for parent in Path(name).parents][:-1]
