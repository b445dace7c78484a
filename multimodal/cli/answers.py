"""`predict` answers at once, `generate` token by token; its options as one table, and as `Model.generate` takes them."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from multimodal.cli.arguments import (
    STDIN,
    Columns,
    DataFiles,
    Device,
    Fields,
    Json,
    Out,
    Plugins,
    Without,
    choose_task,
    constants_from,
    named_samples,
    samples_from,
    value_from,
)
from multimodal.cli.batch import check_out, predict_data
from multimodal.cli.loading import load
from multimodal.cli.output import check_folder, printable, show

if TYPE_CHECKING:
    from multimodal.generate import Sampler
    from multimodal.heads import Prediction
    from multimodal.model import Model

ANSWER = Group("What is written", sort_key=1)
DRAWN = Group("Drawing; with none of these the likeliest token is taken each time", sort_key=2)
SEARCH = Group("Searching and guiding", sort_key=3)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How an answer is written, as typed; None where nothing was typed."""

    max_tokens: Annotated[int, Parameter(group=ANSWER, help="The largest number of tokens to write.")] = 256
    begin: Annotated[str | None, Parameter(group=ANSWER, help="What the answer begins with.")] = None
    stop: Annotated[
        tuple[str, ...],
        Parameter(group=ANSWER, negative="", show_default=False, help="A text that ends the answer. Repeat for more."),
    ] = ()
    only: Annotated[
        tuple[str, ...],
        Parameter(group=ANSWER, negative="", show_default=False, help="The only words: red,green. Repeat for more."),
    ] = ()
    one_of: Annotated[
        tuple[str, ...],
        Parameter(group=ANSWER, negative="", show_default=False, help="The only answers: yes,no. Repeat for more."),
    ] = ()
    no_repeat: Annotated[int | None, Parameter(group=ANSWER, help="No n tokens in a row come twice.")] = None
    repetition: Annotated[float | None, Parameter(group=ANSWER, help="Nats off for tokens written before.")] = None
    count: Annotated[int, Parameter(group=ANSWER, help="Number of answers, each with the next seed.")] = 1

    temperature: Annotated[
        float | None, Parameter(group=DRAWN, help="Below 1 surer, above 1 bolder, 0 the likeliest.")
    ] = None
    top_k: Annotated[int | None, Parameter(group=DRAWN, help="Only among the k likeliest.")] = None
    top_p: Annotated[float | None, Parameter(group=DRAWN, help="Only among the likeliest that hold p: 0.9.")] = None
    min_p: Annotated[float | None, Parameter(group=DRAWN, help="Only what is at least p times the best: 0.05.")] = None
    seed: Annotated[int, Parameter(group=DRAWN, help="The same seed draws the same answer.")] = 0

    beams: Annotated[int, Parameter(group=SEARCH, help="Number of beams of a beam search.")] = 1
    length_penalty: Annotated[
        float | None, Parameter(group=SEARCH, help="Of beams: above 1 longer, below shorter.")
    ] = None
    guidance: Annotated[float, Parameter(group=SEARCH, help="Above 1: closer to what is read.")] = 1.0

    def options(self, model: "Model", task: str) -> dict[str, Any]:
        """What `Model.generate` takes.

        Raises:
            ConfigError: options that contradict each other or the task. MediaError: a text that this kind cannot be.
        """
        model.packer.check_task(task, answers=True)
        tokenizer = model.packer.answer_tokenizers[task]
        self._check(model, task)
        sampler = self._sampler(tokenizer)
        return {
            "max_tokens": self.max_tokens,
            "sampler": sampler,
            "temperature": self.temperature if sampler is None else None,
            "beams": self.beams,
            "length_penalty": 1.0 if self.length_penalty is None else self.length_penalty,
            "guidance": self.guidance,
            "stop": self.stop,
            "begin": None if self.begin is None else value_from(tokenizer, self.begin, "--begin"),
            "seed": self.seed,
        }

    def _check(self, model: "Model", task: str) -> None:
        """Checks options against each other and the task; the library checks each by itself."""
        from multimodal.shapes import ConfigError

        head = model.packer.head(task)
        if not head.autoregressive:
            raise ConfigError(f"task {task!r}: {type(head).__name__} answers at once; use predict")
        for name in ("repetition", "length_penalty", "guidance"):
            if not math.isfinite(getattr(self, name) or 0):
                raise ConfigError(f"{_option(name)} {getattr(self, name)} is not finite")
        drawing = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        drawn = self.temperature != 0 if head.draws_features else bool(self.temperature or drawing)
        if self.temperature == 0 and drawing:
            raise ConfigError(f"--temperature 0 draws nothing, so {_options(drawing)} must be left out, or it raised")
        if self.temperature:
            drawing.insert(0, "temperature")
        if self.beams > 1 and drawing:
            raise ConfigError(f"--beams {self.beams} looks for the likeliest answer; leave out {_options(drawing)}")
        if self.beams > 1 and self.repetition is not None:
            raise ConfigError(
                f"--beams {self.beams} ranks by the model's own chances, which --repetition does not change; use --no-repeat"
            )
        if self.beams == 1 and self.length_penalty is not None:
            raise ConfigError(f"--length-penalty {self.length_penalty:g} ranks beams; give --beams too, such as 4")
        if self.only and self.one_of:
            raise ConfigError("--only lists words and --one-of whole answers; use one of them")
        if self.count < 1:
            raise ConfigError(f"--count {self.count} must be at least 1")
        if self.count > 1 and not drawn:
            raise ConfigError(f"--count {self.count}: nothing is drawn, so all would be the same; give --temperature")
        if not 0 <= self.seed <= 2**63 - self.count:
            raise ConfigError(f"--seed {self.seed} must be a whole number from 0 to {2**63 - self.count}")

    def _sampler(self, tokenizer: Any) -> "Sampler | None":
        """What may be written, then how it is drawn; None where the temperature is enough."""
        from multimodal.generate.samplers import Repetition, combined_sampler

        return combined_sampler(
            repetition=None if self.repetition is None else Repetition(self.repetition),
            no_repeat=self.no_repeat,
            only=_words(tokenizer, "only", self.only) if self.only else (),
            one_of=_words(tokenizer, "one_of", self.one_of) if self.one_of else (),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            beams=self.beams,
        )


