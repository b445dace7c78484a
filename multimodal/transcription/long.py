"""Sounds of any length to text: windows in batches, laid end to end, decoded once.

sound --blocks--> pieces of all sounds --batches--> rows of logits (CTC) or texts (NextToken) --> one Transcript a sound

Memory: a few blocks, one batch of pieces, and the rows of one passage (see `Reader`), however long the sounds are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from multimodal.heads import CTC
from multimodal.media import sound_blocks
from multimodal.model import Model
from multimodal.process_state import preserved_state
from multimodal.shapes import ConfigError, MediaError, StreamError, TaskError, check_number, check_whole
from multimodal.tokenizer import Tokenizer
from multimodal.transcription.alignment import Speller, align
from multimodal.transcription.ctc import Decoder, Greedy, log_p_of
from multimodal.transcription.reader import Reader
from multimodal.transcription.sound import Piece, at_quiet_places, overlapping
from multimodal.transcription.transcript import Transcript, Word

Progress = Callable[[int, float, float], None]
"""Called with: which sound, seconds of it that are read, seconds it has."""


@preserved_state()
def transcribe(
    model: Model,
    task: str,
    sounds: Sequence[Any],
    *,
    decoder: Decoder | None = None,
    window_s: float = 30.0,
    overlap_s: float | None = None,
    batch: int = 8,
    max_tokens: int = 256,
    progress: Progress | None = None,
) -> list[Transcript]:
    """One transcript a sound; the settings are those of `transcripts`, which says what each does.

    sounds: files of any length, or other values that `media.read_sound` takes, such as pairs (wave, rate in Hz).

    Raises:
        MediaError: a sound that cannot be read. ConfigError, TaskError: a task or settings that cannot transcribe.
    """
    if not isinstance(sounds, (list, tuple)) or (
        len(sounds) == 2 and isinstance(sounds[1], int)  # a pair (wave, rate) is one sound
    ):
        raise ConfigError(f"transcribe: give a list of sounds, not {type(sounds).__name__}; one sound is a list of one")
    found: dict[int, Transcript] = {}
    every = transcripts(
        model,
        task,
        sounds,
        decoder=decoder,
        window_s=window_s,
        overlap_s=overlap_s,
        batch=batch,
        max_tokens=max_tokens,
        progress=progress,
    )
    for index, transcript in every:
        if isinstance(transcript, MediaError):
            raise transcript
        found[index] = transcript
    return [found[i] for i in range(len(sounds))]


def transcripts(
    model: Model,
    task: str,
    sounds: Sequence[Any],
    *,
    decoder: Decoder | None = None,
    window_s: float = 30.0,
    overlap_s: float | None = None,
    batch: int = 8,
    max_tokens: int = 256,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Transcript | MediaError]]:
    """(index, transcript or what is wrong with that sound) of every sound, as they are finished.

    A CTC task reads windows of window_s that share overlap_s with their neighbours (4 s, or a quarter of a short window). The
    rows of two neighbours meet in the middle of what they share, and all rows of a sound are decoded as one. A task that
    writes token by token reads pieces of at most window_s that end at a quiet place in their last quarter; max_tokens is a
    piece's. Its words take their times from a CTC task that reads the same, where the model has one; otherwise they have their
    piece's.

    decoder: how CTC rows are read (`Greedy` unless given). batch: pieces the model reads at once.

    Raises:
        ConfigError, TaskError: a task or settings that cannot transcribe.
    """
    reading = Hearing.of(model, task)
    check_whole("transcribe", batch=batch, max_tokens=max_tokens)
    check_number("transcribe", window_s=window_s, **({} if overlap_s is None else {"overlap_s": overlap_s}))
    if batch < 1:
        raise ConfigError(f"transcribe: batch={batch} must be at least 1")
    window, overlap = _tokens(reading, window_s, min(4.0, window_s / 4) if overlap_s is None else overlap_s)
    if decoder is not None and not reading.ctc:
        raise ConfigError(f"transcribe: task {task!r} writes token by token and takes no decoder; leave it out")
    if overlap_s is not None and not reading.ctc:
        raise ConfigError(
            f"transcribe: task {task!r} reads pieces that end at quiet places and share nothing; leave overlap_s={overlap_s} out"
        )

    def pieces() -> Iterator[tuple[int, Piece | MediaError]]:
        for index, sound in enumerate(sounds):
            try:
                blocks = sound_blocks(
                    sound,
                    rate_hz=reading.rate_hz,
                    who="transcribe",
                    resampling=getattr(reading.tokenizer, "resampling", "kaiser"),
                )
                if reading.ctc:
                    cut = overlapping(blocks, window=window, overlap=overlap, unit=reading.unit)
                else:
                    cut = at_quiet_places(blocks, window=window, search=max(window // 4, 1), unit=reading.unit)
                for piece in cut:
                    reading.tokenizer((piece.wave_S, reading.rate_hz))  # complains here, so that the other sounds go on
                    yield index, piece
            except MediaError as error:
                yield index, error

    open_: dict[int, _Rows | _Texts] = {}
    for group in _batched(pieces(), batch):
        good = [piece for _, piece in group if isinstance(piece, Piece)]
        results = iter(_read(model, reading, good, max_tokens))
        for index, piece in group:
            if isinstance(piece, MediaError):
                open_.pop(index, None)
                yield index, piece
                continue
            if index not in open_:
                open_[index] = _Rows(reading, decoder or Greedy()) if reading.ctc else _Texts(reading)
            open_[index].add(piece, next(results))
            end = piece.start + len(piece.wave_S)
            if progress is not None:
                progress(index, end / reading.rate_hz, max(piece.total, end) / reading.rate_hz)
            if piece.last:
                yield index, open_.pop(index).finish(end / reading.rate_hz)


@dataclass(frozen=True)
class Hearing:
    """A task that turns one sound into text, and what there is to know of it."""

    task: str
    name: str  # of the field that is read
    kind: str  # of sound
    tokenizer: Tokenizer
    writes: Tokenizer
    rate_hz: int
    unit: int  # samples a token
    step_s: float  # seconds a token
    ctc: bool
    twin: "Hearing | None" = field(default=None, repr=False)  # a CTC task that reads the same, for times

    @classmethod
    def of(cls, model: Model, task: str) -> "Hearing":
        """Raises a ConfigError or TaskError, with the reason, unless the task transcribes."""
        model.packer.check_task(task)
        found = cls._plain(model, task)
        twins = [t for t in model.tasks if t != task] if not found.ctc else []
        for other in twins:
            try:
                twin = cls._plain(model, other)
            except ConfigError:
                continue
            if twin.ctc and (twin.name, twin.kind) == (found.name, found.kind):
                return cls(**{**vars(found), "twin": twin})
        return found

    @classmethod
    def _plain(cls, model: Model, task: str) -> "Hearing":
        pattern, head = model.packer.patterns[task], model.packer.head(task)
        if len(pattern.reads) != 1:
            raise TaskError(f"transcribe: task {task!r} reads {len(pattern.reads)} fields; wanted one sound")
        read = pattern.reads[0]
        tokenizer, writes = model.packer.tokenizers[read.kind], model.packer.tokenizers[pattern.writes.kind]
        rate_hz = getattr(tokenizer, "rate_hz", None)
        if not isinstance(rate_hz, int):
            raise TaskError(
                f"transcribe: task {task!r} reads {read.kind!r}, which is no sound: {type(tokenizer).__name__} has no rate_hz"
            )
        if not isinstance(head, CTC) and not head.writes:
            raise TaskError(
                f"transcribe: task {task!r} answers by {type(head).__name__}, which writes no text; wanted CTC or NextToken"
            )
        samples = tokenizer.step[0] * rate_hz
        unit = round(samples)
        if unit < 1 or abs(samples - unit) > 1e-3:
            raise ConfigError(
                f"transcribe: a token of {type(tokenizer).__name__} lasts {samples:g} samples, so that windows cannot end where "
                "tokens do; choose a hop that is a whole number of samples"
            )
        return cls(task, read.name, read.kind, tokenizer, writes, rate_hz, unit, unit / rate_hz, isinstance(head, CTC))


def hearing_tasks(model: Model) -> list[str]:
    """The tasks of a model that transcribe."""
    found = []
    for task in model.tasks:
        try:
            Hearing.of(model, task)
        except ConfigError:
            continue
        found.append(task)
    return found


def _tokens(reading: Hearing, window_s: float, overlap_s: float) -> tuple[int, int]:
    """Window and overlap in tokens."""
    if not 0 < overlap_s < window_s < math.inf:
        raise ConfigError(f"transcribe: overlap_s={overlap_s} must lie between 0 and window_s={window_s}")
    window, overlap = int(window_s / reading.step_s + 1e-6), int(overlap_s / reading.step_s + 1e-6)
    if window < 4 or overlap < 2:
        raise ConfigError(
            f"transcribe: a token lasts {reading.step_s:g} s, so that window_s={window_s} is {window} tokens and "
            f"overlap_s={overlap_s} is {overlap}; use {8 * reading.step_s:g} s and {2 * reading.step_s:g} s or more"
        )
    if window > reading.tokenizer.max_tokens:
        raise ConfigError(
            f"transcribe: window_s={window_s} is {window} tokens, more than max_tokens={reading.tokenizer.max_tokens} of "
            f"{type(reading.tokenizer).__name__}; use at most {reading.tokenizer.max_tokens * reading.step_s:g} s"
        )
    return window, overlap


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _read(model: Model, reading: Hearing, pieces: list[Piece], max_tokens: int) -> list[Any]:
    """What the model makes of each piece: its rows and their times, or a prediction with the rows of the twin."""
    if not pieces:
        return []
    samples = [{reading.name: (piece.wave_S, reading.rate_hz)} for piece in pieces]
    if reading.ctc:
        return _rows(model, reading, samples)
    answers = model.generate(reading.task, samples, max_tokens=max_tokens, batch=len(samples))
    rows = _rows(model, reading.twin, samples) if reading.twin else [None] * len(samples)
    return list(zip(answers, rows, strict=True))


def _rows(model: Model, reading: Hearing, samples: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities (N, V) and times (N,) in seconds, float64, of each sample."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with model.resting():
        stream = model.pack(reading.task, samples, answers=False)
        r = stream.readings[reading.task]
        log_p_NV = log_p_of(model.logits(stream)[reading.task])
        step_N = stream.position_TA[r.row_N, 0].double().cpu().round(decimals=3)  # seconds / step is seldom whole
    parts = zip(r.samples, log_p_NV.split(list(r.lengths)), step_N.split(list(r.lengths)), strict=True)
    for index, rows_NV, at_N in parts:
        tokens = -(-len(samples[index][reading.name][0]) // reading.unit)
        if len(rows_NV) != tokens:
            raise StreamError(
                f"transcribe: {type(reading.tokenizer).__name__} gave {len(rows_NV)} rows for a sound of {tokens} steps; long "
                "sounds need a tokenizer that gives one token for each step"
            )
        found[index] = rows_NV, at_N * reading.step_s
    return [found[i] for i in range(len(samples))]


class _Rows:
    """A sound on its way through a CTC task."""

    def __init__(self, reading: Hearing, decoder: Decoder) -> None:
        self.rate_hz, self.reader = reading.rate_hz, Reader(decoder, reading.writes, reading.step_s)

    def add(self, piece: Piece, rows: tuple[Tensor, Tensor]) -> None:
        log_p_NV, time_N = (x[piece.first : piece.stop] for x in rows)
        self.reader.push(log_p_NV, time_N + piece.start / self.rate_hz)

    def finish(self, seconds: float) -> Transcript:
        words = _within(self.reader.finish(), seconds)
        return Transcript(" ".join(word.text for word in words), words, seconds)


class _Texts:
    """A sound on its way through a task that writes token by token."""

    def __init__(self, reading: Hearing) -> None:
        self.reading, self.words, self.complete = reading, [], True
        self.speller = Speller(reading.twin.writes) if reading.twin else None

    def add(self, piece: Piece, result: tuple[Any, tuple[Tensor, Tensor] | None]) -> None:
        answer, rows = result
        if not isinstance(answer.value, str):
            raise ConfigError(
                f"transcribe: task {self.reading.task!r} writes {type(answer.value).__name__}, and text was wanted"
            )
        self.complete &= answer.complete
        start_s = piece.start / self.reading.rate_hz
        words = self._aligned(answer.value, rows, start_s) if rows else None
        if words is None:
            end_s = (piece.start + len(piece.wave_S)) / self.reading.rate_hz
            count = len(self.reading.writes(answer.value)) + 1 if answer.value else 1  # the stop is one more
            sure = answer.confidence ** (1 / count)
            words = [Word(text, start_s, end_s, sure) for text in answer.value.split()]
        self.words += words

    def _aligned(self, text: str, rows: tuple[Tensor, Tensor], start_s: float) -> list[Word] | None:
        """The text's words with the times that CTC gives them, or None where its rows cannot hold the text."""
        if not text.split():
            return []
        assert self.reading.twin is not None
        assert self.speller is not None
        log_p_NV, time_N = rows
        try:
            ids = self.reading.twin.writes(" ".join(text.split())).content.tolist()
            spoken = align(log_p_NV, ids, time_N + start_s, self.reading.step_s)
        except (StreamError, MediaError):  # too long for the rows, or letters that the other task does not have
            return None
        words = self.speller.gather(spoken, last=True)[0]
        return words if [word.text for word in words] == text.split() else None

    def finish(self, seconds: float) -> Transcript:
        words = _within(self.words, seconds)
        return Transcript(" ".join(word.text for word in words), words, seconds, self.complete)


def _within(words: Sequence[Word], seconds: float) -> tuple[Word, ...]:
    """The last token reaches past the sound's end; its word does not."""
    return tuple(Word(w.text, w.start_s, min(w.end_s, seconds), w.confidence) for w in words)
