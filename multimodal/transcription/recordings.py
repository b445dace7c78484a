"""Transcribes recordings of any length.

sound --blocks--> windows of all sounds --batches--> rows of logits (CTC) or texts (NextToken) --> one Transcript a sound

Memory: a few blocks, one batch of windows, and the rows of one passage (see `WordDecoder`), however long the sounds are.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from multimodal.data.sources import in_batches
from multimodal.heads import CTC
from multimodal.media import sound_blocks
from multimodal.model import Model
from multimodal.process_state import preserved_state
from multimodal.shapes import ConfigError, MediaError, StreamError, TaskError, check_number, check_whole
from multimodal.stream import Stream
from multimodal.tokenizer import Tokenizer
from multimodal.transcription.alignment import WordDecoder, WordJoiner, align
from multimodal.transcription.ctc import Decoder, GreedyCTC, log_probabilities
from multimodal.transcription.transcript import Transcript, Word

Progress = Callable[[int, float, float], None]
"""Called with the index of a sound, the seconds of it that are read, and its seconds in all."""


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
    beams: int = 1,
    ctc_weight: float = 0.0,
    progress: Progress | None = None,
) -> list[Transcript]:
    """A transcript of each sound; `transcripts` describes the settings.

    sounds: files of any length, or other values that `media.read_sound` takes, such as pairs (wave, rate in Hz).

    Raises:
        MediaError: a sound that cannot be read. ConfigError, TaskError: a task or settings that cannot transcribe.

    Examples:
        >>> transcript = mm.transcribe(model, "audio -> text", [(wave, 8000)])[0]  # or ["talk.flac"]
        >>> transcript.seconds
        2.0
        >>> subtitles = transcript.srt()
    """
    # a pair (wave, rate) is one sound
    if not isinstance(sounds, (list, tuple)) or (len(sounds) == 2 and isinstance(sounds[1], int)):
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
        beams=beams,
        ctc_weight=ctc_weight,
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
    beams: int = 1,
    ctc_weight: float = 0.0,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Transcript | MediaError]]:
    """Yields (index, transcript or the error of that sound) for every sound, as each is finished.

    A CTC task reads windows of window_s that overlap their neighbours by overlap_s (4 s, or a quarter of a short window). The rows
    of two neighbours meet in the middle of their overlap, and all rows of a sound are decoded together. A task that writes token
    by token reads windows of at most window_s that end at a quiet token in their last quarter, with max_tokens for each window.
    Its words get their times from a CTC task that reads the same field, if the model has one; otherwise those of their window.

    decoder: decodes CTC rows (`GreedyCTC` unless given). batch: windows that the model reads at once.
    beams: of a task that writes token by token. ctc_weight: with which they are ranked by that CTC task too, see `Model.generate`.

    Raises:
        ConfigError, TaskError: a task or settings that cannot transcribe.
    """
    spec = TranscriptionTask.of(model, task)
    check_whole("transcribe", least=1, batch=batch)
    check_whole("transcribe", max_tokens=max_tokens)
    check_number("transcribe", window_s=window_s, **({} if overlap_s is None else {"overlap_s": overlap_s}))
    length, overlap = window_tokens(spec, window_s, min(4.0, window_s / 4) if overlap_s is None else overlap_s)
    if decoder is not None and not spec.ctc:
        raise ConfigError(f"transcribe: task {task!r} writes token by token and takes no decoder; leave it out")
    if spec.ctc and (beams != 1 or ctc_weight):
        raise ConfigError(
            f"transcribe: task {task!r} reads by CTC alone; leave beams and ctc_weight out, and give decoder=Beam(width)"
        )
    if ctc_weight and spec.timing is None:
        raise ConfigError(
            f"transcribe: ctc_weight={ctc_weight} needs a task with the head CTC() that reads the same sound, and this model has "
            "none"
        )
    writing: dict[str, Any] = {"max_tokens": max_tokens, "beams": beams}
    if ctc_weight and spec.timing is not None:
        writing["ctc"] = (spec.timing.task, ctc_weight)
    if overlap_s is not None and not spec.ctc:
        raise ConfigError(
            f"transcribe: task {task!r} reads windows that end at quiet places and share nothing; leave overlap_s={overlap_s} out"
        )

    def windows() -> Iterator[tuple[int, SoundWindow | MediaError]]:
        for index, sound in enumerate(sounds):
            try:
                for window in sound_windows(spec, sound, length, overlap):
                    # encoding raises an error here, for this sound alone, instead of for the whole batch
                    spec.tokenizer((window.wave_S, spec.rate_hz))
                    yield index, window
            except MediaError as error:
                yield index, error

    # a batch may hold windows of several sounds, so several transcripts are open at once
    open_: dict[int, CTCTranscript | GeneratedTranscript] = {}
    for group in in_batches(windows(), batch):
        good = [window for _, window in group if isinstance(window, SoundWindow)]
        results = iter(_read(model, spec, good, writing))
        for index, window in group:
            if isinstance(window, MediaError):
                open_.pop(index, None)
                yield index, window
                continue
            if index not in open_:
                open_[index] = CTCTranscript(spec, decoder or GreedyCTC()) if spec.ctc else GeneratedTranscript(spec)
            open_[index].add(window, next(results))
            end = window.start + len(window.wave_S)
            if progress is not None:
                progress(index, end / spec.rate_hz, max(window.total, end) / spec.rate_hz)
            if window.last:
                yield index, open_.pop(index).finish(end / spec.rate_hz)


@dataclass(frozen=True)
class TranscriptionTask:
    """A task that turns one sound into text.

    task: its name.
    name: of the field that it reads.
    kind: of that field.
    tokenizer: of the sound.
    writes: the tokenizer of the text.
    rate_hz: samples a second.
    unit: samples a token.
    step_s: seconds a token.
    ctc: whether its head is CTC.
    timing: of a task without CTC, a CTC task that reads the same field and gives words their times.
    """

    task: str
    name: str
    kind: str
    tokenizer: Tokenizer
    writes: Tokenizer
    rate_hz: int
    unit: int
    step_s: float
    ctc: bool
    timing: "TranscriptionTask | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, model: Model, task: str) -> "TranscriptionTask":
        """The task of this name; raises a ConfigError or TaskError, with the reason, unless it transcribes."""
        model.packer.check_task(task)
        found = cls._without_timing(model, task)
        others = [t for t in model.tasks if t != task] if not found.ctc else []
        for other in others:
            try:
                timing = cls._without_timing(model, other)
            except ConfigError:
                continue
            if timing.ctc and (timing.name, timing.kind) == (found.name, found.kind):
                return replace(found, timing=timing)
        return found

    @classmethod
    def _without_timing(cls, model: Model, task: str) -> "TranscriptionTask":
        pattern, head = model.packer.patterns[task], model.packer.head(task)
        if len(pattern.reads) != 1:
            raise TaskError(f"transcribe: task {task!r} reads {len(pattern.reads)} fields; wanted one sound")
        read = pattern.reads[0]
        if read.many:
            raise TaskError(f"transcribe: task {task!r} reads a list of {read.kind!r}; wanted one sound")
        tokenizer, writes = model.packer.tokenizers[read.kind], model.packer.tokenizers[pattern.writes.kind]
        rate_hz = getattr(tokenizer, "rate_hz", None)
        if not isinstance(rate_hz, int):
            raise TaskError(
                f"transcribe: task {task!r} reads {read.kind!r}, which is no sound: {type(tokenizer).__name__} has no rate_hz"
            )
        if not isinstance(head, CTC) and not head.autoregressive:
            raise TaskError(
                f"transcribe: task {task!r} answers by {type(head).__name__}, which writes no text; wanted CTC or NextToken"
            )
        trim_db = getattr(tokenizer, "trim_db", None)
        if trim_db is not None:
            raise ConfigError(
                f"transcribe: {type(tokenizer).__name__} leaves out the silence at both ends of a sound (trim_db="
                f"{trim_db}), so that the times of its words are not known; train with trim_db=None"
            )
        samples = tokenizer.step[0] * rate_hz
        unit = round(samples)
        if unit < 1 or abs(samples - unit) > 1e-3:
            raise ConfigError(
                f"transcribe: a token of {type(tokenizer).__name__} lasts {samples:g} samples, so that windows cannot end where "
                "tokens do; choose a hop that is a whole number of samples"
            )
        return cls(task, read.name, read.kind, tokenizer, writes, rate_hz, unit, unit / rate_hz, isinstance(head, CTC))


def transcription_tasks(model: Model) -> list[str]:
    """The tasks of a model that transcribe."""
    found = []
    for task in model.tasks:
        try:
            TranscriptionTask.of(model, task)
        except ConfigError:
            continue
        found.append(task)
    return found


def window_tokens(spec: TranscriptionTask, window_s: float, overlap_s: float) -> tuple[int, int]:
    """Window and overlap in tokens."""
    if not 0 < overlap_s < window_s < math.inf:
        raise ConfigError(f"transcribe: overlap_s={overlap_s} must lie between 0 and window_s={window_s}")
    window, overlap = int(window_s / spec.step_s + 1e-6), int(overlap_s / spec.step_s + 1e-6)
    if window < 4 or overlap < 2:
        raise ConfigError(
            f"transcribe: a token lasts {spec.step_s:g} s, so that window_s={window_s} is {window} tokens and "
            f"overlap_s={overlap_s} is {overlap}; use {8 * spec.step_s:g} s and {2 * spec.step_s:g} s or more"
        )
    if window > spec.tokenizer.max_tokens:
        raise ConfigError(
            f"transcribe: window_s={window_s} is {window} tokens, more than max_tokens={spec.tokenizer.max_tokens} of "
            f"{type(spec.tokenizer).__name__}; use at most {spec.tokenizer.max_tokens * spec.step_s:g} s"
        )
    return window, overlap


@dataclass(frozen=True)
class SoundWindow:
    """A part of a sound that the model reads at once.

    wave_S: its samples.
    start: the index of its first sample in the sound.
    first, stop: the range of its rows that are decoded; the others belong to its neighbours.
    last: whether the sound ends with it.
    total: number of samples of the whole sound by its header; 0 if unknown.
    """

    wave_S: Tensor
    start: int
    first: int
    stop: int | None
    last: bool
    total: int


def sound_windows(
    spec: TranscriptionTask, sound: Any, length: int, overlap: int, max_seconds: float = math.inf
) -> Iterator[SoundWindow]:
    """The windows of a recording, of at most `length` tokens; those of a CTC task share `overlap` tokens.

    Raises:
        MediaError: as `media.sound_blocks`; a sound of more than max_seconds.
    """
    resampling = getattr(spec.tokenizer, "resampling", "kaiser")
    options = {"rate_hz": spec.rate_hz, "who": "transcribe", "max_seconds": max_seconds, "resampling": resampling}
    blocks = sound_blocks(sound, **options)
    if spec.ctc:
        return overlapping_windows(blocks, window=length, overlap=overlap, unit=spec.unit)
    return windows_between_pauses(blocks, window=length, search=max(length // 4, 1), unit=spec.unit)


def overlapping_windows(
    blocks: Iterator[tuple[Tensor, int]], *, window: int, overlap: int, unit: int
) -> Iterator[SoundWindow]:
    """Windows of `window` tokens that share `overlap` tokens with their neighbours; a token is `unit` samples.

    The decoded rows of neighbours meet in the middle of their overlap.
    """
    half, first, start = overlap // 2, 0, 0
    waiting, total = torch.empty(0), 0
    for block_S, total in blocks:
        waiting = torch.cat([waiting, block_S])
        while len(waiting) > window * unit:
            yield SoundWindow(waiting[: window * unit].clone(), start, first, window - overlap + half, False, total)
            start += (window - overlap) * unit
            waiting, first = waiting[(window - overlap) * unit :], half
    if len(waiting):
        yield SoundWindow(waiting, start, first, None, True, total)


def windows_between_pauses(
    blocks: Iterator[tuple[Tensor, int]], *, window: int, search: int, unit: int
) -> Iterator[SoundWindow]:
    """Adjacent windows of at most `window` tokens; each ends at the quietest of the last `search` tokens that it may have."""
    start = 0
    waiting, total = torch.empty(0), 0
    for block_S, total in blocks:
        waiting = torch.cat([waiting, block_S])
        while len(waiting) > window * unit:
            zone_NS = waiting[(window - search) * unit : window * unit].view(search, unit)
            energy_N = zone_NS.square().mean(1)
            # the quietest neighbourhood of 5 tokens; among equal ones its quietest token
            around_N = torch.nn.functional.avg_pool1d(energy_N[None], 5, 1, 2, count_include_pad=False)[0]
            quiet = int((around_N + 1e-3 * energy_N).argmin())
            end = max(window - search + quiet, 1) * unit
            yield SoundWindow(waiting[:end].clone(), start, 0, None, False, total)
            start += end
            waiting = waiting[end:]
    if len(waiting):
        yield SoundWindow(waiting, start, 0, None, True, total)


def _read(model: Model, spec: TranscriptionTask, windows: list[SoundWindow], writing: Mapping[str, Any]) -> list[Any]:
    """For each window its rows and their times, or a prediction with the rows of the CTC task that gives times.

    writing: the options of `Model.generate`.
    """
    if not windows:
        return []
    samples = [{spec.name: (window.wave_S, spec.rate_hz)} for window in windows]
    if spec.ctc:
        return _ctc_rows(model, spec, samples)
    answers = model.generate(spec.task, samples, **writing, batch=len(samples))
    rows = _ctc_rows(model, spec.timing, samples) if spec.timing else [None] * len(samples)
    return list(zip(answers, rows, strict=True))


def _ctc_rows(model: Model, spec: TranscriptionTask, samples: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities (N, V) and times (N,) in seconds, float64, of each sample."""
    with model.inference_mode():
        stream = model.pack(spec.task, samples, answers=False)
        logits = model.logits(stream)[spec.task]
        sizes = [len(sample[spec.name][0]) for sample in samples]
        found = window_rows(spec, stream, logits, dict(enumerate(sizes)))
    return [found[i] for i in range(len(samples))]


