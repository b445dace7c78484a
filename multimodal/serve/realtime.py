"""WebSocket /v1/realtime: live transcription, with the events of OpenAI's transcription sessions.

client -> session.update: model, task and sample rate; optional
       -> input_audio_buffer.append: 16-bit samples in base64; repeatedly
       <- conversation.item.input_audio_transcription.delta: words that became final, with their times
       -> input_audio_buffer.commit: the sound ends; the next samples begin a new one
       <- input_audio_buffer.committed, conversation.item.input_audio_transcription.completed
"""

import asyncio
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from starlette.websockets import WebSocket, WebSocketDisconnect
from torch import Tensor

from multimodal.files import parse_json
from multimodal.media.sounds import Resampler
from multimodal.model import Model
from multimodal.serve.answers import json_bytes
from multimodal.serve.bodies import Params
from multimodal.serve.calls import Call
from multimodal.serve.checkpoints import Checkpoints
from multimodal.serve.errors import ApiError, bad
from multimodal.serve.scheduler import Scheduler
from multimodal.serve.tasks import choose_task, named_task, task_views
from multimodal.serve.values import base64_bytes
from multimodal.shapes import did_you_mean
from multimodal.texts import shortened
from multimodal.transcription import Listener, Word, transcription_tasks
from multimodal.transcription.recordings import TranscriptionTask

RATE_HZ = 24_000  # the default sample rate
RATES_HZ = (
    8_000,
    11_025,
    12_000,
    16_000,
    22_050,
    RATE_HZ,
    32_000,
    44_100,
    48_000,
)  # other rates may need very long resampling filters
LONGEST_ID = 512  # characters of a client's event_id that an error repeats
TRANSCRIPTION = "conversation.item.input_audio_transcription"
GOING_AWAY, POLICY_VIOLATION, MESSAGE_TOO_BIG = 1001, 1008, 1009  # close codes of a WebSocket (RFC 6455, section 7.4.1)


@dataclass
class Item:
    """A sound, from its first samples to its commit.

    waiting: resampled waves that the listener has not read yet.
    samples: number of received samples, at the client's rate.
    """

    listener: Listener
    resampler: Resampler
    id: str = field(default_factory=lambda: f"item_{secrets.token_hex(12)}")
    waiting: list[Tensor] = field(default_factory=list)
    samples: int = 0

    @property
    def ready(self) -> bool:
        """Whether there are enough samples for the model to read more tokens."""
        return sum(map(len, self.waiting)) >= self.listener.wanted


class SessionEnded(Exception):
    """Raised to end a session. code: the close code of the WebSocket. error: sent to the client first, if given."""

    def __init__(self, code: int, error: ApiError | None = None) -> None:
        super().__init__()
        self.code, self.error = code, error


