"""The commands. Everything heavy is imported inside of them, so that help comes at once."""

import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from multimodal.cli import arguments, benching, console, planning, replaying, sharding, training
from multimodal.cli.arguments import choose_task, named_samples, samples_from, samples_with, value_from
from multimodal.cli.loading import load, make_tokenizer
from multimodal.cli.options import Device, Fields, Json, Out, Plugins, Without
from multimodal.cli.showing import check_folder, harmless, place, print_json, show
from multimodal.cli.writing import Writing, written_live

if TYPE_CHECKING:
    from multimodal.heads import Prediction
    from multimodal.model import Model


def _version() -> str:
    from multimodal.checkpoint import package_version

    return package_version()


app = App(
    name="multimodal",
    version=_version,
    suppress_keyboard_interrupt=False,
    help="Models that read and write many kinds of data.\n\n"
    "Every command explains itself: multimodal train --help. With --debug, an error shows where in the code it came from.",
)

AS_IT_IS = Writing()
BATCH = 32  # samples of one batch


app.command(training.train)
app.command(training.report)
app.command(replaying.replay)
app.command(sharding.shards)
app.command(planning.plan)
app.command(benching.bench)


@app.command
def predict(
    checkpoint: Path,
    /,
    *,
    task: str | None = None,
    without: Without = None,
    as_json: Json = False,
    out: Out = None,
    plugin: Plugins = None,
    device: Device = "auto",
    **fields: Fields,
) -> int:
    """Answer one sample, or several. An answer that is a picture or a sound is written to a file.

    Example: multimodal predict runs/digits --image seven.png

    Example: multimodal predict runs/digits --image scans/*.png --json

    Parameters
    ----------
    checkpoint
        A run folder, or the model folder in it.
    task
        Which task, such as "image -> label"; needed only where several read the same fields.
    """
    check_folder(out)
    model = load(checkpoint, plugin, device)
    chosen = choose_task(model, task, [*fields, *(without or [])])
    name = model.packer.patterns[chosen].answer
    samples, names = samples_from(model, chosen, fields, without or []), named_samples(fields)
    for start in range(0, len(samples), BATCH):
        answers = model.predict(chosen, samples[start : start + BATCH])
        for answer, which in zip(answers, names[start:], strict=False):
            heading = f"== {' '.join(which.values())}" if which else ""
            show(chosen, answer, as_json, name=name, out=out, home=checkpoint, heading=heading, sample=which)
            if not answer.complete:
                print("(cut before its end; generate --max-tokens writes more)", file=sys.stderr)
    return 0


