"""What `multimodal transcribe` needs: which task, how its rows are read, where its files go, and a bar while it reads."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from multimodal.progress import progress_bar

if TYPE_CHECKING:
    from multimodal.model import Model
    from multimodal.transcription import Beam, Transcript


def choose_hearing_task(model: "Model", wanted: str | None) -> str:
    """The task that is named, or the only one that turns a sound into text.

    Raises:
        TaskError: none or several, or one that does not; lists what there is.
    """
    from multimodal.cli.arguments import choose_task
    from multimodal.shapes import TaskError
    from multimodal.transcription import hearing_tasks

    if wanted is not None:
        return choose_task(model, wanted, ())
    there = hearing_tasks(model)
    if not there:
        raise TaskError(
            "this checkpoint transcribes nothing: no task reads one sound and writes text by CTC or NextToken; there are "
            + ", ".join(map(repr, model.tasks))
        )
    if len(there) > 1:
        raise TaskError(f"several tasks transcribe; choose one with --task: {', '.join(map(repr, there))}")
    return there[0]


def make_beam(model: "Model", task: str, width: int, prior: float, words: Path | None) -> "Beam | None":
    """The beam search that was asked for, or None.

    Raises:
        ConfigError: the task does not read by CTC, or the model has no task to take the prior from.
    """
    from multimodal.heads import CTC
    from multimodal.shapes import ConfigError, MediaError
    from multimodal.transcription import Beam, Lexicon, ModelPrior

    if not width and not prior and not words:
        return None
    if words is not None and not words.is_file():
        raise MediaError(f"--words {words}: wanted a text file with the words that may be written; this is none")
    if not isinstance(model.packer.head(task), CTC):
        raise ConfigError(
            f"--beam, --prior and --words are for CTC; task {task!r} writes token by token, so leave them out"
        )
    kind = model.packer.patterns[task].writes.kind
    source = None
    if prior:
        writing = [
            name
            for name, pattern in model.packer.patterns.items()
            if not pattern.reads and pattern.writes.kind == kind and model.packer.head(name).writes
        ]
        if not writing:
            raise ConfigError(f"--prior {prior:g}: this model has no task '-> {kind}' that says how likely a text is")
        source = ModelPrior(model, writing[0])
    lexicon = None
    if words is not None:
        try:
            lexicon = Lexicon(words.read_text(encoding="utf-8").split(), model.packer.tokenizers[kind])
        except UnicodeDecodeError as error:
            raise MediaError(f"--words {words}: this is no UTF-8 text: {error}") from error
    return Beam(width=width or 16, prior=source, weight=prior, lexicon=lexicon)


def places_for(files: Sequence[Path], folder: Path | None, ending: str) -> list[Path | None]:
    """Where each file's transcript goes; None: to stdout.

    Raises:
        ConfigError: two files would get the same one.
    """
    from multimodal.cli.showing import check_folder
    from multimodal.shapes import ConfigError

    if folder is None:
        return [None] * len(files)
    check_folder(folder)
    places = [folder / f"{file.stem}.{ending}" for file in files]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise ConfigError(
                f"{files[places.index(place)]} and {files[i]} would both be written to {place}; rename one, or give them to two "
                "commands"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return list(places)


def put(file: Path, transcript: "Transcript", form: str, place: Path | None, several: bool) -> None:
    """Write or print one transcript."""
    from multimodal.cli.showing import print_json, saved
    from multimodal.transcription import written

    text = written(transcript, form)
    if place is not None:
        print(saved(place.suffix, text.encode("utf-8"), place.stem, place.parent))
    elif several and form == "json":
        print_json({"file": str(file), **json.loads(text)})  # an object a line
    else:
        print(f"== {file}\n{text}" if several else text, end="")
    if not transcript.complete:
        print(f"{file}: a part of the text was stopped at --max-tokens, before its end", file=sys.stderr)


@contextmanager
def bar(files: Sequence[Path]) -> Iterator[Callable[[int, float, float], None]]:
    """A line for each file that is read, with the minutes of sound that are done."""
    with progress_bar("reading", 0) as progress:

        def show(index: int, done_s: float, total_s: float) -> None:
            minutes = f"{done_s / 60:.1f} of {total_s / 60:.1f} min"
            progress.update(done_s, minutes, key=index, name=files[index].name, total=total_s)

        yield show
