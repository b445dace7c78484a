"""Commands that examine: `check` a tokenizer, `verify` a model, `look` at its attention, `bench` the speed."""

import io
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from multimodal.cli.arguments import (
    Columns,
    DataFiles,
    Device,
    Fields,
    Json,
    Out,
    Plugins,
    Without,
    choose_task,
    samples_from,
    samples_with,
    value_from,
)
from multimodal.cli.loading import load, make_tokenizer, samples_of
from multimodal.cli.output import check_folder, folder_for, print_json, printable, saved

if TYPE_CHECKING:
    from multimodal.model import Model
    from multimodal.tokenizer import Tokenizer

MOST = 10_000  # rounds and threads of `bench`
MOST_ROWS = 20_000  # of the data of `look --mixture`, which are read before some are chosen


def check(
    tokenizer: str,
    /,
    *,
    config: str = "{}",
    value: Annotated[list[str] | None, Parameter(negative="")] = None,
    values: str | None = None,
    column: str | None = None,
    kinds: Annotated[list[str] | None, Parameter(name="--kind", negative="")] = None,
) -> int:
    """Check by name that a tokenizer keeps every promise of the contract. Exit code 1: it does not.

    Example: multimodal check my_package:MyTokenizer

    Example: multimodal check sensor.py:Sensor --config '{"rate_hz": 100}' --value walk.npy --value run.npy

    Example: multimodal check notes.py:Notes --values melodies/

    Example: multimodal check talk.py:Talk --kind text=multimodal_tokenizers:TextBytes --values talks.jsonl

    Parameters
    ----------
    tokenizer
        module:Class or path/to/file.py:Class.
    config
        The tokenizer's settings, as JSON.
    value
        A value it can encode: a file, a text, or JSON; give two or more. Without any, the class's examples() or plausible
        pictures, sounds, texts and numbers are tried.
    values
        Real values: a folder, each file of which is one, or the rows of a .csv, .tsv, .jsonl or .parquet file. Says which fail.
    column
        Of a table of --values: the column that holds the values; its only one or the whole row unless given.
    kinds
        A kind that parts of a composite name, as NAME=module:Class. Repeat it for more.
    """
    from multimodal.check import check_tokenizer, plausible_values
    from multimodal.shapes import ConfigError

    made = _bound(make_tokenizer(tokenizer, config), kinds or [])
    if values is not None:
        if value:
            raise ConfigError(f"check: --value {value[0]} and --values {values}: give one of them")
        return _check_values(made, values, column)
    if column is not None:
        raise ConfigError(f"--column {column}: it is a column of the table that --values names; give that too")
    given = [value_from(made, text, "--value") for text in value or []] or plausible_values(made)
    if len(given) < 2:
        raise ConfigError(
            f"{type(made).__name__} accepted {len(given)} of the pictures, sounds, texts and numbers that were tried, and two are "
            "needed. Give values (--value a.npy --value b.npy), or write `examples()`, a classmethod that returns a few"
        )
    report = check_tokenizer(made, given, raises=False)
    print(report)
    return 1 if report.failed else 0


def _bound(made: "Tokenizer", kinds: list[str]) -> "Tokenizer":
    """The tokenizer, whose parts may name these kinds if it is a composite."""
    from multimodal.composite import Composite
    from multimodal.shapes import ConfigError

    named = {}
    for text in kinds:
        name, equals, tokenizer = text.partition("=")
        if not equals:
            raise ConfigError(f"--kind {text}: wanted NAME=module:Class, such as text=multimodal_tokenizers:TextBytes")
        named[name] = make_tokenizer(tokenizer, "{}")
    if isinstance(made, Composite):
        try:
            return made.bind(named)
        except ConfigError as error:
            hint = "; give it, as --kind text=multimodal_tokenizers:TextBytes" if "names the kind" in str(error) else ""
            raise ConfigError(f"{error}{hint}") from None
    if kinds:
        raise ConfigError(f"--kind {kinds[0]}: {type(made).__name__} has no parts that could name a kind")
    return made


def _check_values(made: "Tokenizer", source: str, column: str | None) -> int:
    from multimodal.check.folder import check_values
    from multimodal.progress import progress_bar

    with progress_bar("checking values", None) as bar:
        report = check_values(
            made, source, column, progress=lambda done, total, name: bar.update(done, name, total=total)
        )
    print(printable(str(report)))
    return 0 if report.passed else 1


