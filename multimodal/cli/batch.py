"""`predict` for whole data: tables, folders, files and shards to a table of answers, JSON lines from standard input to output."""

import csv
import glob
import hashlib
import json
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.cli.arguments import STDIN, choose_task
from multimodal.cli.output import print_json, show
from multimodal.progress import progress_bar
from multimodal.texts import as_json, listed, shortened

if TYPE_CHECKING:
    from multimodal.heads import Prediction
    from multimodal.model import Model
    from multimodal.pattern import Field

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
OWN = "model_"  # before the name of a column of ours that the data have too
AT_ONCE = 1000  # rows of a group of Parquet
TSV = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


@dataclass(frozen=True, kw_only=True)
class Source:
    """The rows of the data.

    about: JSON values that identify them, compared when the work is resumed.
    columns: what a sample may have; None: not known before reading.
    total: the number of rows, exact or nearly so; None: not known.
    select: (fields, files) -> a function that yields, from a row number on, (what is written beside the answer, sample or error).
    shown: the columns that are written beside the answer, if they are known without reading.
    file: the one column that holds files, if the data are files and not a table.
    """

    about: Mapping[str, Any]
    columns: Sequence[str] | None
    total: int | None
    select: Callable[[Mapping[str, str], Sequence[str]], Callable[[int], Iterator[tuple[dict[str, Any], Any]]]]
    shown: Sequence[str] | None = None
    file: str | None = None


def check_out(out: Path | None, data: Sequence[str]) -> None:
    """Refuse an --out that cannot become what is written, before the work.

    Raises:
        ConfigError: another ending, a file that is there, or a library that is not installed.
    """
    from multimodal.shapes import ConfigError

    if list(data) == [STDIN]:
        if out is not None and out.suffix.lower() in ENDINGS:
            raise ConfigError(
                f"--out {out}: answers to standard input go to standard output as they come; write `> answers.jsonl`"
            )
        return
    if out is None:
        return
    if out.suffix.lower() not in ENDINGS:
        raise ConfigError(f"--out {shortened(out)}: answers to data are a table; end its name in {', '.join(ENDINGS)}")
    if os.path.lexists(out) and not _journal(out).is_file():
        raise ConfigError(f"--out {shortened(out)}: it is there already; choose another name, or move it away")
    for folder in out.parents:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--out {shortened(out)}: {folder} is a file, not a folder")
    if out.suffix.lower() == ".parquet":
        _parquet(out)


def predict_data(
    model: "Model",
    data: Sequence[str],
    *,
    checkpoint: Path,
    task: str | None,
    fields: Sequence[str] | None,
    files: Sequence[str] | None,
    given: Mapping[str, Any],
    out: Path | None,
    probabilities: bool,
    batch: int,
) -> int:
    """Answer every row; returns the exit code, 1 where rows have errors.

    given: values of fields that are the same for all rows; None: rows lack this field.

    Raises:
        ConfigError, TaskError: data that cannot be read or do not fit the model.
    """
    from multimodal.heads.classify import class_names
    from multimodal.shapes import ConfigError

    if batch < 1:
        raise ConfigError(f"--batch {batch}: take one sample or more")
    source = _standard_input() if list(data) == [STDIN] else _source(data)
    chosen = {name: column or name for name, _, column in (text.partition("=") for text in fields or [])}
    task, chosen = _task(model, task, source, chosen, given)
    reads = model.packer.patterns[task].reads
    names: list[Any] = []
    if probabilities:
        names = (
            class_names(model.packer.answer_tokenizers[task]) if model.packer.answer_tokenizers[task].classes else []
        )
        if not names:
            raise ConfigError(f"--probabilities: task {task!r} does not choose among classes; leave it out")
    read = source.select(chosen, files or [])

    def rows(start: int) -> Iterator[tuple[dict[str, Any], Any]]:
        for shown, sample in read(start):
            yield shown, _needed(reads, sample, given) if isinstance(sample, Mapping) else sample

    if out is None or list(data) == [STDIN]:
        return _to_stdout(model, task, source, rows, checkpoint, out, batch, live=list(data) == [STDIN])
    settings = {
        "data": source.about,
        "task": task,
        "fields": chosen,
        "files": list(files or []),
        "given": json.loads(as_json({name: repr(value) for name, value in given.items()})),
        "model": _identity(checkpoint),
        "probabilities": probabilities,
    }
    total, wrong, first = _to_table(model, task, source, rows, out, settings, names, batch)
    if wrong:
        print(f"{wrong:,} of {total:,} rows have an error; the first, {first}", file=sys.stderr)
    print(f"rows     {total:,}\nanswers  {out}")
    return 1 if wrong else 0


