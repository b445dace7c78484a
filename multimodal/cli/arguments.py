"""The options that several commands have, and parsing: a command line into options, a task, and the values of its fields."""

import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Parameter

from multimodal.texts import shortened

if TYPE_CHECKING:
    from cyclopts import App

    from multimodal.model import Model
    from multimodal.pattern import Pattern
    from multimodal.tokenizer import Tokenizer

Plugins = Annotated[
    list[Path] | None,
    Parameter(
        name="--plugin",
        negative="",
        help="A Python file that defines a tokenizer or head of the checkpoint. It is imported, not run as a script. "
        "Repeat it for more files.",
    ),
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of text.")]
Device = Annotated[str, Parameter(help="cpu, cuda, ... or auto.")]
Out = Annotated[
    Path | None,
    Parameter(
        help="The folder for pictures and sounds that are written; the run's unless given. With it texts are files too. "
        "No file is overwritten: the next gets a number. Of data given to predict: the table of answers."
    ),
]
Fields = Annotated[
    list[str],
    Parameter(
        negative="",
        help="A field that the task reads, by its name: --image cat.png, --text 'a cat'. Pictures and sound are files; "
        "arrays are .npy or .json files, or JSON. Several values are several samples: --image cats/*.jpg; of a field that takes "
        "a list ('image* -> label') they are the list of one sample. "
        "A value that begins like an option is written --text='--no'. A field that has the name of an option is given as "
        "--field-NAME.",
    ),
]
Without = Annotated[
    list[str] | None,
    Parameter(
        negative="", help="A field that the task reads and this sample lacks: --without image. Repeat it for more."
    ),
]
DataSource = Annotated[
    str | None,
    Parameter(
        help="Samples to measure on: a folder of pictures or sounds in class folders, a .csv, .tsv, .jsonl or .parquet file, "
        "hf:NAME, or a folder of shards."
    ),
]
Columns = Annotated[
    list[str] | None,
    Parameter(negative="", help="A column of the data to take, or field=column. Repeat it for more; all unless given."),
]
DataFiles = Annotated[
    list[str] | None,
    Parameter(negative="", help="A field of the data whose values are paths of files. Repeat it for more."),
]
Most = Annotated[int, Parameter(help="The most samples of the data, the first ones.")]
_NAMES = """
alpha answer as_json batch begin beams checkpoint count debug device fields files guidance help inside json length_penalty
max_tokens min_p mixture no_repeat one_of only out plugin probabilities repetition samples seed stop task temperature top_k
top_p version without writing
"""
OPTION_NAMES = set(_NAMES.split())
"""Names of options; a field of the same name is given with FIELD_PREFIX before it."""
FIELD_PREFIX = "field_"
STDIN = "/dev/stdin"  # what "-" becomes, because cyclopts takes it for an option
_Typed = TypeVar("_Typed")  # a text or several
OPTION = re.compile(r"-[A-Za-z]|--[A-Za-z][\w-]*(=.*)?", re.DOTALL)


def joined(app: "App", tokens: Sequence[str]) -> list[str]:
    """The tokens of a command line, with every value joined to its option.

    A value may start with a dash if it is no option: `--task "-> notes"`, `--text -3`. A field may have several values, such as
    those of `--image cats/*.jpg`: after the checkpoint, each token that follows a field's value is another value.
    """
    if not tokens or tokens[0].startswith("-") or tokens[0] not in app:
        return list(tokens)
    arguments = app[tokens[0]].assemble_argument_collection()
    known = {name: argument.hint for argument in arguments for name in argument.names} | {"--help": bool, "-h": bool}
    has_fields = "--[KEYWORD]" in known
    found = [tokens[0]]
    waiting = field = ""  # an option that still needs its value; the field of the last value
    placed = False  # whether the checkpoint was given
    # cyclopts takes a value with a dash for an option, and a second value for a positional argument: both are joined by `=`
    for i, token in enumerate(tokens[1:], 1):
        name = token.partition("=")[0]
        if token == "--":
            return [*found, *tokens[i:]]
        if OPTION.fullmatch(token):
            field = name if has_fields and name not in known else ""
            waiting = "" if "=" in token or known.get(name) is bool else name
            found.append(token)
        elif waiting:
            if token.startswith("-"):
                found[-1] += f"={token}"
            else:
                found.append(token)
            waiting = ""
        elif field and placed:
            found.append(f"{field}={token}")
        else:
            found.append(STDIN if token == "-" and tokens[0] == "predict" else token)
            placed = True
    return found


def choose_task(model: "Model", wanted: str | None, fields: Iterable[str], *, writing: bool = False) -> str:
    """The task that is named, or the only one, or the only one that reads just these fields.

    Raises:
        TaskError: none or several; lists what there is.
    """
    from multimodal.pattern import Pattern
    from multimodal.shapes import TaskError

    patterns = model.packer.patterns
    if wanted is not None:
        for text, pattern in patterns.items():
            if "->" in wanted and _named(Pattern.parse(wanted)) == _named(pattern):  # however it is spaced
                return text
        model.packer.check_task(wanted)
    possible = [text for text in patterns if not writing or model.packer.head(text).autoregressive]
    if not possible:
        raise TaskError(f"no task of this model writes token by token; use predict. There are {_listed(patterns)}")
    if len(possible) == 1:
        return possible[0]
    given = set(_given(dict.fromkeys(fields), {field.name for text in possible for field in patterns[text].reads}))
    fitting = [text for text in possible if {field.name for field in patterns[text].reads} == given]
    if len(fitting) == 1:
        return fitting[0]
    shown = " and ".join(sorted(given)) or "nothing"
    if fitting:
        raise TaskError(f"several tasks read {shown}; choose one with --task: {_listed(fitting)}")
    names = sorted({field.name for text in possible for field in patterns[text].reads})
    raise TaskError(f"no task reads just {shown}{_closest(given, names)}; there are {_listed(possible)}")


def _named(pattern: "Pattern") -> tuple[int, list[tuple[str, str]]]:
    return len(pattern.right), [(field.name, field.kind + "*" * field.many) for field in pattern.fields]


def _listed(tasks: Iterable[str]) -> str:
    return ", ".join(map(repr, tasks))


def _check_apart(given: Iterable[str], absent: Iterable[str]) -> None:
    """Raise a TaskError for a field that is both given and left out."""
    from multimodal.shapes import TaskError

    if both := [name for name in absent if name in set(given)]:
        raise TaskError(f"--without {both[0]}: --{both[0]} is given as well; leave out one of the two")


def _given(options: Mapping[str, _Typed], known: Container[str]) -> dict[str, _Typed]:
    """Fields by name, from the typed options; --field-out is the field `out`, because --out is an option."""
    names = {option: option.replace("-", "_") for option in options}
    short = {option: name.removeprefix(FIELD_PREFIX) for option, name in names.items()}
    return {
        short[option] if names[option] not in known and short[option] in known else names[option]: text
        for option, text in options.items()
    }


def _option(field: str) -> str:
    """The option that gives a field."""
    return f"--{FIELD_PREFIX.replace('_', '-')}{field}" if field in OPTION_NAMES else f"--{field}"


def _closest(given: Iterable[str], names: Sequence[str]) -> str:
    from multimodal.shapes import did_you_mean

    return next((close for name in given if name not in names and (close := did_you_mean(name, names))), "")


def samples_from(
    model: "Model",
    task: str,
    fields: Mapping[str, Sequence[str]],
    without: Sequence[str] = (),
    *,
    sides: bool = False,
) -> list[dict[str, Any]]:
    """Samples from the options for a task's fields: as many as the longest list of values.

    A field with one value has it in every sample; fields named in `without` are None. With `sides`, a pair is no error, and the
    fields of one of its sides are enough.

    Raises:
        TaskError: a field that the task does not read, one that is missing, or fields of different numbers of values.
        MediaError: a value that cannot be read.
    """
    from multimodal.shapes import TaskError

    model.packer.check_task(task, answers=not sides)
    pattern = model.packer.patterns[task]
    kinds = {field.name: field.kind for field in pattern.reads}
    given = _given(fields, kinds)
    absent = list(_given({name.removeprefix("--").replace("-", "_"): [] for name in without}, kinds))
    if pattern.pair:
        absent += _absent_side(pattern, given)
    for name in (*given, *absent):
        if name not in kinds:
            reads = " ".join(map(_option, kinds)) or "no field"
            raise TaskError(f"--{name}: task {task!r} reads {reads}{_closest([name], list(kinds))}")
    _check_apart(given, absent)
    if missing := [_option(name) for name in kinds if name not in given and name not in absent]:
        them, also, too = "it" if len(missing) == 1 else "them", "also " if given else "", " too" if given else ""
        out = f", or leave {them} out: " + " ".join(f"--without {name.removeprefix('--')}" for name in missing)
        raise TaskError(f"task {task!r} {also}reads {' '.join(missing)}; give {them}{too}{out if given else ''}")
    many = {field.name for field in pattern.reads if field.many}
    counts = {name: len(texts) for name, texts in given.items() if len(texts) != 1 and name not in many}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"--{name} {count}" for name, count in counts.items())
        raise TaskError(f"different numbers of values: {listed}; give one for all samples, or one for each")
    values = {
        name: [value_from(model.packer.tokenizers[kinds[name]], text, f"--{name}") for text in texts]
        for name, texts in given.items()
    }
    values |= {name: [values[name]] for name in many if name in values}  # all of them are one list
    count = max(counts.values(), default=1)
    samples = [{name: each[i % len(each)] for name, each in values.items()} for i in range(count)]
    return [sample | dict.fromkeys(absent) for sample in samples]


