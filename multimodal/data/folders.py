"""Lists the files in class folders with their classes, and counts those that are left out."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from multimodal.data.account import Account, Tally
from multimodal.shapes import ConfigError, did_you_mean
from multimodal.texts import is_text, listed

KINDS = {
    "image": (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff"),
}
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")
SYSTEM = (  # files and folders that other programs create, besides names that begin with a dot
    *("__macosx", "__pycache__", "@eadir", "@tmp", "#recycle", "@recycle", "$recycle.bin", "lost+found"),
    *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
)
HIDDEN, FORMAT, BESIDE = "hidden or of the system", "of another format", "in no class folder"
AGAIN = "a link to a folder that is read already"
WORDS = {"image": "picture", "audio": "sound"}


@dataclass(frozen=True)
class Member:
    """A file of a folder.

    name: its relative path.
    field: "image" or "audio".
    label: its class, the name of a folder; None: it is in no class folder.
    """

    name: Path
    field: str
    label: str | None


@dataclass(frozen=True)
class Folder:
    """The files of a folder that are samples.

    path: the folder.
    members: the files, sorted by name.
    account: counts of everything in it.
    """

    path: Path
    members: Sequence[Member]
    account: Account


def read_folder(
    path: Path, *, split: str | None = None, fields: Sequence[str] = tuple(KINDS), labelled: bool = False
) -> Folder:
    """The files of CLASS/any/depth/file.jpg: the first folder below `path` is the class.

    Links are followed; each folder is read once, under its own name if it is here, else under that of a link. Names that begin with
    a dot and files of the system (`__MACOSX`, `@eaDir`, `Thumbs.db`) are left out. split: which of the folders train, val, test is
    read, where the folder or its class folders hold such. fields: "image", "audio", or both. labelled: leave out files in no class
    folder.

    Raises:
        ConfigError: no folder, no file of these kinds, splits of which none was chosen, or a class whose name is not UTF-8.
    """
    kinds = {suffix: field for field in fields for suffix in KINDS[field]}
    if not path.is_dir():
        raise ConfigError(f"there is no folder {str(path)!r}")
    found, tally = [], Tally("entries")  # files, and folders that yield no files
    for name, reason in sorted(entries_below(path), key=lambda entry: entry[0].parts):
        if reason is None and any(is_hidden(part) for part in name.parts):
            reason = HIDDEN
        suffix = name.suffix.lower()
        if reason is None and suffix not in kinds:
            reason = f"{FORMAT} ({suffix or 'none'})"
        if reason is None:
            found.append(name)
        else:
            tally.leave(reason, name.as_posix())
    if not found:
        wanted = " or ".join(WORDS[field] for field in fields)
        raise ConfigError(f"{path} holds no {wanted} ({', '.join(kinds)}); {tally.account()}")
    members = []
    for name, inner in _of_split(path, found, split, tally):
        label = inner.parts[0] if len(inner.parts) > 1 else None
        if label is None and labelled:
            tally.leave(BESIDE, name.as_posix())
            continue
        if label is not None and not is_text(label):
            raise ConfigError(f"{path}: the class folder {label!r} has a name that is not UTF-8; rename it")
        members.append(Member(name, kinds[name.suffix.lower()], label))
    tally.used = len(members)
    return Folder(path, members, tally.account())


def splits_of(path: Path, fields: Sequence[str] = tuple(KINDS)) -> list[str]:
    """The names of the folders train, val, test and so on that a folder, or its class folders, has; [] where there are none."""
    suffixes = {suffix for field in fields for suffix in KINDS[field]}
    names = [
        name
        for name, reason in entries_below(path)
        if reason is None and name.suffix.lower() in suffixes and not any(map(is_hidden, name.parts))
    ]
    depth = next((depth for depth in (0, 1) if _are_splits(names, depth)), None)
    return [] if depth is None else sorted({name.parts[depth] for name in names if _is_split(name, depth)})


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or made by a system or program rather than by the user."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM


def entries_below(root: Path) -> Iterator[tuple[Path, str | None]]:
    """(name, reason) of every file below a folder, and of every folder that is not read; reason: why it is left out, or None.

    Real folders are read before linked ones, so that a link to a folder that is also here makes no second copy.
    """
    plain, links, read = [Path()], list[Path](), {_identity(root)}
    while plain or links:
        name = plain.pop() if plain else links.pop(0)
        if name.parts and not plain and _is_link(root / name):
            if (identity := _identity(root / name)) in read:
                yield name, AGAIN
                continue
            read.add(identity)
        try:
            with os.scandir(root / name) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield name, f"a folder that cannot be read ({error.strerror})"
            continue
        if not inside and name.parts:
            yield name, "an empty folder"
        for entry in inside:
            inner = name / entry.name
            kind = _kind(entry)
            if kind == "file":
                yield inner, None
            elif kind == "folder":
                if (identity := _identity(root / inner)) in read:
                    yield inner, AGAIN
                    continue
                read.add(identity)
                plain.append(inner)
            elif kind == "link" and not any(map(is_hidden, inner.parts)):  # hidden links are not followed
                links.append(inner)
            else:
                yield inner, HIDDEN if kind == "link" else "no file (a device, or a link that leads nowhere)"


def _kind(entry: os.DirEntry[str]) -> str:
    """ "file", "folder", "link" to a folder, or "" of what is none of them."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "link" if _is_link(Path(entry.path)) else "folder"
    except OSError:  # a link to itself
        pass
    return ""


def _is_link(path: Path) -> bool:
    return path.is_symlink() or (hasattr(os.path, "isjunction") and os.path.isjunction(path))  # type: ignore[attr-defined]


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _of_split(path: Path, names: list[Path], split: str | None, tally: Tally) -> Iterator[tuple[Path, Path]]:
    """(name, name without the split) of the files of one split; of all files if there are no splits."""
    depth = next((depth for depth in (0, 1) if _are_splits(names, depth)), None)
    if depth is None:
        if split is not None:
            raise ConfigError(
                f"{path}: there is no split {split!r}, as its folders are classes, not {', '.join(SPLITS)}"
            )
        yield from ((name, name) for name in names)
        return
    there = sorted({name.parts[depth] for name in names if _is_split(name, depth)})
    if split is None or split not in there:
        where = "" if depth == 0 else " in its class folders"
        wrong = "" if split is None else f", not {split!r}{did_you_mean(split, there)}"
        raise ConfigError(
            f"{path} has the splits {listed(there)}{where}{wrong}; choose one, as in --split {there[0]}, or give the folder of one "
            "(rename a folder that is a class)"
        )
    for name in names:
        if _is_split(name, depth) and name.parts[depth] == split:
            yield name, Path(*name.parts[:depth], *name.parts[depth + 1 :])
        else:
            other = name.parts[depth] if _is_split(name, depth) else None
            tally.leave(f"of the split {other}" if other else "of no split", name.as_posix())


def _is_split(name: Path, depth: int) -> bool:
    return len(name.parts) > depth + 1 and name.parts[depth].lower() in SPLITS


def _are_splits(names: list[Path], depth: int) -> bool:
    """Whether the folders at a depth are splits: at least two have such names, or the only one. One class may be called train."""
    there = {name.parts[depth] for name in names if len(name.parts) > depth + 1}
    splits = {part for part in there if part.lower() in SPLITS}
    return len(splits) > 1 or (len(splits) == 1 and splits == there and depth == 0)
