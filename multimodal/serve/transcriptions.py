"""POST /v1/audio/transcriptions: the transcript of a sound file, with the times of its words."""

import re
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import PlainTextResponse

from multimodal.generate import Piece
from multimodal.media.sources import paths_refused
from multimodal.serve.answers import EventStream, event, json_response, usage
from multimodal.serve.bodies import Params
from multimodal.serve.calls import Call
from multimodal.serve.checkpoints import Checkpoints
from multimodal.serve.errors import REFUSED, bad
from multimodal.serve.options import WritingOptions, refuse_options, writing_options
from multimodal.serve.settings import Settings
from multimodal.serve.tasks import choose_task, task_views
from multimodal.serve.values import Upload
from multimodal.texts import shortened
from multimodal.transcription import GreedyCTC, Transcript, formatted, transcription_tasks
from multimodal.transcription.recordings import (
    CTCTranscript,
    GeneratedTranscript,
    SoundWindow,
    TranscriptionTask,
    sound_windows,
    window_tokens,
)

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
AHEAD = 4  # windows of a recording whose jobs are submitted at the same time
TYPES = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}


async def transcribe_file(call: Call, checkpoints: Checkpoints, params: Params) -> Any:
    """The transcript in the requested format, or with `stream` its words as events while windows are read."""
    call.enter(checkpoints.named(params.text("model")))
    file = params.take("file")
    if file is None:
        raise params.missing("file", "file: wanted a sound file, as a part of multipart/form-data: -F file=@talk.wav")
    if not isinstance(file, Upload):
        raise bad("file: wanted a sound file, as a part of multipart/form-data with a file name", "file")
    there = set(transcription_tasks(call.model))
    view = choose_task(
        task_views(call.model),
        params.text("task"),
        lambda view: view.task in there,
        "transcribes one sound",
    )
    spec = TranscriptionTask.of(call.model, view.task)
    form = params.text("response_format", "json", FORMATS)
    stream, wants_words, wants_segments = params.flag("stream"), *_granularities(params, form, spec)
    if stream and form not in ("json", "text"):
        raise bad(f"stream: response_format={form} cannot be streamed; use json or text", "stream")
    params.without("no model here takes the language", language=("",))
    params.without("no model here reads a prompt beside the sound", prompt=("",))
    params.without("probabilities of tokens are not given", include=([],))
    params.without("the service cuts recordings itself", chunking_strategy=("auto",))
    params.without("speakers are not distinguished", known_speaker_names=([],), known_speaker_references=([],))
    options = None
    if spec.ctc:
        refuse_options(params, view.task)
    else:
        options = writing_options(params, call.model, view.task, 1)
    params.done()
    call.task = view.task
    windows = await call.in_pool(_windows, spec, file.data, call.settings)
    if stream:
        return _streamed(call, spec, windows, options)
    transcript, maker = None, _maker(spec)
    async for _, found in _read(call, spec, windows, options, maker, words=False):
        transcript = found or transcript
    assert transcript is not None
    if form in TYPES:
        return PlainTextResponse(formatted(transcript, form), media_type=TYPES[form])
    counts = {"usage": {"type": "tokens", **_usage(call)}}
    if form == "json":
        return json_response({"text": transcript.text, **counts})
    of_window = maker.of_window if isinstance(maker, GeneratedTranscript) else set()
    return json_response({**_verbose(transcript, of_window, wants_words, wants_segments), **counts})


def _granularities(params: Params, form: str, spec: TranscriptionTask) -> tuple[bool, bool]:
    """Return (whether times of words are wanted, whether times of segments are)."""
    given = params.texts("timestamp_granularities")
    for name in given:
        if name not in ("word", "segment"):
            raise bad(f"timestamp_granularities: {name!r} is neither word nor segment", "timestamp_granularities")
    if given and form != "verbose_json":
        raise bad(
            f"timestamp_granularities: response_format={form} has no place for them; use verbose_json",
            "timestamp_granularities",
        )
    if "word" in given and not (spec.ctc or spec.timing):
        raise bad(
            f"timestamp_granularities: task {spec.task!r} writes token by token, and this model has no CTC task of the same sound "
            "that would give its words times; ask for segment",
            "timestamp_granularities",
            "unsupported_value",
        )
    return "word" in given, "segment" in given or not given


def _windows(spec: TranscriptionTask, data: bytes, settings: Settings) -> list[SoundWindow]:
    longest = spec.tokenizer.max_tokens * spec.step_s
    window_s = min(settings.window_s, longest)
    length, overlap = window_tokens(spec, window_s, min(4.0, window_s / 4))
    try:
        with paths_refused():
            return list(sound_windows(spec, data, length, overlap, settings.max_seconds))
    except REFUSED as error:
        raise bad(f"file: {shortened(error, 500)}", "file") from None