DEFAULTS = GenerateOptions()
BATCH = 32  # samples of one batch


def predict(
    checkpoint: Path,
    /,
    *data: str,
    task: str | None = None,
    without: Without = None,
    as_json: Json = False,
    out: Out = None,
    fields_of_data: Annotated[Columns, Parameter(name="--fields")] = None,
    files: DataFiles = None,
    probabilities: Annotated[
        bool, Parameter(negative="", help="Of data: a column for each class, with its probability.")
    ] = False,
    batch: Annotated[int, Parameter(help="Of data: the number of samples that are answered at the same time.")] = BATCH,
    plugin: Plugins = None,
    device: Device = "auto",
    **fields: Fields,
) -> int:
    """Answer one sample, several, or every row of data. An answer that is a picture or a sound is written to a file.

    Of data, `--out` is a table of answers: .csv, .tsv, .jsonl or .parquet. Stopped at any moment, the same command goes on behind
    the last row, and the table is the same. A row that cannot be answered has an error there, and the exit code is 1.

    Example: multimodal predict runs/digits --image seven.png

    Example: multimodal predict runs/digits --image scans/*.png --json

    Example: multimodal predict runs/digits scans/ --out predictions.csv --probabilities

    Example: multimodal predict runs/captions photos.parquet --fields image=photo --out captions.parquet

    Example: tail -f new.jsonl | multimodal predict runs/reviews -

    Parameters
    ----------
    checkpoint
        A run folder, the model folder in it, or a name on the hub: OWNER/MODEL, or OWNER/MODEL@REVISION.
    data
        A folder of pictures or sounds, a .csv, .tsv, .jsonl or .parquet file, hf:NAME, a folder of shards, 'scans/*.png', or
        several files; or - for JSON lines of standard input, which are answered by JSON lines as they come.
    task
        Which task, such as "image -> label"; needed only where several read the same fields.
    """
    from multimodal.shapes import ConfigError

    if data:
        check_out(out, data)
    elif fields_of_data or files or probabilities or batch != BATCH:
        raise ConfigError(
            "predict: --fields, --files, --probabilities and --batch are about data; give them behind the checkpoint"
        )
    if not data or list(data) == [STDIN]:
        check_folder(out)
    model = load(checkpoint, plugin, device)
    if data:
        return predict_data(
            model,
            data,
            checkpoint=checkpoint,
            task=task,
            fields=fields_of_data,
            files=files,
            given=constants_from(model, fields, without or []),
            out=out,
            probabilities=probabilities,
            batch=batch,
        )
    chosen = choose_task(model, task, [*fields, *(without or [])])
    name, tokenizer = model.packer.patterns[chosen].answer, model.packer.answer_tokenizers[chosen]
    samples, names = (
        samples_from(model, chosen, fields, without or []),
        named_samples(model.packer.patterns[chosen], fields),
    )
    for start in range(0, len(samples), BATCH):
        answers = model.predict(chosen, samples[start : start + BATCH])
        for answer, which in zip(answers, names[start:], strict=False):
            heading = f"== {' '.join(which.values())}" if which else ""
            entries = {"home": checkpoint, "heading": heading, "sample": which}
            show(chosen, answer, as_json, name=name, out=out, tokenizer=tokenizer, **entries)
            if not answer.complete:
                print("(cut before its end; generate --max-tokens writes more)", file=sys.stderr)
    return 0