def window_rows(
    spec: TranscriptionTask, stream: Stream, logits_NV: Tensor, sizes: Mapping[int, int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """By the number of a window in a packed stream: its log-probabilities (N, V), and their times (N,) in seconds, float64.

    logits_NV: those of the CTC task. sizes: by number, the sound samples of a window; other windows of the task are left out.
    """
    r = stream.readings[spec.task]
    log_p_NV = log_probabilities(logits_NV)
    # seconds / step is seldom whole in float32
    step_N = stream.position_TA[r.row_N, 0].double().cpu().round(decimals=3)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    parts = zip(r.samples, log_p_NV.split(list(r.lengths)), step_N.split(list(r.lengths)), strict=True)
    for number, rows_NV, at_N in parts:
        if number not in sizes:
            continue
        tokens = -(-sizes[number] // spec.unit)
        if len(rows_NV) != tokens:
            raise StreamError(
                f"transcribe: {type(spec.tokenizer).__name__} gave {len(rows_NV)} rows for a sound of {tokens} steps; long "
                "sounds need a tokenizer that gives one token for each step"
            )
        found[number] = rows_NV, at_N * spec.step_s
    return found


class CTCTranscript:
    """The transcript of one sound by a CTC task, built window by window."""

    def __init__(self, spec: TranscriptionTask, decoder: Decoder) -> None:
        self.rate_hz, self.decoder = spec.rate_hz, WordDecoder(decoder, spec.writes, spec.step_s)

    def add(self, window: SoundWindow, rows: tuple[Tensor, Tensor]) -> None:
        log_p_NV, time_N = (x[window.first : window.stop] for x in rows)
        self.decoder.push(log_p_NV, time_N + window.start / self.rate_hz)

    def finish(self, seconds: float) -> Transcript:
        words = _within(self.decoder.finish(), seconds)
        return Transcript(" ".join(word.text for word in words), words, seconds)


class GeneratedTranscript:
    """The transcript of one sound by a task that writes token by token, built window by window."""

    def __init__(self, spec: TranscriptionTask) -> None:
        self.spec, self.complete = spec, True
        self.words: list[Word] = []
        self.of_window: set[int] = set()  # the words that have the times of their whole window
        self.joiner = WordJoiner(spec.timing.writes) if spec.timing else None

    def add(self, window: SoundWindow, result: tuple[Any, tuple[Tensor, Tensor] | None]) -> None:
        answer, rows = result
        if not isinstance(answer.value, str):
            raise ConfigError(
                f"transcribe: task {self.spec.task!r} writes {type(answer.value).__name__}, and text was wanted"
            )
        self.complete &= answer.complete
        start_s = window.start / self.spec.rate_hz
        words = self._aligned(answer.value, rows, start_s) if rows else None
        if words is None:
            end_s = (window.start + len(window.wave_S)) / self.spec.rate_hz
            count = len(self.spec.writes(answer.value)) + 1 if answer.value else 1  # the stop is a token too
            sure = answer.confidence ** (1 / count)
            words = [Word(text, start_s, end_s, sure) for text in answer.value.split()]
            self.of_window |= set(range(len(self.words), len(self.words) + len(words)))
        self.words += words

    def _aligned(self, text: str, rows: tuple[Tensor, Tensor], start_s: float) -> list[Word] | None:
        """The text's words with the times of a CTC alignment, or None where the rows cannot hold the text."""
        if not text.split():
            return []
        assert self.spec.timing is not None
        assert self.joiner is not None
        log_p_NV, time_N = rows
        try:
            ids = self.spec.timing.writes(" ".join(text.split())).content.tolist()
            spoken = align(log_p_NV, ids, time_N + start_s, self.spec.step_s)
        except (StreamError, MediaError):  # too long for the rows, or letters that the CTC task does not have
            return None
        words = self.joiner.join(spoken, last=True)[0]
        # the CTC task may spell words in another way, and times of other words would be wrong
        return words if [word.text for word in words] == text.split() else None

    def finish(self, seconds: float) -> Transcript:
        words = _within(self.words, seconds)
        return Transcript(" ".join(word.text for word in words), words, seconds, self.complete)


def _within(words: Sequence[Word], seconds: float) -> tuple[Word, ...]:
    """Words that end with the sound at the latest; the last token is padded past its end."""
    return tuple(Word(w.text, w.start_s, min(w.end_s, seconds), w.confidence) for w in words)