def verify(
    checkpoint: Path,
    /,
    *,
    as_json: Json = False,
    plugin: Plugins = None,
    device: Device = "auto",
    **fields: Fields,
) -> int:
    """Show that single = batch = packed = cached holds for this model. Exit code 1: it does not.

    Fields that are not given are invented, which a note says.

    Example: multimodal verify runs/digits --image seven.png

    Parameters
    ----------
    checkpoint
        A run folder, the model folder in it, or a name on the hub: OWNER/MODEL, or OWNER/MODEL@REVISION.
    """
    from multimodal.check import verify as verify_model

    model = load(checkpoint, plugin, device)
    result = verify_model(model, samples_with(model, fields))
    if as_json:
        rows = [{**vars(row), "passed": row.passed} for row in result.rows]
        print_json({"passed": result.passed, "rows": rows, "notes": result.notes}, indent=2)
    else:
        print(result)
    return 0 if result.passed else 1


def look(
    checkpoint: Path,
    /,
    *,
    task: str | None = None,
    answer: str | None = None,
    inside: str | None = None,
    mixture: str | None = None,
    samples: Annotated[
        int, Parameter(help="Of --mixture: the most samples, spread evenly over its first 20,000 rows.")
    ] = 400,
    alpha: Annotated[
        float, Parameter(help="Of --mixture: the share of usual inputs that may be called unusual.")
    ] = 0.05,
    fields_of_data: Annotated[Columns, Parameter(name="--fields")] = None,
    files: DataFiles = None,
    without: Without = None,
    as_json: Json = False,
    out: Out = None,
    plugin: Plugins = None,
    device: Device = "auto",
    **fields: Fields,
) -> int:
    """Show what every attention head does while the model answers one sample: a picture, a page for a browser, a table.

    Example: multimodal look runs/digits --image seven.png --out looks

    Example: multimodal look runs/captions --inside image --image cat.png

    Example: multimodal look runs/digits --image seven.png --mixture digits/train

    Parameters
    ----------
    checkpoint
        A run folder, the model folder in it, or a name on the hub: OWNER/MODEL, or OWNER/MODEL@REVISION.
    task
        Which task, such as "image -> label"; needed only where several read the same fields.
    answer
        Of a task that writes: look while this is written, instead of the model's own answer.
    inside
        A kind that a tower reads: look at the heads of the tower, which reads that kind alone.
    mixture
        Known samples, such as those that were trained on: a folder of pictures or sounds, a .csv, .tsv, .jsonl or .parquet file,
        hf:NAME, or a folder of shards. Shows each head as a mixture: its largest responsibilities, whether its evidence is
        unusual beside these samples, and which slots of a memory could be dropped.
    """
    from multimodal.look import inside as tower_of
    from multimodal.shapes import ConfigError

    if mixture is None and (fields_of_data or files or samples != 400 or alpha != 0.05):
        raise ConfigError(
            "look: --samples, --alpha, --fields and --files are about known samples; give them with --mixture DATA"
        )
    if samples < 20 or not 0 < alpha < 1:
        raise ConfigError(
            f"look: --samples {samples} --alpha {alpha:g}: take 20 samples or more, and an alpha between 0 and 1"
        )
    check_folder(out)
    model = load(checkpoint, plugin, device)
    if inside is not None:
        model = tower_of(model, inside)
    chosen = choose_task(model, task, [*fields, *(without or [])])
    given = samples_from(model, chosen, fields, without or [], sides=True)
    if len(given) > 1:
        raise ConfigError(f"look shows one sample, and {len(given)} were given; give one value of each field")
    known = None if mixture is None else _known(mixture, fields_of_data, files, samples, given[0])
    _look_at(model, chosen, given[0], answer, as_json, folder_for(out, checkpoint), known, alpha)
    return 0


