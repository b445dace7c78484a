"""Standard output, terminal width and error messages of a command."""

import io
import os
import re
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from multimodal.texts import shortened

if TYPE_CHECKING:
    from cyclopts import CycloptsError

NARROWEST = 20  # columns; with fewer, rich has no room for a letter and wraps tables and help for ever
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in the RuntimeErrors of PyTorch


@contextmanager
def prepared() -> Iterator[None]:
    """Makes standard output accept every character, and the terminal wide enough for help; restores both.

    Raises:
        OSError: standard output is closed. The next opened file would get its descriptor, and print would write into it.
    """
    if sys.stderr is None:  # closed; print(file=None) would write to standard output
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
    if sys.stdout is None or sys.stdout.closed:
        raise OSError("standard output is closed, so nothing can be shown; send it to a file or to /dev/null")
    columns, errors = os.environ.get("COLUMNS"), getattr(sys.stdout, "errors", None)
    if _columns() < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    # "█" in ASCII, or a file name that is no UTF-8: shown as \u2588 instead of an error
    _set_errors("backslashreplace")
    try:
        yield
    finally:
        _set_errors(errors)
        if columns is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = columns


def _columns() -> int:
    """The width that rich uses: COLUMNS, else that of the terminal."""
    if (given := os.environ.get("COLUMNS", "")).isdigit():
        return int(given)
    for number in (2, 1, 0):
        with suppress(OSError):
            return os.get_terminal_size(number).columns or 80
    return 80


def _set_errors(errors: str | None) -> None:
    if errors is not None and isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError, ValueError):  # flushing the buffered text may fail
            sys.stdout.reconfigure(errors=errors)


def say(message: str) -> None:
    """Print one message on standard error; ignore it if nobody reads it."""
    from multimodal.cli.output import printable

    with suppress(OSError, ValueError):
        print(f"multimodal: {printable(message)}", file=sys.stderr, flush=True)


def output_error() -> OSError | None:
    """The error of writing standard output, or None. After an error it is replaced by /dev/null, since Python flushes at exit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return error
    return None


def message_of(error: Exception) -> str | None:
    """The message of an error that the user can repair; None for a bug of ours."""
    from cyclopts import CycloptsError

    if isinstance(error, CycloptsError):
        return _message_of_parser(error)
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{shortened(os.fsdecode(error.filename), 100)}: "
        return place + (error.strerror or str(error) or type(error).__name__)
    from multimodal import check, shapes  # imported late, because it imports PyTorch

    ours = (shapes.ShapeError, shapes.ConfigError, shapes.MediaError, shapes.StreamError, shapes.CheckpointError)
    if isinstance(error, (FloatingPointError, check.ConformanceError, *ours)):
        return str(error)
    message = str(error).lower()
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in message for text in OUT_OF_MEMORY)
    ):
        size = next((f" ({part.strip()})" for part in str(error).split(".") if "bytes" in part or "iB" in part), "")
        return f"out of memory{size}; take a smaller model, fewer tokens at once, or shorter samples"
    if (place := _line_of_user(error)) is not None:
        return f"{place}: {type(error).__name__}: {error} (--debug shows the traceback)"
    return None


def _message_of_parser(error: "CycloptsError") -> str:
    """The message of the argument parser, with a repair where it names none."""
    from cyclopts import MissingArgumentError, UnknownCommandError, UnusedCliTokensError

    if isinstance(error, UnknownCommandError) and error.app is not None:
        # cyclopts lists no more than eight
        listed = ", ".join(name for name in error.app if not name.startswith("-"))
        return f"{str(error).partition(' Available commands:')[0]} There are {listed}"
    if isinstance(error, UnusedCliTokensError):
        words = [shortened(word, 100) for word in error.unused_tokens or []]
        more = f" and {len(words) - 3} more" if len(words) > 3 else ""
        listed = ", ".join(map(repr, words[:3]))
        return f"{listed}{more}: not a value of any option; write --NAME VALUE, and a text with blanks in quotes"
    hint = ""
    if isinstance(error, MissingArgumentError) and (name := re.search(r"parameter (--\S+)", str(error))):
        hint = f" A value that begins like an option is written {name[1]}=VALUE."
    return f"{error}{hint}"


def _line_of_user(error: Exception) -> str | None:
    """'file, line n' of the innermost user code in a traceback (a recipe, tokenizer or data set); None if there is none."""
    from multimodal import tokenizer

    libraries = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
    libraries += [Path(tokenizer.__file__).resolve().parent, *map(Path, _packages("multimodal_tokenizers"))]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_file() and not any(file.resolve().is_relative_to(folder) for folder in libraries):
            return f"{file.name}, line {frame.lineno}"
    return None


def _packages(name: str) -> Sequence[str]:
    return [os.path.realpath(path) for path in getattr(sys.modules.get(name), "__path__", ())]


def report_bug(error: Exception) -> None:
    """Report a bug in one line and save the traceback in a file, because a long training run cannot be repeated at once."""
    from multimodal.versions import package_version

    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="multimodal-bug-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"multimodal {package_version()}, Python {sys.version}\n{trace}")
    except OSError:
        say(f"this is a bug: {type(error).__name__}: {error}\n{trace}")
    else:
        say(f"this is a bug: {type(error).__name__}: {error}. Where it came from is in {file.name}: please report it")