class LiveSession:
    """One connection. It handles messages one after another, so a client that sends too fast has to wait.

    ending: set when the service stops; the open sound is then finished as if it were committed.
    """

    def __init__(self, call: Call, checkpoints: Checkpoints, socket: WebSocket, ending: asyncio.Event) -> None:
        self.call, self.checkpoints, self.socket, self.ending = call, checkpoints, socket, ending
        self.id = f"sess_{secrets.token_hex(12)}"
        self.model: str | None = None
        self.task: str | None = None
        self.rate_hz = RATE_HZ
        self.item: Item | None = None
        self._prepared: tuple[Scheduler, Listener] | None = None  # for the next item
        self._last_item: str | None = None
        self._answers = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
        }

    async def run(self) -> ApiError | None:
        """Handle messages until one side ends the session; returns the error with which the service ended it, if any.

        Raises:
            WebSocketDisconnect: the client disconnected during a sound.
        """
        await self.socket.accept("realtime" if "realtime" in self.socket.scope.get("subprotocols", ()) else None)
        refused = await self._read_query()
        await self._send("session.created", session=self._session())
        if refused is not None:
            await self._send_error(refused)
        try:
            while True:
                await self._answer(await self._receive())
        except WebSocketDisconnect:
            if self.item is not None:
                raise
            return None
        except SessionEnded as end:
            if end.error is not None:
                await self._send_error(end.error)
            with suppress(RuntimeError):  # the client has closed it already
                await self.socket.close(end.code)
            return end.error

    async def _read_query(self) -> ApiError | None:
        """Choose the model and the task that the URL names, or the only ones."""
        query = Params(dict(self.socket.query_params))
        try:
            query.text("intent", one_of=("transcription",))
            model, task = query.text("model"), query.text("task")
            query.done()
            await self._choose(model, task, self.rate_hz)
        except Exception as error:
            api_error = self.call.failed(error)
            # if the URL names none, `session.update` still can
            return api_error if {*self.socket.query_params} - {"intent"} else None
        return None

    async def _receive(self) -> str:
        """The next message.

        Raises:
            WebSocketDisconnect: the client disconnected.
            SessionEnded: the client sent nothing for too long, its message is too large, or the service stops.
        """
        settings = self.call.settings
        came, ends = asyncio.ensure_future(self.socket.receive()), asyncio.ensure_future(self.ending.wait())
        try:
            await asyncio.wait({came, ends}, timeout=settings.live_idle_s, return_when=asyncio.FIRST_COMPLETED)
            if self.ending.is_set():
                if self.item is not None:
                    await self._finish(self.item)
                raise SessionEnded(GOING_AWAY)
            if not came.done():
                idle = f"nothing came for {settings.live_idle_s:g} s, so this session is over"
                raise SessionEnded(POLICY_VIOLATION, ApiError(408, idle, code="idle_timeout"))
            message = came.result()
        finally:
            for waiting in (came, ends):
                waiting.cancel()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text = message.get("text")
        size = len(message.get("bytes") or b"") if text is None else len(text)
        if size > settings.max_message:
            large = f"the message has {size} bytes, more than the allowed {settings.max_message}; send shorter pieces"
            raise SessionEnded(MESSAGE_TOO_BIG, ApiError(413, large, code="message_too_large"))
        return "" if text is None else text

    async def _answer(self, text: str) -> None:
        """Handle a message. If it is wrong, send an error; the session continues."""
        event_id = None
        try:
            if not text:
                raise bad("wanted a text message of JSON, not bytes; samples go as base64 in input_audio_buffer.append")
            try:
                values = parse_json(text.encode("utf-8", "replace"))
            except ValueError as error:
                raise bad(f"the message is not valid JSON: {shortened(error, 200)}", code="invalid_json") from None
            params = Params(values)
            event_id = params.text("event_id", "")[:LONGEST_ID] or None
            kind = params.text("type", "")
            if kind not in self._answers:
                raise bad(
                    f"type={shortened(repr(kind), 60)}: a transcription session takes {', '.join(self._answers)}"
                    f"{did_you_mean(kind, self._answers)}",
                    "type",
                )
            await self._answers[kind](params)
        except (WebSocketDisconnect, SessionEnded):
            raise
        except Exception as error:
            await self._send_error(self.call.failed(error), event_id)

    async def _update(self, params: Params) -> None:
        if self.item is not None:
            raise bad("a sound is open; commit or clear it, and then change the session", "session")
        session = _object(params, "session") or Params({})
        params.done()
        session.text("type", one_of=("transcription",))
        session.without("probabilities of tokens are not given", include=([],))
        audio = _object(session, "audio") or Params({})
        heard = _object(audio, "input") or Params({})
        form = _object(heard, "format") or Params({"rate": self.rate_hz})
        form.text("type", one_of=("audio/pcm",))
        rate_hz = form.whole("rate", RATE_HZ)
        heard.without("pauses do not end a sound; send input_audio_buffer.commit", turn_detection=())
        heard.without("sounds are not denoised", noise_reduction=())
        wanted = _object(heard, "transcription") or Params({})
        model = wanted.text("model", self.model)
        task = wanted.text("task", self.task if model == self.model else None)
        wanted.without("no model here takes the language", language=("",), languages=([],))
        wanted.without("no model here reads a prompt beside the sound", prompt=("",), keywords=([],))
        wanted.without("words come as soon as they are final", delay=())
        for each in (session, audio, heard, form, wanted):
            each.done()
        await self._choose(model, task, rate_hz)
        await self._send("session.updated", session=self._session())

    async def _append(self, params: Params) -> None:
        text = params.text("audio")
        params.done()
        if text is None:
            raise bad("audio: wanted the base64 of 16-bit samples, the lower byte first", "audio")
        call, settings = self.call, self.call.settings
        data = base64_bytes(text, "audio")
        if len(data) % 2:
            raise bad(f"audio: {len(data)} bytes are no whole number of 16-bit samples", "audio")
        if not data:
            return
        item = self.item or await self._new_item()
        seconds = (item.samples + len(data) // 2) / self.rate_hz
        if item.listener.reach is None and seconds > settings.live_seconds:
            raise bad(
                f"audio: the sound would last {seconds:.1f} s, and at most {settings.live_seconds:g} s are heard at a time, as "
                "the memory of this model grows with the sound: its core's mask has no Window; commit this one and go on",
                "audio",
                "sound_too_long",
            )
        self.item = item
        item.samples += len(data) // 2
        wave_S = await call.in_pool(_resampled, data, item.resampler)
        item.waiting.append(wave_S)
        call.metrics.add("heard_seconds_total", len(data) / 2 / self.rate_hz, model=call.model_name)
        if item.ready:
            await self._transcribe(item)

    async def _commit(self, params: Params) -> None:
        params.done()
        if self.item is None:
            raise bad("there is no sound to commit; append some first", code="input_audio_buffer_commit_empty")
        await self._finish(self.item)

    async def _clear(self, params: Params) -> None:
        params.done()
        self.item = None
        await self._send("input_audio_buffer.cleared")

    async def _choose(self, model: str | None, task: str | None, rate_hz: int) -> None:
        """Take a slot at a model, and make a listener for the next sound; after an error nothing has changed.

        Raises:
            ApiError: there is no such model, task or rate, or no free slot.
            ConfigError: the task cannot transcribe live; the message says what to change.
        """
        call, checkpoint = self.call, self.checkpoints.named(model, task)
        with call.entered(checkpoint):
            chosen = _live_task(call.model, task)
            scheduler, listener = call.scheduler, await call.run_on_model(lambda model: Listener(model, chosen))
            own = listener.spec.rate_hz
            if rate_hz not in RATES_HZ and rate_hz != own:
                raise bad(
                    f"rate={rate_hz}: wanted {', '.join(map(str, RATES_HZ))} Hz, or the {own} Hz of the model", "rate"
                )
        self._prepared, self.rate_hz = (scheduler, listener), rate_hz
        self.model, self.task = checkpoint.name, chosen
        call.task = chosen

    async def _new_item(self) -> Item:
        checkpoint = self.checkpoints.named(self.model, self.task)
        # after a reload, the new model transcribes the next sound
        if self._prepared is None or self._prepared[0] is not checkpoint.scheduler:
            await self._choose(self.model, self.task, self.rate_hz)
        assert self._prepared is not None
        (_, listener), self._prepared = self._prepared, None
        spec = listener.spec
        resampling: Any = getattr(spec.tokenizer, "resampling", "kaiser")
        return Item(listener, Resampler(self.rate_hz, spec.rate_hz, resampling=resampling, who="audio"))

    async def _transcribe(self, item: Item, last: bool = False) -> bool:
        """Transcribe the waiting samples, and send words that became final. Returns False if it failed, which drops the sound."""
        wave_S = torch.cat([torch.empty(0), *item.waiting])
        item.waiting.clear()
        call, listener, load = self.call, item.listener, self.call.scheduler.load

        def transcribe(_: Model) -> list[Word]:
            before = listener.tokens
            words = listener.push(wave_S) + (listener.finish() if last else [])
            # counted here, because the client may disconnect while it waits for the words
            call.prompt += listener.tokens - before
            load.read += listener.tokens - before
            return words

        try:
            words = await call.run_on_model(transcribe)
        except Exception as error:
            self.item = None
            error_json = call.failed(error).body()["error"]
            await self._send(f"{TRANSCRIPTION}.failed", item_id=item.id, content_index=0, error=error_json)
            return False
        if words:
            seconds = item.samples / self.rate_hz
            first = len(listener.decoder.words) == len(words)
            text = ("" if first else " ") + " ".join(word.text for word in words)
            found = [  # a last word may end with its token, which may be after the end of the sound
                {"word": w.text, "start": w.start_s, "end": min(w.end_s, seconds), "confidence": w.confidence}
                for w in words
            ]
            await self._send(f"{TRANSCRIPTION}.delta", item_id=item.id, content_index=0, delta=text, words=found)
        return True

    async def _finish(self, item: Item) -> None:
        """End a sound: send the rest of its words, and the whole text."""
        item.waiting.append(await self.call.in_pool(item.resampler.finish))
        await self._send("input_audio_buffer.committed", item_id=item.id, previous_item_id=self._last_item)
        self._last_item = item.id
        if await self._transcribe(item, last=True):
            usage = {"type": "duration", "seconds": item.samples / self.rate_hz}
            completed = {"item_id": item.id, "content_index": 0, "transcript": item.listener.text, "usage": usage}
            await self._send(f"{TRANSCRIPTION}.completed", **completed)
        self.item = None

    def _session(self) -> dict[str, Any]:
        chosen = None if self.task is None else {"model": self.model, "task": self.task}
        heard = {
            "format": {"type": "audio/pcm", "rate": self.rate_hz},
            "transcription": chosen,
            "turn_detection": None,
            "noise_reduction": None,
        }
        kind = {"object": "realtime.transcription_session", "type": "transcription"}
        return {"id": self.id, **kind, "audio": {"input": heard}}

    async def _send(self, kind: str, **values: Any) -> None:
        event = {"type": kind, "event_id": f"event_{secrets.token_hex(8)}", **values}
        text = json_bytes(event).decode()
        try:
            await asyncio.wait_for(self.socket.send_text(text), self.call.settings.body_s)
        except (TimeoutError, RuntimeError, OSError):  # the client reads nothing, or has disconnected
            raise WebSocketDisconnect(1006) from None

    async def _send_error(self, error: ApiError, event_id: str | None = None) -> None:
        await self._send("error", error={**error.body()["error"], "event_id": event_id})


def _object(params: Params, name: str) -> Params | None:
    """The parameter of this name, an object, as `Params`; None: it is missing."""
    value = params.take(name)
    if value is not None and not isinstance(value, dict):
        raise bad(f"{name}: wanted an object", name)
    return None if value is None else Params(value)


def _live_task(model: Model, task: str | None) -> str:
    """The task of this pattern, or the only CTC task."""
    views = task_views(model)
    if task is not None:
        return named_task(views, task).task
    by_ctc = {each for each in transcription_tasks(model) if TranscriptionTask.of(model, each).ctc}
    what = "transcribes live, by the head CTC()"
    return choose_task(views, None, lambda view: view.task in by_ctc, what).task


def _resampled(data: bytes, resampler: Resampler) -> Tensor:
    """16-bit little-endian samples as a wave in -1..1, at the rate of the tokenizer."""
    samples_S = torch.frombuffer(bytearray(data), dtype=torch.int16)
    return resampler.push(samples_S.float() / 2**15)
