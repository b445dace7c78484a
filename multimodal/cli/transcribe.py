"""`transcribe`: which task, how it is decoded, where its files go."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from multimodal.cli.arguments import Device, Plugins, choose_task
from multimodal.cli.loading import load
from multimodal.cli.output import check_folder, print_json, saved
from multimodal.progress import progress_bar

if TYPE_CHECKING:
    from multimodal.model import Model
    from multimodal.transcription import Beam, Transcript


def transcribe(
    checkpoint: Path,
    /,
    *files: Path,
    task: str | None = None,
    form: Annotated[Literal["text", "srt", "vtt", "json"], Parameter(name="--format")] = "text",
    out: Path | None = None,
    beam: int = 0,
    ctc_weight: float = 0.0,
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
        A run folder, the model folder in it, or a name on the hub: OWNER/MODEL, or OWNER/MODEL@REVISION.
    files
        Sound files.
    task
        Which task, such as "audio -> text"; needed only where several transcribe.
    form
        Plain text, subtitles (SubRip or WebVTT), or JSON with the time of every word.
    out
        A folder for one file each; without it, all is printed.
    beam
        Number of beams of a beam search; 0 takes the likeliest symbol of each frame, or the likeliest next token.
    ctc_weight
        Weight with which the beams of a task that writes token by token are ranked by the model's CTC task too, such as 0.3.
    prior
        Weight of the model's own text task, such as "-> text", where texts are ranked (CTC).
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
    from multimodal.heads import CTC
    from multimodal.shapes import ConfigError, MediaError
    from multimodal.transcription import FORMATS, transcripts

    if not files:
        raise ConfigError("transcribe: give one sound file or more behind the checkpoint")
    model = load(checkpoint, plugin, device)
    chosen = _choose_task(model, task)
    decoder = _make_beam(model, chosen, beam, prior, words)
    by_ctc = isinstance(model.packer.head(chosen), CTC)
    paths = _paths_for(files, out, FORMATS[form])
    failed = 0
    with progress_bar("reading", 0) as bar:

        def progress(index: int, done_s: float, total_s: float) -> None:
            note = f"{done_s / 60:.1f} of {total_s / 60:.1f} min"
            bar.update(done_s, note, key=index, name=files[index].name, total=total_s)

        done = transcripts(
            model,
            chosen,
            list(files),
            decoder=decoder,
            window_s=window_s,
            overlap_s=overlap_s,
            batch=batch,
            max_tokens=max_tokens,
            beams=1 if by_ctc or not beam else beam,
            ctc_weight=ctc_weight,
            progress=progress,
        )
        for index, transcript in done:
            if isinstance(transcript, MediaError):
                failed += 1
                print(f"multimodal: {files[index]}: {transcript}", file=sys.stderr)
            else:
                _put(files[index], transcript, form, paths[index], len(files) > 1)
    if failed and len(files) > 1:
        print(f"{failed} of {len(files)} files could not be read", file=sys.stderr)
    return 1 if failed else 0


def _choose_task(model: "Model", wanted: str | None) -> str:
    """The task that is named, or the only one that turns a sound into text.

    Raises:
        TaskError: none or several, or one that does not; lists what there is.
    """
    from multimodal.shapes import TaskError
    from multimodal.transcription import transcription_tasks
    from multimodal.transcription.recordings import TranscriptionTask

    if wanted is not None:
        return TranscriptionTask.of(model, choose_task(model, wanted, ())).task
    there = transcription_tasks(model)
    if not there:
        raise TaskError(
            "this checkpoint transcribes nothing: no task reads one sound and writes text by CTC or NextToken; there are "
            + ", ".join(map(repr, model.tasks))
        )
    if len(there) > 1:
        raise TaskError(f"several tasks transcribe; choose one with --task: {', '.join(map(repr, there))}")
    return there[0]


def _make_beam(model: "Model", task: str, width: int, prior: float, words: Path | None) -> "Beam | None":
    """The beam search that was asked for, or None.

    Raises:
        ConfigError: the task does not read by CTC, or the model has no task to take the prior from.
    """
    from multimodal.heads import CTC
    from multimodal.shapes import ConfigError, MediaError
    from multimodal.transcription import Beam, Lexicon, ModelLM

    if not width and not prior and not words:
        return None
    if words is not None and not words.is_file():
        raise MediaError(f"--words {words}: wanted a text file with the words that may be written; this is none")
    if not isinstance(model.packer.head(task), CTC):
        if not prior and not words:
            return None
        raise ConfigError(f"--prior and --words are for CTC; task {task!r} writes token by token, so leave them out")
    kind = model.packer.patterns[task].writes.kind
    source = None
    if prior:
        writing = [
            name
            for name, pattern in model.packer.patterns.items()
            if not pattern.reads and pattern.writes.kind == kind and model.packer.head(name).autoregressive
        ]
        if not writing:
            raise ConfigError(f"--prior {prior:g}: this model has no task '-> {kind}' that says how likely a text is")
        source = ModelLM(model, writing[0])
    lexicon = None
    if words is not None:
        try:
            lexicon = Lexicon(words.read_text(encoding="utf-8").split(), model.packer.tokenizers[kind])
        except UnicodeDecodeError as error:
            raise MediaError(f"--words {words}: this is no UTF-8 text: {error}") from error
    return Beam(width=width or 16, prior=source, weight=prior, lexicon=lexicon)


def _paths_for(files: Sequence[Path], folder: Path | None, ending: str) -> list[Path | None]:
    """Where each file's transcript goes; None: to stdout.

    Raises:
        ConfigError: two files would get the same one.
    """
    from multimodal.shapes import ConfigError

    if folder is None:
        return [None] * len(files)
    check_folder(folder)
    paths = [folder / f"{file.stem}.{ending}" for file in files]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ConfigError(
                f"{files[paths.index(path)]} and {files[i]} would both be written to {path}; rename one, or give them to two "
                "commands"
            )
    folder.mkdir(parents=True, exist_ok=True)
    return list(paths)


def _put(file: Path, transcript: "Transcript", form: str, path: Path | None, several: bool) -> None:
    """Write or print one transcript."""
    from multimodal.transcription import formatted

    text = formatted(transcript, form)
    if path is not None:
        print(saved(path.suffix, text.encode("utf-8"), path.stem, path.parent))
    elif several and form == "json":
        print_json({"file": str(file), **asdict(transcript)})  # an object a line
    else:
        print(f"== {file}\n{text}" if several else text, end="")
    if not transcript.complete:
        print(f"{file}: a part of the text was stopped at --max-tokens, before its end", file=sys.stderr)