def generate(
    checkpoint: Path,
    /,
    *,
    task: str | None = None,
    without: Without = None,
    writing: GenerateOptions = DEFAULTS,
    as_json: Json = False,
    out: Out = None,
    plugin: Plugins = None,
    device: Device = "auto",
    **fields: Fields,
) -> int:
    """Write an answer token by token: a text while it is written, a picture or a sound to a file.

    Example: multimodal generate runs/captions --image cat.png --temperature 0.8 --top-p 0.95 --seed 1

    Example: multimodal generate runs/drawings --text "a red circle" --count 4 --top-k 40 --out drawings

    Parameters
    ----------
    checkpoint
        A run folder, the model folder in it, or a name on the hub: OWNER/MODEL, or OWNER/MODEL@REVISION.
    task
        Which task, such as "image -> text"; needed only where several write from the same fields.
    """
    check_folder(out)
    model = load(checkpoint, plugin, device)
    chosen = choose_task(model, task, [*fields, *(without or [])], writing=True)
    options = writing.options(model, chosen)
    samples, names = (
        samples_from(model, chosen, fields, without or []),
        named_samples(model.packer.patterns[chosen], fields),
    )
    name = model.packer.patterns[chosen].answer
    tokenizer = model.packer.tokenizers[model.packer.patterns[chosen].writes.kind]
    several = writing.count > 1
    # a pipe or a file gets whole answers, so that no program reads half of one
    live = sys.stdout.isatty() and tokenizer.text and not (as_json or out or several)
    for sample, named in zip(samples, names, strict=True):
        which = " ".join(named.values())
        if live:
            if which:
                print(f"== {printable(which)}")
            answers = [_print_while_written(model, chosen, sample, options)]
        else:
            answers = _written(model, chosen, sample, writing.count, options)
        for seed, answer in enumerate(answers, writing.seed):
            title = " ".join(filter(None, [which, f"seed {seed}" if several else ""]))
            if not live:
                entries = {"home": checkpoint, "heading": f"== {title}" if title else "", "sample": named, "seed": seed}
                show(chosen, answer, as_json, name=name, out=out, tokenizer=tokenizer, **entries)
            if not answer.complete:
                title = f"{title}: " if title else ""
                print(f"({title}stopped at --max-tokens {writing.max_tokens}, before its end)", file=sys.stderr)
    return 0


def _written(
    model: "Model", task: str, sample: Mapping[str, Any], count: int, options: Mapping[str, Any]
) -> Iterator["Prediction"]:
    """`count` answers to one sample, with consecutive seeds; yielded as they come."""
    for start in range(0, count, BATCH):
        some = [sample] * min(BATCH, count - start)
        yield from model.generate(task, some, **{**options, "seed": options["seed"] + start})


def _print_while_written(
    model: "Model", task: str, sample: Mapping[str, Any], options: Mapping[str, Any]
) -> "Prediction":
    """Print a text to the terminal while it is being written."""
    answer, printed = None, False
    try:
        for piece in model.stream(task, [sample], **options):
            printed = printed or bool(piece.text)
            print(printable(piece.text), end="", flush=True)
            answer = piece.prediction
    finally:
        if printed or answer is not None:
            print(flush=True)
    assert answer is not None
    return answer


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _options(names: Iterable[str]) -> str:
    return " and ".join(map(_option, names))


def _words(tokenizer: Any, name: str, texts: Iterable[str]) -> tuple[str, ...]:
    """The parts between commas, each of which this kind can be."""
    from multimodal.shapes import MediaError

    words = tuple(dict.fromkeys(part.strip() for text in texts for part in text.split(",")))
    for word in words:
        try:
            tokenizer(word)
        except ValueError as error:
            raise MediaError(f"{_option(name)} {word!r}: {error}") from error
    return words