@app.command
def generate(
    checkpoint: Path,
    /,
    *,
    task: str | None = None,
    without: Without = None,
    writing: Writing = AS_IT_IS,
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
        A run folder, or the model folder in it.
    task
        Which task, such as "image -> text"; needed only where several write from the same fields.
    """
    check_folder(out)
    model = load(checkpoint, plugin, device)
    chosen = choose_task(model, task, [*fields, *(without or [])], writing=True)
    options = writing.options(model, chosen)
    samples, names = samples_from(model, chosen, fields, without or []), named_samples(fields)
    name, kind = model.packer.patterns[chosen].answer, model.packer.patterns[chosen].writes.kind
    several = writing.count > 1
    live = sys.stdout.isatty() and model.packer.tokenizers[kind].text and not (as_json or out or several)
    for sample, named in zip(samples, names, strict=True):
        which = " ".join(named.values())
        if live:
            if which:
                print(f"== {harmless(which)}")
            answers = [written_live(model, chosen, sample, options)]
        else:
            answers = _written(model, chosen, sample, writing.count, options)
        for seed, answer in enumerate(answers, writing.seed):
            title = " ".join(filter(None, [which, f"seed {seed}" if several else ""]))
            if not live:
                facts = {"home": checkpoint, "heading": f"== {title}" if title else "", "sample": named, "seed": seed}
                show(chosen, answer, as_json, name=name, out=out, **facts)
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


@app.command
def transcribe(
    checkpoint: Path,
    /,
    *files: Path,
    task: str | None = None,
    form: Annotated[Literal["text", "srt", "vtt", "json"], Parameter(name="--format")] = "text",
    out: Path | None = None,
    beam: int = 0,
    prior: float = 0.0,
    words: Path | None = None,
    window_s: float = 30.0,
    overlap_s: float | None = None,
    batch: int = 8,
    max_tokens: int = 256,
    plugin: Plugins = None,
    device: Device = "auto",
) -> int:
    """Write down what is said in sound files of any length. Exit code 1: some file could not be read; the others are there.

    Example: multimodal transcribe runs/words talk.flac

    Example: multimodal transcribe runs/words monday.wav tuesday.wav --format srt --out subtitles --beam 16

    Parameters
    ----------
    checkpoint
        A run folder, or the model folder in it.
    files
        Sound files.
    task
        Which task, such as "audio -> text"; needed only where several transcribe.
    form
        Plain text, subtitles (SubRip or WebVTT), or JSON with the time of every word.
    out
        A folder for one file each; without it, all is printed.
    beam
        Keep so many texts in mind while reading (CTC); 0 takes the likeliest symbol of every moment.
    prior
        Weight of the model's own text task, such as "-> text", in choosing between texts (CTC).
    words
        A text file with the only words that may be written (CTC).
    window_s
        Seconds that the model reads at once; as long as what it was trained on, or a little more.
    overlap_s
        Seconds that neighbouring windows share (CTC); 4, or a quarter of a short window, unless given.
    batch
        Windows at once.
    max_tokens
        The longest text of one window, where it is written token by token.
    """
    from multimodal.cli.transcripts import bar, choose_transcription_task, make_beam, places_for, put
    from multimodal.shapes import ConfigError, MediaError
    from multimodal.transcription import FORMATS, transcripts

    if not files:
        raise ConfigError("transcribe: give one sound file or more behind the checkpoint")
    model = load(checkpoint, plugin, device)
    chosen = choose_transcription_task(model, task)
    decoder = make_beam(model, chosen, beam, prior, words)
    places = places_for(files, out, FORMATS[form])
    failed = 0
    with bar(files) as progress:
        done = transcripts(
            model,
            chosen,
            list(files),
            decoder=decoder,
            window_s=window_s,
            overlap_s=overlap_s,
            batch=batch,
            max_tokens=max_tokens,
            progress=progress,
        )
        for index, transcript in done:
            if isinstance(transcript, MediaError):
                failed += 1
                print(f"multimodal: {files[index]}: {transcript}", file=sys.stderr)
            else:
                put(files[index], transcript, form, places[index], len(files) > 1)
    if failed and len(files) > 1:
        print(f"{failed} of {len(files)} files could not be read", file=sys.stderr)
    return 1 if failed else 0


@app.command
def check(
    tokenizer: str,
    /,
    *,
    config: str = "{}",
    value: Annotated[list[str] | None, Parameter(negative="")] = None,
) -> int:
    """Check by name that a tokenizer keeps every promise of the contract. Exit code 1: it does not.

    Example: multimodal check my_package:MyTokenizer

    Example: multimodal check sensor.py:Sensor --config '{"rate_hz": 100}' --value walk.npy --value run.npy

    Parameters
    ----------
    tokenizer
        module:Class or path/to/file.py:Class.
    config
        The tokenizer's settings, as JSON.
    value
        A value it can encode: a file, a text, or JSON; give two or more. Without any, the class's examples() or plausible
        pictures, sounds, texts and numbers are tried.
    """
    from multimodal.check import check_tokenizer, plausible_values
    from multimodal.shapes import ConfigError

    made = make_tokenizer(tokenizer, config)
    values = [value_from(made, text, "--value") for text in value or []] or plausible_values(made)
    if len(values) < 2:
        raise ConfigError(
            f"{type(made).__name__} accepted {len(values)} of the pictures, sounds, texts and numbers that were tried, and two are "
            "needed. Give values (--value a.npy --value b.npy), or write `examples()`, a classmethod that returns a few"
        )
    report = check_tokenizer(made, values, raises=False)
    print(report)
    return 1 if report.failed else 0


@app.command
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

    Fields that are not given are invented, and that is said.

    Example: multimodal verify runs/digits --image seven.png

    Parameters
    ----------
    checkpoint
        A run folder, or the model folder in it.
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


@app.command
def look(
    checkpoint: Path,
    /,
    *,
    task: str | None = None,
    answer: str | None = None,
    without: Without = None,
    as_json: Json = False,
    out: Out = None,
    plugin: Plugins = None,
    device: Device = "auto",
    **fields: Fields,
) -> int:
    """Show what every attention head does while the model answers one sample: a picture, a page for a browser, a table.

    Example: multimodal look runs/digits --image seven.png --out looks

    Parameters
    ----------
    checkpoint
        A run folder, or the model folder in it.
    task
        Which task, such as "image -> label"; needed only where several read the same fields.
    answer
        Of a task that writes: look while this is written, instead of the model's own answer.
    """
    from multimodal.cli.looking import look_at
    from multimodal.shapes import ConfigError

    check_folder(out)
    model = load(checkpoint, plugin, device)
    chosen = choose_task(model, task, [*fields, *(without or [])])
    samples = samples_from(model, chosen, fields, without or [])
    if len(samples) > 1:
        raise ConfigError(f"look shows one sample, and {len(samples)} were given; give one value of each field")
    look_at(model, chosen, samples[0], answer, as_json, place(out, checkpoint))
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: a check that was asked for failed, or one file of several. 2: something the user can put right, with one message
    on stderr. 70: a bug, in one line. 130: stopped by Ctrl-C. 141: the reader of the output has ended.
    """
    tokens = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        with console.prepared():
            code = app(
                arguments.joined(app, tokens), exit_on_error=False, print_error=False, result_action="return_value"
            )
            sys.stdout.flush()
            return code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(error, debug)


def _failed(error: Exception, debug: bool) -> int:
    """Report an error; returns the exit code."""
    if isinstance(error, OSError) and sys.stdout is not None and (output := console.output_error()) is not None:
        if isinstance(output, BrokenPipeError):  # as of `head`
            return 141  # 128 + SIGPIPE, as shells count it
        error = OSError(f"standard output: {output.strerror}; what should be shown there is lost")
    message = console.message_of(error)
    if debug:
        traceback.print_exc()
    elif message is None:
        console.report_bug(error)
    else:
        console.say(message)
    return 70 if message is None else 2  # 70: EX_SOFTWARE