def _known(
    source: str, columns: list[str] | None, files: list[str] | None, most: int, like: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Samples spread evenly over data, with those fields that the sample has; the first ones of a folder are all of one class."""
    from multimodal.shapes import ConfigError, TaskError

    wanted = [name for name, value in like.items() if value is not None]
    rows = samples_of(source, columns, files, MOST_ROWS)
    if lacking := [name for name in wanted if name not in rows[0]]:
        raise TaskError(
            f"--mixture: samples have {', '.join(map(str, rows[0])) or 'no fields'}, and no {', '.join(lacking)}; give columns "
            f"other names, as in --fields {lacking[0]}=column"
        )
    if len(rows) < 20:
        raise ConfigError(f"--mixture: {len(rows)} samples say too little of what is usual; give 20 or more")
    rows = [rows[i * len(rows) // min(most, len(rows))] for i in range(min(most, len(rows)))]
    return [{name: row[name] if name in wanted else None for name in like} for row in rows]


def _look_at(
    model: "Model",
    task: str,
    sample: Mapping[str, Any],
    answer: str | None,
    as_json: bool,
    folder: Path,
    known: list[dict[str, Any]] | None,
    alpha: float,
) -> None:
    """Write xray.png and xray.html into a folder, and print the answer, the table of heads and where the files are."""
    from multimodal.look import mixture, xray
    from multimodal.look.answers import answer_line
    from multimodal.look.drawing import draw
    from multimodal.look.page import page
    from multimodal.value_files import file_of

    given: Any = answer
    if answer is not None and model.packer.head(task).autoregressive:
        given = value_from(model.packer.tokenizers[model.packer.patterns[task].writes.kind], answer, "--answer")
    ray = xray(model, task, sample, answer=given)
    mixed = None if known is None else mixture(model, task, ray, known, alpha=alpha, quiet=as_json)
    picture = io.BytesIO()
    draw(ray, picture)
    files = [
        saved(".png", picture.getvalue(), "xray", folder),
        saved(".html", page(ray).encode("utf-8", "replace"), "xray", folder),
    ]
    if not model.packer.patterns[task].pair:
        written = file_of(model.packer.answer_tokenizers[task], ray.prediction.value)
        files += [] if written is None else [saved(*written, "answer", folder)]
    if as_json:
        found = {"task": task, "heads": ray.table(), "files": list(map(str, files))}
        print_json(found if mixed is None else found | {"mixture": mixed.to_json()})
        return
    every, shown = ray.table(), ray.chosen_heads()  # those of the picture
    rows = [row for row in every if row["head"] in shown[row["layer"]]]
    heads_table = ray.lines(rows)
    if more := len(every) - len(rows):
        heads_table += f"\n{more} more heads are on the page"
    if mixed is not None:
        heads_table += f"\n\n{printable(str(mixed))}"
    shown = f"picture  {files[0]}\npage     {files[1]}" + "".join(f"\nanswer   {file}" for file in files[2:])
    print(f"{task}  {printable(answer_line(ray))}\n\n{heads_table}\n\n{shown}")


def bench(
    *rows: str,
    quick: bool = False,
    rounds: int = 9,
    seconds: float = 1.0,
    threads: int = 0,
    profile: bool = False,
    keep: Annotated[bool, Parameter(negative="")] = False,
    out: Path | None = None,
    list_: bool = False,
) -> int:
    """Time ours and what people would pick instead on the same work, in turn. Exit code 1: a row failed or missed its goal.

    Example: multimodal bench vit decode-1

    Example: multimodal bench --keep

    Parameters
    ----------
    rows
        Which rows; all unless given. --list shows them.
    quick
        Tiny settings, to see that it runs; the figures mean nothing and are not saved.
    rounds
        Rounds of each side.
    seconds
        Approximate length of a round.
    threads
        Threads of each side; 0: as many as there are cores.
    profile
        Show where the time goes instead.
    keep
        Add the figures to the checkout's benchmarks/results and its README; without it they are shown only.
    out
        Add them to bench.jsonl and bench.md in this folder instead.
    list_
        List the rows and their goals.
    """
    from multimodal.shapes import ConfigError

    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "speed").is_dir():
        raise ConfigError(
            "bench: the benchmarks are no part of the installed package; run it in a checkout of the project"
        )
    if keep and out is not None:
        raise ConfigError(f"bench: --keep and --out {out}: the figures go to one place; give one of them")
    check_folder(out)
    if not 1 <= rounds <= MOST or not 0 < seconds < 3600 or not 0 <= threads <= MOST:
        raise ConfigError(
            f"bench: --rounds {rounds} --seconds {seconds:g} --threads {threads}: give positive numbers, rounds and threads of at "
            f"most {MOST:,}, seconds below 3600"
        )
    sys.path.insert(0, str(root))
    main = import_module("benchmarks.speed.main")  # by name: the package must not depend on its benchmarks

    if list_:
        for _, row in main.all_rows():
            goal = "" if row.goal is None else f" (goal {row.goal:g})"
            print(f"{row.name:18} {row.what}{f', beside {row.peer}' if row.peer else ''}{goal}")
        return 0
    cores = threads or os.cpu_count() or 1
    try:
        return main.bench(
            rows,
            quick=quick,
            rounds=1 if quick else rounds,
            seconds=0.0 if quick else seconds,
            threads=cores,
            profile=profile,
            keep=main.RESULTS if keep else out,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