def _needed(reads: Sequence["Field"], sample: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the task reads of a row, and the values that are the same for all."""
    return {field.name: sample[field.name] for field in reads if field.name in sample} | dict(given)


def _task(
    model: "Model", wanted: str | None, source: Source, chosen: Mapping[str, str], given: Mapping[str, Any]
) -> tuple[str, dict[str, str]]:
    """The task, and {field: column} of what it reads: as typed, or where the data are files, the one field for them.

    Raises:
        TaskError: no task reads these columns, or several do.
    """
    from multimodal.shapes import TaskError

    patterns = {text: p for text, p in model.packer.patterns.items() if not p.pair}
    if wanted is not None:
        wanted = choose_task(model, wanted, [])
        model.packer.check_task(wanted, answers=True)
        patterns = {wanted: patterns[wanted]}
    there = None if source.columns is None and not chosen else {*(chosen or source.columns or ()), *given}
    fitting, mapped = {}, {}
    for text, pattern in patterns.items():
        needs = [field for field in pattern.reads if field.name not in given]
        names = {field.name for field in needs}
        if there is None or names <= there:
            fitting[text] = dict(chosen)
        elif source.file is not None and not chosen and len(needs) == 1 and not needs[0].many:
            mapped[text] = {needs[0].name: source.file}
    fitting = fitting or mapped
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    if fitting:
        raise TaskError(f"several tasks read these data; choose one with --task: {', '.join(map(repr, fitting))}")
    needs = "; ".join(
        f"{text!r} reads {' and '.join(f.name for f in p.reads) or 'nothing'}" for text, p in patterns.items()
    )
    raise TaskError(
        f"the data have {listed(there or ())}, and {needs or 'every task is a pair'}; give columns other names, as in "
        "--fields text=caption, one value for all rows, as in --question 'what is it?', or --without a field"
    )


def _identity(checkpoint: Path) -> dict[str, str]:
    """What tells this model from another."""
    from multimodal.checkpoint import CONFIG, WEIGHTS, folder_of
    from multimodal.files import file_hash

    folder = folder_of(checkpoint)
    return {name: file_hash(folder / name) for name in (CONFIG, WEIGHTS)}


# Sources


def _source(data: Sequence[str]) -> Source:
    """The rows of a folder, a table, shards, a glob or files."""
    from multimodal.data.folders import KINDS
    from multimodal.data.shards import INDEX, Shards
    from multimodal.data.tables import HUB, open_table
    from multimodal.shapes import ConfigError

    name = data[0]
    if STDIN in data:
        raise ConfigError("'-' is standard input, which is read alone; leave the other data out")
    if len(data) == 1 and not name.startswith(HUB):
        if (Path(name) / INDEX).is_file() or "://" in name:
            return _of_shards(Shards(name))
        if not os.path.exists(name) and glob.has_magic(name):
            data = sorted(glob.glob(name, recursive=True))
            if not data:
                raise ConfigError(f"no file has a name like {shortened(name)}")
        tables = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
        suffix = Path(data[0]).suffix.lower()
        if len(data) == 1 and (os.path.isdir(data[0]) or suffix in tables or not os.path.exists(data[0])):
            return _of_table(open_table(data[0]), data[0])
    elif len(data) == 1:
        return _of_table(open_table(name), name)
    if gone := [one for one in data if not os.path.isfile(one)]:
        raise ConfigError(
            f"{shortened(gone[0])} is no file; of several data each is one, and a text of several words wants quotes"
        )
    suffixes = {Path(one).suffix.lower() for one in data}
    field = next((field for field, endings in KINDS.items() if suffixes <= set(endings)), "file")
    digest = hashlib.sha256()
    for one in data:
        digest.update(f"{one}\0{os.path.getsize(one)}\n".encode(errors="surrogateescape"))

    def select(
        fields: Mapping[str, str], files: Sequence[str]
    ) -> Callable[[int], Iterator[tuple[dict[str, Any], Any]]]:
        known = fields or {field: field}
        if wrong := [column for column in known.values() if column not in (field, "file")]:
            raise ConfigError(f"--fields: the data are files, which have no column {wrong[0]!r}; there is {field!r}")
        return lambda start: (({"file": one}, dict.fromkeys(known, Path(one))) for one in data[start:])

    about = {"files": len(data), "sha256 of names and sizes": digest.hexdigest()}
    return Source(about=about, columns=[field], total=len(data), select=select, shown=["file"], file=field)


def _of_table(table: Any, name: str) -> Source:
    """A table; of a folder of files, each row is written with the name of its file."""
    folder = "folder" in table.about
    if folder and (account := table.seen()).left_out:
        print(account, file=sys.stderr)
    labelled = folder and any(row["label"] is not None for row in table.read(0))
    kinds = [column for column in table.columns or () if column != "label"] if folder else []

    def select(
        fields: Mapping[str, str], files: Sequence[str]
    ) -> Callable[[int], Iterator[tuple[dict[str, Any], Any]]]:
        chosen = table.select(fields, files)

        def read(start: int) -> Iterator[tuple[dict[str, Any], Any]]:
            for row, sample in chosen.pairs(start):
                shown: dict[str, Any] = {} if isinstance(row, Exception) else dict(row)
                if folder and shown:
                    path = next(value for column, value in shown.items() if column != "label")
                    shown = {"file": str(path)} | ({"label": shown["label"]} if labelled else {})
                yield shown, sample

        return read

    json_lines = Path(name).suffix.lower() in (".jsonl", ".ndjson")
    shown = ["file", *(["label"] if labelled else [])] if folder else None if json_lines else table.columns
    return Source(
        about=table.about,
        columns=table.columns,
        total=table.total,
        select=select,
        shown=shown,
        file=kinds[0] if len(kinds) == 1 else None,
    )


def _of_shards(shards: Any) -> Source:
    """Shards: each row with its number, texts and values; pictures and sounds are not written beside answers."""
    from multimodal.data.shards import INDEX
    from multimodal.data.sources import samples_or_errors
    from multimodal.shapes import ConfigError

    media = {
        field
        for shard in shards.shards
        for field, kind in shard.columns
        if kind.rpartition(".")[2] not in ("txt", "json")
    }
    kept = [field for field in shards.fields if field not in media]

    def select(
        fields: Mapping[str, str], files: Sequence[str]
    ) -> Callable[[int], Iterator[tuple[dict[str, Any], Any]]]:
        if wrong := [column for column in fields.values() if column not in shards.fields]:
            raise ConfigError(f"--fields: there is no {wrong[0]!r}; there are {listed(shards.fields)}")
        if files:
            raise ConfigError("--files: shards hold their files; leave it out")

        def read(start: int) -> Iterator[tuple[dict[str, Any], Any]]:
            for number, row in enumerate(samples_or_errors(_From(shards, start)), start):
                if isinstance(row, Exception):
                    yield {"row": number}, row
                    continue
                sample = {name: row[column] for name, column in fields.items()} if fields else row
                yield {"row": number} | {field: row[field] for field in kept}, sample

        return read

    digest = hashlib.sha256(repr([(s.name, s.samples, s.bytes, s.sha256, s.table_crc) for s in shards.shards]).encode())
    about = {INDEX: digest.hexdigest()}
    return Source(
        about=about, columns=shards.fields, total=len(shards), select=select, shown=list(dict.fromkeys(["row", *kept]))
    )


@dataclass(frozen=True)
class _From:
    """The samples of a source from number `start` on."""

    samples: Any
    start: int

    def __len__(self) -> int:
        return max(0, len(self.samples) - self.start)

    def __getitem__(self, index: int) -> Any:
        return self.samples[self.start + index]


def _standard_input() -> Source:
    """JSON lines of standard input, each an object of fields."""
    from multimodal.data.tables import json_row
    from multimodal.shapes import ConfigError

    def select(
        fields: Mapping[str, str], files: Sequence[str]
    ) -> Callable[[int], Iterator[tuple[dict[str, Any], Any]]]:
        if files:
            raise ConfigError(
                "--files: in JSON lines a text that a picture or sound is read from is its path; leave it out"
            )

        def read(start: int) -> Iterator[tuple[dict[str, Any], Any]]:
            number = 0
            for line in _lines():
                if line is None:  # nothing is waiting, so that those before are answered now
                    yield {}, None
                    continue
                number += 1
                if line.strip():
                    row = json_row(line, number)
                    shown = {} if isinstance(row, Exception) else row
                    yield shown, {name: shown.get(c) for name, c in fields.items()} if fields and shown else row

        return read

    return Source(about={}, columns=None, total=None, select=select)


def _lines() -> Iterator[str | None]:
    """The lines of standard input; None wherever no whole line waits to be read."""
    from multimodal.shapes import ConfigError

    if sys.stdin is None:
        raise ConfigError("standard input is closed; send JSON lines to it")
    try:
        handle = sys.stdin.fileno()
    except (OSError, ValueError):  # no file, but something in its place
        for line in sys.stdin:
            yield line
            yield None
        return
    parts: list[bytes] = []  # of a line that has not ended
    waits = os.name != "nt"  # Windows cannot ask whether a pipe has more
    while True:
        if not waits or not select.select([handle], [], [], 0)[0]:
            yield None
        block = os.read(handle, 2**16)
        first, *others = block.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts).decode("utf-8", "surrogateescape")
            parts = [other]
        if not block:
            yield b"".join(parts).decode("utf-8", "surrogateescape")
            return


# Answers


def _to_stdout(
    model: "Model",
    task: str,
    source: Source,
    rows: Callable[[int], Iterator[tuple[dict[str, Any], Any]]],
    checkpoint: Path,
    out: Path | None,
    batch: int,
    *,
    live: bool,
) -> int:
    """Print a line of JSON for each row, in order; those of standard input as soon as no other row waits."""
    from multimodal.model import WINDOW

    name, tokenizer = model.packer.patterns[task].answer, model.packer.answer_tokenizers[task]
    wrong = done = 0
    with progress_bar("predicting", source.total, quiet=sys.stdout.isatty() or live) as bar:
        for part in _parts(rows(0), WINDOW * batch):
            answers = model.predict_each(task, [sample for _, sample in part], batch=batch, errors="yield", first=done)
            for (shown, _), answer in zip(part, answers, strict=True):
                own = {column: _plain(value) for column, value in shown.items()}
                if isinstance(answer, Exception):
                    print_json({"task": task, "sample": own, "error": str(answer)})
                    wrong += 1
                else:
                    show(task, answer, True, name=name, out=out, home=checkpoint, tokenizer=tokenizer, sample=own)
                done += 1
                bar.advance()
            sys.stdout.flush()
    if wrong:
        print(f"{wrong:,} of {done:,} rows have an error", file=sys.stderr)
    return 1 if wrong else 0


def _parts(rows: Iterable[tuple[dict[str, Any], Any]], size: int) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Lists of at most `size` rows; one ends where a row is None."""
    part: list[tuple[dict[str, Any], Any]] = []
    for row in rows:
        if row[1] is not None:
            part.append(row)
        if part and (row[1] is None or len(part) == size):
            yield part
            part = []
    if part:
        yield part


def _journal(out: Path) -> Path:
    """The file of the answers so far: a line of JSON with the settings, then one for each row."""
    return out.with_name(out.name + ".part")


def _to_table(
    model: "Model",
    task: str,
    source: Source,
    rows: Callable[[int], Iterator[tuple[dict[str, Any], Any]]],
    out: Path,
    settings: Mapping[str, Any],
    names: Sequence[Any],
    batch: int,
) -> tuple[int, int, str]:
    """Write the table; returns the number of rows, that of rows with an error, and the first error.

    Answers go to a journal, row after row, and the table is made of it at the end. Where a journal is there, it is continued.
    """
    from multimodal.model import WINDOW

    out.parent.mkdir(parents=True, exist_ok=True)
    name, tokenizer = model.packer.patterns[task].answer, model.packer.answer_tokenizers[task]
    folder = out.with_name(f"{out.stem}_files")
    writes = model.packer.heads[task].autoregressive
    with _opened(_journal(out), out, folder, settings) as (journal, done):
        # a window is answered as a whole, so that its answers are those of a run that was not stopped
        start = done // (WINDOW * batch) * (WINDOW * batch)
        if done:
            print(f"{done:,} rows are answered already; going on", file=sys.stderr)
        samples = (sample for _, sample in rows(start))
        answers = model.predict_each(task, samples, batch=batch, errors="yield", first=start)
        with progress_bar("predicting", source.total, start=done) as bar:
            for number, answer in enumerate(answers, start):
                if number < done:
                    continue
                entry = _entry(answer, number, tokenizer, folder, name, names, writes)
                journal.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
                journal.flush()
                bar.update(number + 1)
        journal.flush()
        os.fsync(journal.fileno())
        return _finish(_journal(out), out, source, rows, names, writes)


@contextmanager
def _opened(journal: Path, out: Path, folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[Any, int]]:
    """A journal behind its last whole row, and the number of rows; new, or of an earlier call with the same settings.

    Raises:
        ConfigError: it is of other data, another model or task, or another process writes it, or files would be mixed.
    """
    from multimodal.files import lock
    from multimodal.shapes import ConfigError

    header = json.dumps(settings).encode() + b"\n"
    fresh = not journal.exists()
    if fresh and folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"--out {out}: files of answers would go to {folder}, which is not empty; choose another name"
        )
    try:
        held = lock(journal, patience_s=0)
    except BlockingIOError:
        raise ConfigError(f"--out {out}: another process is writing it (it holds {journal})") from None
    try:
        with journal.open("r+b") as file:
            first = file.readline()
            if not first.endswith(b"\n"):  # new, or killed within its first line
                file.seek(0)
                file.truncate()
                file.write(header)
                first = header
            if first != header:
                raise ConfigError(
                    f"{journal} has the first answers of other data, fields or options, or of another model; give the same as "
                    "then, or remove it to begin anew"
                )
            done, end = 0, len(first)
            for line in file:
                if not line.endswith(b"\n") or _read_entry(line) is None:
                    break
                done, end = done + 1, end + len(line)
            file.seek(end)
            file.truncate()
            yield file, done
    finally:
        held.close()


