"""Output of the commands: answers as text, JSON or files that other programs open, and progress bars."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.texts import as_json

if TYPE_CHECKING:
    from multimodal.heads import Prediction
    from multimodal.tokenizer import Tokenizer

_CONTROLS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421}
_CONTROLS |= dict.fromkeys(range(128, 160), 0xFFFD)


def print_json(value: Any, indent: int | None = None) -> None:
    """Print a value as JSON; characters that standard output cannot encode are escaped."""
    text = as_json(value, indent)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(json.loads(text), indent=indent)
    print(text)


def show(
    task: str,
    answer: "Prediction",
    as_json: bool,
    *,
    name: str,
    out: Path | None,
    home: Path | None = None,
    heading: str = "",
    sample: Mapping[str, str] | None = None,
    tokenizer: "Tokenizer | None" = None,
    **entries: Any,
) -> None:
    """Print an answer. A picture, a sound or (but for JSON) an array is written to a file called `name` and its path printed;
    anything else only where a folder `out` is given. home: the checkpoint, which files go to unless `out` is given.

    heading: a line above the answer. sample: the typed values of this sample. tokenizer: of the written kind, which may have
    a format of its own. entries: more entries of the JSON.
    """
    # texts and numbers are read in the terminal; pictures and sounds only from files
    folder = folder_for(out, home or Path())
    if as_json:
        entries = {"sample": dict(sample), **entries} if sample else entries
        print_json({"task": task, **entries, **_entries(answer, tokenizer, name, folder, texts=out is not None)})
        return
    from multimodal.value_files import file_of

    file = file_of(tokenizer, answer.value, texts=out is not None, arrays=True)
    if heading and (file is None or sample):
        print(printable(heading))
    if file is not None:
        print(saved(*file, name, folder))
        return
    _print(answer)
    if out is not None:
        what = type(answer.value).__name__
        print(f"(--out {out}: {what} is shown only; no file can hold it)", file=sys.stderr)


def _entries(
    answer: "Prediction", tokenizer: "Tokenizer | None", name: str, folder: Path, *, texts: bool
) -> dict[str, Any]:
    from multimodal.value_files import file_of

    value = answer.value
    file = file_of(tokenizer, value, texts=texts)
    entries: dict[str, Any] = {}
    if file is None or file[0] in (".txt", ".json"):
        entries["answer"] = value
    if file is not None:
        entries["file"] = str(saved(*file, name, folder))
    entries |= {"confidence": answer.confidence, "complete": answer.complete}
    if answer.tokens is not None:
        entries |= {"ended": answer.ended, "tokens": len(answer.tokens)}
    if answer.others:
        entries["others"] = [_entries(other, tokenizer, name, folder, texts=texts) for other in answer.others]
    return entries | {"probability": {str(c): p for c, p in answer.probability.items()}}


def _print(answer: "Prediction", most: int = 5) -> None:
    """The answer; where there are classes, the likeliest with their probabilities as bars."""
    text = as_json(answer.value) if isinstance(answer.value, (list, dict)) else str(answer.value)
    print(printable(text) if sys.stdout.isatty() else text)
    top = [(printable(str(name)) if sys.stdout.isatty() else str(name), p) for name, p in answer.probability.items()][
        :most
    ]
    width = max((len(name) for name, _ in top), default=0)
    for name, p in top:
        print(f"  {name:<{width}}  {'█' * round(24 * p):<24} {100 * p:5.1f} %")
    if more := len(answer.probability) - len(top):
        print(f"  and {more} more")


def printable(text: str) -> str:
    """Text for a terminal: control characters (colours, cursor, window title) are shown as symbols, so that they have no effect."""
    return text.translate(_CONTROLS)


def folder_for(out: Path | None, checkpoint: Path) -> Path:
    """The folder for written files: `out`, else the run folder of the checkpoint, else the checkpoint itself; the current folder
    for a checkpoint on the hub."""
    if out is not None:
        return out
    from multimodal.hub import hub_name
    from multimodal.train.run_folder import MODEL, is_run

    if hub_name(checkpoint) is not None:
        return Path()
    around = checkpoint.resolve().parent
    return checkpoint.parent if checkpoint.name == MODEL and is_run(around) else checkpoint


def check_folder(out: Path | None, option: str = "--out") -> None:
    """Refuse a folder that cannot be made, before the work and not after it.

    Raises:
        ConfigError: this is not a folder, and cannot become one.
    """
    from multimodal.shapes import ConfigError

    for path in () if out is None else (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{option} {out}: {path} is a file, not a folder")


def saved(ending: str, data: bytes, name: str, folder: Path) -> Path:
    """Where it was written: NAME.png, or the first unused one of NAME-2.png, NAME-3.png, ...

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _written(ending, data, name, folder)
    except OSError as error:
        from multimodal.shapes import ConfigError

        raise ConfigError(
            f"{name}{ending} cannot be written into {folder} ({error}); name a folder with --out"
        ) from error


def _written(ending: str, data: bytes, name: str, folder: Path) -> Path:
    number = 1
    while True:
        path = folder / (f"{name}{ending}" if number == 1 else f"{name}-{number}{ending}")
        try:
            file = path.open("xb")  # fails if the file exists, even if another process has just made it
        except FileExistsError:
            number += 1
            continue
        try:
            with file:
                file.write(data)
        except OSError:
            path.unlink(missing_ok=True)  # a disk that is full
            raise
        return path