def _absent_side(pattern: "Pattern", given: Container[str]) -> list[str]:
    """The fields of a pair's side of which none is given, if the other side has some."""
    sides = [[field.name for field in fields] for fields in pattern.sides.values()]
    empty = [names for names in sides if not any(name in given for name in names)]
    return empty[0] if len(empty) == 1 else []


def named_samples(pattern: "Pattern", fields: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """For each sample, the typed values of the fields that have several values; {} if there is one sample."""
    lists = {field.name for field in pattern.reads if field.many}
    given = _given(fields, {field.name for field in pattern.reads})
    several = {name: texts for name, texts in given.items() if len(texts) > 1 and name not in lists}
    count = max(map(len, several.values()), default=1)
    return [{name: texts[i] for name, texts in several.items()} for i in range(count)]


def constants_from(model: "Model", fields: Mapping[str, Sequence[str]], without: Sequence[str]) -> dict[str, Any]:
    """{field: value} of the fields that are the same for every row of data; those in `without` are None.

    Raises:
        TaskError: no task reads such a field, several values of it, or one that is given and left out.
        MediaError: a value that cannot be read.
    """
    from multimodal.shapes import TaskError

    kinds = {f.name: (f.kind, f.many) for p in model.packer.patterns.values() for f in p.reads}
    given = _given(fields, kinds)
    absent = _given({name.removeprefix("--").replace("-", "_"): [] for name in without}, kinds)
    for name in (*given, *absent):
        if name not in kinds:
            there = " ".join(map(_option, kinds)) or "no field"
            raise TaskError(f"--{name}: the tasks of this model read {there}{_closest([name], list(kinds))}")
    _check_apart(given, absent)
    found: dict[str, Any] = dict.fromkeys(absent)
    for name, texts in given.items():
        kind, many = kinds[name]
        if len(texts) > 1 and not many:
            raise TaskError(f"--{name}: {len(texts)} values; beside data, a field has one value for all rows")
        values = [value_from(model.packer.tokenizers[kind], text, f"--{name}") for text in texts]
        found[name] = values if many else values[0]
    return found


def samples_with(model: "Model", fields: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, Any]]]:
    """Samples for every task that can be read from these fields; an answer counts as well.

    Raises:
        TaskError: a field that no task has, or one that could be used only together with others.
        MediaError: a value that cannot be read.
    """
    from multimodal.shapes import TaskError

    patterns = model.packer.patterns
    answers = {task: {p.answer: p.writes.kind} for task, p in patterns.items() if not p.pair}
    known = sorted({field.name for p in patterns.values() for field in p.reads}.union(*answers.values()))
    given = _given(fields, known)
    for name in given:
        if name not in known:
            there = " ".join(map(_option, known))
            raise TaskError(f"--{name}: no task has such a field; there are {there}{_closest([name], known)}")
    samples: dict[str, list[dict[str, Any]]] = {}
    used: set[str] = set()
    for task, pattern in patterns.items():
        kinds = {field.name: field.kind for field in pattern.reads}
        if all(name in given for name in kinds):
            kinds |= answers.get(task, {})
            mine = {name: texts for name, texts in given.items() if name in kinds}
            if not mine:
                continue  # a task that reads nothing, whose answer was not given
            many = {field.name for field in pattern.reads if field.many}
            if len(counts := {len(texts) for name, texts in mine.items() if name not in many} - {1}) > 1:
                raise TaskError(f"task {task!r}: fields have {sorted(counts)} values; give one, or one for each sample")
            values = {
                name: [value_from(model.packer.tokenizers[kinds[name]], text, f"--{name}") for text in texts]
                for name, texts in mine.items()
            }
            values |= {name: [values[name]] for name in many}
            samples[task] = [
                {name: each[i % len(each)] for name, each in values.items()} for i in range(max(counts, default=1))
            ]
            used |= set(mine)
    for name in given:
        if name not in used:  # an unused value would seem to be valid
            needs = [
                " ".join(f"--{field.name}" for field in pattern.reads if field.name not in given)
                for task, pattern in patterns.items()
                if name in {field.name for field in pattern.reads} | answers.get(task, {}).keys()
            ]
            raise TaskError(f"--{name} alone makes no sample of any task; give {' or '.join(dict.fromkeys(needs))} too")
    return samples