def _read_entry(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:  # a power cut leaves zeros
        return None
    return found if isinstance(found, dict) else None


def _entry(
    answer: "Prediction | Exception",
    number: int,
    tokenizer: Any,
    folder: Path,
    name: str,
    names: Sequence[Any],
    writes: bool,
) -> dict[str, Any]:
    """What the journal has of a row. An answer that is a picture, sound or array is written to a file."""
    from multimodal.value_files import file_of

    if not isinstance(answer, Exception):
        try:
            file = file_of(tokenizer, answer.value, arrays=True)
        except ValueError as error:  # a kind's own format that cannot hold this value
            answer, file = error, None
        else:
            entry: dict[str, Any] = {
                "confidence": answer.confidence if answer.confidence == answer.confidence else None
            }
            entry |= {"complete": answer.complete} if writes else {}
            if names:
                entry["probability"] = [answer.probability[one] for one in names]
            if file is None:
                return {"answer": json.loads(as_json(_plain(answer.value)))} | entry
            folder.mkdir(exist_ok=True)
            path = folder / f"{name}-{number:06d}{file[0]}"
            path.write_bytes(file[1])
            return {"answer": f"{folder.name}/{path.name}"} | entry
    return {"error": f"{type(answer).__name__}: {answer}" if isinstance(answer, OSError) else str(answer)}


# The table


def _finish(
    journal: Path,
    out: Path,
    source: Source,
    rows: Callable[[int], Iterator[tuple[dict[str, Any], Any]]],
    names: Sequence[Any],
    writes: bool,
) -> tuple[int, int, str]:
    """Make the table of the journal and the data, put it in place, and remove the journal."""
    from multimodal.files import file_hash, flush, part_path
    from multimodal.shapes import ConfigError

    total = wrong = 0
    first_error = ""
    own = (
        list(source.shown)
        if source.shown is not None
        else list(dict.fromkeys(chain.from_iterable(r for r, _ in rows(0))))
    )
    ours = _columns(own, names, writes)

    def entries() -> Iterator[dict[str, Any]]:
        with journal.open("rb") as file:
            next(file)
            for line in file:
                yield json.loads(line)

    def table() -> Iterator[dict[str, Any]]:
        try:
            for (shown, _), entry in zip(rows(0), entries(), strict=True):
                found = dict.fromkeys(ours.values()) | {ours["answer"]: entry.get("answer")}
                found |= {ours[key]: entry[key] for key in ("confidence", "complete", "error") if key in entry}
                found |= {
                    ours[name]: p for name, p in zip(map(_class, names), entry.get("probability", ()), strict=False)
                }
                yield shown | found
        except ValueError as error:
            if "zip()" not in str(error):
                raise
            raise ConfigError(
                f"the data have changed while they were answered; remove {journal} and begin anew"
            ) from None

    for entry in entries():
        if "error" in entry:
            first_error = first_error or f"row {total}: {entry['error']}"
            wrong += 1
        total += 1
    part = part_path(out.parent, f"table of {out.name}")
    try:
        ending = out.suffix.lower()
        columns = [*own, *ours.values()]
        if ending == ".parquet":
            _write_parquet(part, table, columns, ours)
        else:
            with part.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                _write_text(file, ending, table(), columns)
        flush(part)
        if os.path.lexists(out) and (not out.is_file() or file_hash(out) != file_hash(part)):
            raise ConfigError(
                f"{out} is there by now, and is not what would be written; move it away and run this again"
            )
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    flush(out.parent)
    journal.unlink()
    return total, wrong, first_error


def _class(name: Any) -> str:
    """The key of a class's column."""
    return f"p({name})"


def _columns(own: Sequence[str], names: Sequence[Any], writes: bool) -> dict[str, str]:
    """{key: the name of our column}, which has "model_" before it where the data have a column of the key."""
    keys = ["answer", "confidence", *(["complete"] if writes else []), *map(_class, names), "error"]
    taken, found = set(own), {}
    for key in keys:
        name = key
        while name in taken:
            name = OWN + name
        taken.add(name)
        found[key] = name
    return found


def _write_text(file: Any, ending: str, table: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """CSV by RFC 4180; TSV with \\t, \\n, \\r and \\\\ for a tab, line ends and a backslash; or JSON lines."""
    if ending == ".jsonl":
        for row in table:
            file.write(as_json({column: _plain(value) for column, value in row.items()}) + "\n")
        return
    # lines end in \n; every cell that holds a \r is quoted only where the writer takes it for a line end too
    writer = csv.writer(file, lineterminator="\n")

    def write(cells: Sequence[str]) -> None:
        if ending == ".tsv":
            file.write("\t".join(cell.translate(TSV) for cell in cells) + "\n")
        elif any("\r" in cell for cell in cells):
            file.write(",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n")
        else:
            writer.writerow(cells)

    write(columns)
    for row in table:
        write([_cell(row.get(column)) for column in columns])


def _cell(value: Any) -> str:
    """A value as the text of a cell."""
    value = _plain(value)
    if value is None:
        return ""
    return value if isinstance(value, str) else as_json(value)


def _plain(value: Any) -> Any:
    """A value without bytes, which JSON cannot hold: their file's name if they have one, else their number."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{len(value):,} bytes>"
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"}:  # as data sets of Hugging Face have pictures and sounds
            return value["path"] or _plain(value["bytes"])
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def _parquet(out: Path) -> Any:
    from multimodal.shapes import ConfigError

    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"--out {out} is written by pyarrow; install it: pip install 'multimodal-stream[data]'"
        ) from None
    return pyarrow


def _write_parquet(
    path: Path, table: Callable[[], Iterator[dict[str, Any]]], columns: Sequence[str], ours: Mapping[str, str]
) -> None:
    """Parquet with the type of each column's values; a column whose values have no common type is text."""
    arrow = _parquet(path)
    fixed = {name: arrow.float64() for key, name in ours.items() if key not in ("answer", "complete", "error")}
    fixed |= {ours[key]: kind for key, kind in (("complete", arrow.bool_()), ("error", arrow.string())) if key in ours}
    types: dict[str, Any] = dict(fixed)
    texts: set[str] = set()

    def values(part: Sequence[Mapping[str, Any]], column: str) -> list[Any]:
        found = [_unescaped(row.get(column)) for row in part]
        return [None if value is None else _cell(value) for value in found] if column in texts else found

    for part in _groups(table()):
        for column in columns:
            if column in fixed or column in texts:
                continue
            try:
                kind = arrow.array(values(part, column)).type
                before = types.get(column, kind)
                schemas = [arrow.schema([("x", one)]) for one in (before, kind)]
                types[column] = arrow.unify_schemas(schemas, promote_options="permissive").field("x").type
            except (arrow.ArrowException, ValueError, TypeError, OverflowError):
                texts.add(column)
                types[column] = arrow.string()
    empty = arrow.null()
    schema = arrow.schema([(c, arrow.string() if types.get(c, empty) == empty else types[c]) for c in columns])
    with arrow.parquet.ParquetWriter(path, schema) as writer:
        for part in _groups(table()):
            arrays = [arrow.array(values(part, column), schema.field(column).type) for column in columns]
            writer.write_table(arrow.table(arrays, schema=schema))


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while part := list(islice(rows, AT_ONCE)):
        yield part


def _unescaped(value: Any) -> Any:
    """Texts as Arrow can hold them: bytes of file names that are no UTF-8 are written as \\udc80."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
