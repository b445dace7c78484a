"""Checks a tokenizer on real values: every file of a folder, or every row of a table. It says which ones fail, and why."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multimodal.check import TOKENIZER_CHECKS, check_tokenizer
from multimodal.check.cases import TokenizerCase, contents
from multimodal.check.report import FAILED, BoundCheck, Report
from multimodal.data.codecs import values_in
from multimodal.data.folders import entries_below, is_hidden
from multimodal.data.tables import open_table
from multimodal.shapes import ConfigError, MediaError, did_you_mean
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, Tokens

EACH = (
    *("gives_tokens", "input_untouched", "deterministic", "one_place_a_token", "content_as_declared", "finite"),
    *("memory_own", "text_as_declared", "places_differ", "time_from_zero", "places_in_reach", "decode_gives_value"),
)
"""The checks that every value is put to; the others are put to a few of the values."""
CHOSEN = 4  # values that all checks are put to
SHOWN = 20  # values that fail and are listed
Named = tuple[str, Any]  # the name of a file or row, and its value, or the error of reading it


@dataclass
class Values:
    """Real values for a tokenizer.

    names: of the files or rows.
    read: the value of a file or row, by its index; raises MediaError.
    """

    names: list[str]
    read: Callable[[int], Any]


@dataclass
class FolderReport:
    """What came of the checks on real values; prints as a list of those that fail, and the table of the checks.

    count: number of values. failed: (name, check, why) of those that fail; "encode" where a value cannot be read or encoded.
    report: of all checks, on a few values; None: fewer than two values can be encoded.
    """

    source: str
    count: int
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    report: Report | None = None

    @property
    def passed(self) -> bool:
        """Whether every value passes its checks, and the tokenizer all of them."""
        return not self.failed and self.report is not None and not self.report.failed

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for name, _, _ in self.failed))
        lines = [f"{self.source}: {self.count} values, {self.count - len(names)} pass"]
        lines += [f"  FAILED   {name}: {check}: {why}" for name, check, why in self.failed[:SHOWN]]
        if more := len(self.failed) - SHOWN:
            lines += [f"  and {more} more"] if more > 0 else []
        if self.report is None:
            return "\n".join([*lines, "fewer than two values can be encoded, which the other checks need"])
        return "\n".join([*lines, "", str(self.report)])


def values_of(tokenizer: Tokenizer, source: str, column: str | None = None) -> Values:
    """The files of a folder as values, or the rows of a table.

    A file's value is what it holds, if it is .json, .npy or .txt and the tokenizer takes that, else its path. column: of a table;
    None: its only one, or the whole row as a mapping.

    Raises:
        ConfigError: no such folder or table, nothing in it, or a column that is not there.
    """
    path = Path(source)
    if os.path.isdir(source):  # False also for what cannot be a file name
        if column is not None:
            raise ConfigError(f"--column {column}: {source} is a folder, whose files are the values; leave it out")
        files = sorted(
            name for name, reason in entries_below(path) if reason is None and not any(map(is_hidden, name.parts))
        )
        if not files:
            raise ConfigError(f"{source} holds no files")
        return Values([name.as_posix() for name in files], lambda i: _value_of(tokenizer, path / files[i]))
    rows = list(open_table(source).rows(0))
    if not rows:
        raise ConfigError(f"{source} holds no rows")
    known = list(dict.fromkeys(key for row in rows if not isinstance(row, Exception) for key in row))
    if column is not None and column not in known:
        raise ConfigError(f"--column {column}: {source} has {', '.join(known)}{did_you_mean(column, known)}")
    only = column or (known[0] if len(known) == 1 else None)

    def read(i: int) -> Any:
        row = rows[i]
        if isinstance(row, Exception):
            raise MediaError(str(row))
        value = row if only is None else row.get(only)
        if value is None:
            raise MediaError(f"it has no {only}")
        return value

    return Values([f"row {i + 1}" for i in range(len(rows))], read)


def _value_of(tokenizer: Tokenizer, path: Path) -> Any:
    """What a file holds, or its path, whichever the tokenizer takes."""
    first: ValueError | None = None
    for value in (*values_in(path), str(path)):
        try:
            tokenizer(value)
        except ValueError as error:
            first = first or error
        else:
            return value
    raise MediaError(str(first))


def check_values(
    tokenizer: Tokenizer,
    source: str,
    column: str | None = None,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> FolderReport:
    """Check a tokenizer on the files of a folder or the rows of a table (see `values_of`).

    progress: called after each value with the number of those done, of all, and the name.
    """
    values = values_of(tokenizer, source, column)
    found = FolderReport(source, len(values.names))
    seen: dict[bytes, Named] = {}
    chosen: list[Named] = []
    for i, name in enumerate(values.names):
        found.failed += [(name, check, why) for check, why in _each(tokenizer, values, i, seen, chosen)]
        if progress is not None:
            progress(i + 1, found.count, name)
    if len(chosen) > 1:
        found.report = check_tokenizer(tokenizer, [value for _, value in chosen], raises=False)
        found.report.who += f" on {', '.join(name for name, _ in chosen)}"
    return found


def _each(
    tokenizer: Tokenizer, values: Values, i: int, seen: dict[bytes, Named], chosen: list[Named]
) -> Iterator[tuple[str, str]]:
    """(check, why) of the checks that a value fails. seen: by a digest of tokens, the first value that has them."""
    name = values.names[i]
    try:
        value = values.read(i)
        tokens = tokenizer(value)
    except ValueError as error:
        yield "encode", shortened(str(error), 300)
        return
    case = TokenizerCase(tokenizer, [value])
    fine = True
    for check in TOKENIZER_CHECKS:
        if check.name in EACH and fine:
            result = BoundCheck(check, case).result()
            if result.status == FAILED:
                fine = fine and not check.basic  # what follows would be a symptom
                yield result.name, shortened(result.detail, 300)
    key = _digest(tokens)
    if key in seen and not (tokenizer.lossy or tokenizer.classes) and _contents(value) != seen[key][1]:
        yield "values_differ", f"it has the tokens of {seen[key][0]}, which holds something else"
    if key not in seen and len(chosen) < CHOSEN:
        chosen.append((name, value))
    seen.setdefault(key, (name, _contents(value)))


def _digest(tokens: Tokens) -> bytes:
    made = hashlib.sha256(repr(tuple(tokens.content.shape)).encode())
    for x in (tokens.content, tokens.position_NA):
        made.update(x.contiguous().numpy().tobytes())
    return made.digest()


def _contents(value: Any) -> bytes:
    """A digest of what a value holds; of a path, of what its file holds."""
    try:
        if isinstance(value, str) and Path(value).is_file():
            return hashlib.sha256(Path(value).read_bytes()).digest()
        return hashlib.sha256(repr(contents(value)).encode()).digest()
    except Exception:  # what cannot be compared counts as the same
        return b""