def value_from(tokenizer: "Tokenizer", text: str, option: str) -> Any:
    """What the user typed as a value that this tokenizer reads: the text itself (or the path), or what it holds.

    Raises:
        MediaError: the tokenizer accepts no reading of the text; the message is that of the closest reading.
    """
    import numpy as np

    from multimodal.shapes import MediaError

    # the tokenizer itself decides which reading is meant; of several refusals the one closest to its kind is shown
    refused: list[tuple[bool, str, Exception]] = []
    for value in _readings(text):
        if isinstance(value, MediaError):  # a file that holds nothing to read
            refused.append((True, str(value), value))
            continue
        try:
            tokenizer(value)
        except Exception as error:  # a user's tokenizer may raise anything
            message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            # an error that names the type of the value wants another type, not another content
            fits = re.search(rf"\b{re.escape(type(value).__name__)}\b", message) is None
            # the error for the number 7 has the same message as that for "7"
            if not refused or isinstance(value, (list, dict, np.ndarray)):
                refused.append((fits, message, error))
        else:
            return value
    first, *others = refused
    fitting = [one for one in others if one[0]]
    _, message, error = fitting[-1] if fitting else others[-1] if others and not first[0] else first
    raise MediaError(f"{option}: {message.replace(text, shortened(text, 100)) if text else message}") from error


def _readings(text: str) -> Iterator[Any]:
    """The readings of a text: itself, the file of this name or the text as JSON, that as an array; or a MediaError."""
    from multimodal.data.codecs import as_array, values_in
    from multimodal.shapes import MediaError

    yield text
    if os.path.isfile(text) and text.endswith((".npy", ".json")):  # isfile is False also for what cannot be a file name
        try:
            yield from values_in(Path(text))
        except MediaError as error:  # damaged, or an array of objects
            yield error
        return
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):
        return
    yield from as_array(held)