def _maker(spec: TranscriptionTask) -> CTCTranscript | GeneratedTranscript:
    return CTCTranscript(spec, GreedyCTC()) if spec.ctc else GeneratedTranscript(spec)


async def _read(
    call: Call,
    spec: TranscriptionTask,
    windows: list[SoundWindow],
    options: WritingOptions | None,
    maker: CTCTranscript | GeneratedTranscript,
    words: bool,
) -> AsyncGenerator[tuple[str, Transcript | None]]:
    """Yield (text that became final, None) while windows are read, then ("", the transcript). words: whether to yield such text."""
    jobs: list[
        list[int]
    ] = []  # numbers of the jobs of each window: its text or CTC rows, then the CTC rows for word times, if any
    results: dict[int, Any] = {}
    texts: dict[int, str] = {}
    joined = _Joined()
    for i, window in enumerate(windows):
        while len(jobs) < min(i + AHEAD, len(windows)):
            jobs.append(await _ask(call, spec, windows[len(jobs)], options))
        while any(number not in results for number in jobs[i]):
            number, found = await call.next()
            if isinstance(found, Piece):
                texts[number] = texts.get(number, "") + found.text
                if found.prediction is not None:
                    results[number] = found.prediction
            else:
                results[number] = found
            if words and options is not None and (new := joined.push(texts.pop(jobs[i][0], ""))):
                yield new, None
        answers = [results.pop(number) for number in jobs[i]]
        if options is None:
            await call.in_pool(maker.add, window, answers[0])
        else:
            await call.in_pool(maker.add, window, (answers[0], answers[1] if spec.timing else None))
            if words and (new := joined.push(texts.pop(jobs[i][0], "") + " ")):
                yield new, None
        if words and isinstance(maker, CTCTranscript):
            await call.in_pool(maker.decoder.settle)
            if new := joined.words([word.text for word in maker.decoder.words]):
                yield new, None
    last = windows[-1]
    seconds = (last.start + len(last.wave_S)) / spec.rate_hz
    transcript = await call.in_pool(maker.finish, seconds)
    if words and (new := transcript.text[len(joined.text) :]):
        yield new, None
    yield "", transcript


async def _ask(call: Call, spec: TranscriptionTask, window: SoundWindow, options: WritingOptions | None) -> list[int]:
    """Submit the jobs of a window; returns their numbers."""
    if options is None:
        return [await call.read_window(spec, window.wave_S)]
    sample = {spec.name: (window.wave_S, spec.rate_hz)}
    jobs = [await call.write_sample(spec.task, sample, options)]
    return [*jobs, await call.read_window(spec.timing, window.wave_S)] if spec.timing else jobs


class _Joined:
    """The growing text of a transcript: whole words with single spaces between them.

    text: all words so far.
    """

    def __init__(self) -> None:
        self.text, self._open, self._count = "", "", 0

    def push(self, text: str) -> str:
        """Append generated text; returns the words that it completes."""
        *whole, self._open = re.split(r"\s+", self._open + text)
        return self._add([word for word in whole if word])

    def words(self, every: list[str]) -> str:
        """Takes all words so far; returns the new ones as text."""
        new, self._count = every[self._count :], len(every)
        return self._add(new)

    def _add(self, words: list[str]) -> str:
        if not words:
            return ""
        new = (" " if self.text else "") + " ".join(words)
        self.text += new
        return new


def _usage(call: Call) -> dict[str, int]:
    counts = usage(call.prompt, call.written)
    return {
        "input_tokens": counts["prompt_tokens"],
        "output_tokens": counts["completion_tokens"],
        "total_tokens": counts["total_tokens"],
    }


def _verbose(transcript: Transcript, of_window: set[int], words: bool, segments: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "task": "transcribe",
        "language": None,  # no model here detects it
        "duration": transcript.seconds,
        "text": transcript.text,
        "complete": transcript.complete,
    }
    if words:
        found["words"] = [
            {"word": w.text, "start": w.start_s, "end": w.end_s, "confidence": w.confidence}
            | (
                {"times_of": "window"} if i in of_window else {}
            )  # the times are those of the window, if its words could not be aligned
            for i, w in enumerate(transcript.words)
        ]
    if segments:
        found["segments"] = [
            {"id": i, "start": start / 1000, "end": end / 1000, "text": text}
            for i, (start, end, text) in enumerate(transcript.cues())
        ]
    return found


def _streamed(
    call: Call, spec: TranscriptionTask, windows: list[SoundWindow], options: WritingOptions | None
) -> EventStream:
    async def events() -> AsyncGenerator[bytes]:
        async for text, transcript in _read(call, spec, windows, options, _maker(spec), words=True):
            if text:
                yield event({"type": "transcript.text.delta", "delta": text})
            if transcript is not None:
                counts = {"type": "tokens", **_usage(call)}
                yield event({"type": "transcript.text.done", "text": transcript.text, "usage": counts})

    return call.stream(events())
