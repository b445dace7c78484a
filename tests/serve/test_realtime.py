"""Live transcription: the words of the whole sound while it comes, for OpenAI's own client, and for clients that misbehave."""

import base64
import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.masks import Chunked, SameSample
from multimodal.transcription import Listener, transcribe
from tests.serve.conftest import EXTRA, serving
from tests.transcription.tones import RATE, TASK, UNIT, frames, said, text_of, trained_ear

pytest.importorskip("starlette", reason=EXTRA)
pytest.importorskip("httpx", reason=EXTRA)

LIVE = f"/v1/realtime?task={TASK}"
TRANSCRIPTION = "conversation.item.input_audio_transcription"


@pytest.fixture(scope="module")
def ear() -> mm.Model:
    return trained_ear()


@pytest.fixture(scope="module")
def load(ear):
    """Makes a model with its weights, and a task that cannot be heard live: a model belongs to one thread."""

    def copied() -> mm.Model:
        tasks = [mm.Task(TASK, mm.CTC()), mm.Task("sound -> written:text", mm.NextToken())]
        model = mm.Model({"sound": frames(), "text": ear.packer.tokenizers["text"]}, ear.core.core, tasks)
        model.load_state_dict(ear.state_dict(), strict=False)
        return model

    return copied


@pytest.fixture(scope="module")
def client(load) -> Iterator[Any]:
    with serving(load, max_message=2**18) as made:
        yield made


def pcm(wave_S: np.ndarray) -> bytes:
    return (np.clip(wave_S, -1, 1) * 32767).astype("<i2").tobytes()


def spoken(words: int, seed: int) -> tuple[str, bytes]:
    text = text_of(words, seed)
    return text, pcm(said(text, seed)[0])


def as_read(data: bytes) -> tuple[np.ndarray, int]:
    return np.frombuffer(data, "<i2").astype(np.float32) / 2**15, RATE


class Talk:
    """One side of a session; keeps every event."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket
        self.events: list[dict[str, Any]] = []

    def send(self, kind: str, **values: Any) -> None:
        self.socket.send_json({"type": kind, **values})

    def next(self, kind: str) -> dict[str, Any]:
        """The next event of this type; an error before it fails the test."""
        while True:
            self.events.append(self.socket.receive_json())
            if self.events[-1]["type"] == kind:
                return self.events[-1]
            assert self.events[-1]["type"] != "error", self.events[-1]

    def refused(self, kind: str, **values: Any) -> dict[str, Any]:
        self.send(kind, event_id="mine", **values)
        error = self.next("error")["error"]
        assert error["event_id"] == "mine"
        assert len(error["message"]) > 10
        return error

    def rate(self, rate_hz: int) -> dict[str, Any]:
        form = {"type": "audio/pcm", "rate": rate_hz}
        self.send("session.update", session={"type": "transcription", "audio": {"input": {"format": form}}})
        return self.next("session.updated")["session"]

    def append(self, data: bytes, size: int = 0) -> None:
        for start in range(0, len(data), size or len(data)):
            audio = base64.b64encode(data[start : start + (size or len(data))]).decode()
            self.send("input_audio_buffer.append", audio=audio)

    def said(self, data: bytes, size: int = 0) -> dict[str, Any]:
        """Send a sound, and return how its transcription ends."""
        self.append(data, size)
        self.send("input_audio_buffer.commit")
        return self.next(f"{TRANSCRIPTION}.completed")

    def words(self, item_id: str) -> tuple[str, list[dict[str, Any]]]:
        deltas = [e for e in self.events if e["type"] == f"{TRANSCRIPTION}.delta" and e["item_id"] == item_id]
        return "".join(e["delta"] for e in deltas), [word for e in deltas for word in e["words"]]


@contextmanager
def talking(client: Any, path: str = LIVE, **options: Any) -> Iterator[Talk]:
    with client.websocket_connect(path, **options) as socket:
        talk = Talk(socket)
        talk.next("session.created")
        yield talk


def until(holds: Callable[[], Any], seconds: float = 60) -> bool:
    """Whether something holds soon."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("size", [58, 998, 6400, 10**6], ids=lambda size: f"{size} bytes")
def test_the_words_are_those_of_the_whole(client, ear, size):
    text, data = spoken(1 if size == 58 else 8, 3)
    (whole,) = transcribe(ear, TASK, [as_read(data)])
    with talking(client) as talk:
        assert talk.rate(RATE)["audio"]["input"]["transcription"] == {"model": "tiny", "task": TASK}
        end = talk.said(data, min(size, 2**17))
        assert end["transcript"] == whole.text == text
        assert end["usage"] == {"type": "duration", "seconds": pytest.approx(len(data) / 2 / RATE)}
        deltas, words = talk.words(end["item_id"])
        assert deltas == text
        assert [w["word"] for w in words] == [w.text for w in whole.words]
        for found, wanted in zip(words, whole.words, strict=True):
            times = (found["start"], found["end"], found["confidence"])
            assert times == pytest.approx((wanted.start_s, wanted.end_s, wanted.confidence), abs=1e-4)
        kinds = [e["type"] for e in talk.events]
        if size == 6400:  # most words come before the sound is over
            before = talk.events[: kinds.index("input_audio_buffer.committed")]
            assert sum(e["type"] == f"{TRANSCRIPTION}.delta" for e in before) >= 5


def test_samples_of_another_rate_are_resampled_as_a_file_is(client, ear):
    wave_S = torch.from_numpy(said(text_of(6, 5), 5)[0])[None, None]
    data = pcm(torch.nn.functional.interpolate(wave_S, scale_factor=3, mode="linear")[0, 0].numpy())
    samples = np.frombuffer(data, "<i2")
    (whole,) = transcribe(ear, TASK, [(samples, 24_000)])
    with talking(client) as talk:  # OpenAI's rate is the default
        talk.append(data, 4800)
        (session,) = client.app.state.service.live
        assert until(lambda: session.item)
        listener = session.item.listener
        talk.send("input_audio_buffer.commit")
        end = talk.next(f"{TRANSCRIPTION}.completed")
    assert end["transcript"] == whole.text == text_of(6, 5)
    assert listener.seconds == pytest.approx(len(samples) / 24_000, abs=1 / RATE)  # with the last samples of the filter
    assert [w["end"] for w in talk.words(end["item_id"])[1]] == [pytest.approx(w.end_s) for w in whole.words]


def test_sounds_follow_one_another(client):
    first, second = spoken(3, 7), spoken(4, 8)
    with talking(client) as talk:
        talk.rate(RATE)
        ends = [talk.said(data, 3000) for _, data in (first, second)]
        assert [end["transcript"] for end in ends] == [first[0], second[0]]
        committed = [e for e in talk.events if e["type"] == "input_audio_buffer.committed"]
        assert [e["item_id"] for e in committed] == [end["item_id"] for end in ends]
        assert [e["previous_item_id"] for e in committed] == [None, ends[0]["item_id"]]
        talk.append(first[1][:20_000])
        talk.send("input_audio_buffer.clear")
        talk.next("input_audio_buffer.cleared")
        assert talk.said(second[1])["transcript"] == second[0]
        assert len({e["event_id"] for e in talk.events}) == len(talk.events)


def test_two_clients_at_once_are_not_mixed_up(client):
    sounds = [spoken(5, seed) for seed in (11, 12)]
    with talking(client) as one, talking(client) as other:
        for talk in (one, other):
            talk.rate(RATE)
        for at in range(0, max(len(data) for _, data in sounds), 5000):
            for talk, (_, data) in zip((one, other), sounds, strict=True):
                if data[at : at + 5000]:
                    talk.append(data[at : at + 5000])
        for talk, (text, _) in zip((one, other), sounds, strict=True):
            talk.send("input_audio_buffer.commit")
            assert talk.next(f"{TRANSCRIPTION}.completed")["transcript"] == text


def test_memory_is_that_of_the_window(client):
    """Six minutes; the cache of the first of them is as large."""
    service = client.app.state.service
    minute = np.tile(said(text_of(6, 2), 2)[0], 40)[: 60 * RATE]
    with talking(client) as talk:
        talk.rate(RATE)
        sizes = set()
        for _ in range(6):
            talk.append(pcm(minute), 2**17)
            while not any(e["type"] == f"{TRANSCRIPTION}.delta" for e in talk.events[-1:]):
                talk.next(f"{TRANSCRIPTION}.delta")
            (session,) = service.live
            listener = session.item.listener
            assert listener.reach == 5
            sizes.add(listener._cache.capacity)
            assert listener._wave_S.numel() < 300 * UNIT
        talk.send("input_audio_buffer.commit")
        end = talk.next(f"{TRANSCRIPTION}.completed")
    assert end["usage"]["seconds"] == 360
    assert len(sizes) == 1
    assert max(sizes) < 200 < listener.tokens == 360 * RATE // UNIT
    assert len(end["transcript"].split()) > 300


def test_without_a_window_a_sound_has_a_limit(ear):
    def load() -> mm.Model:
        core = ear.core.core.replace(mask=SameSample() & Chunked(4))
        model = mm.Model(ear.packer.tokenizers, core, [mm.Task(TASK, mm.CTC())])
        model.load_state_dict(ear.state_dict())
        return model

    with serving(load, live_seconds=2.0) as client, talking(client) as talk:
        talk.rate(RATE)
        talk.append(bytes(2 * RATE * 2))
        audio = base64.b64encode(bytes(2)).decode()
        error = talk.refused("input_audio_buffer.append", audio=audio)
        assert (error["code"], error["param"]) == ("sound_too_long", "audio")
        assert "at most 2 s" in error["message"]
        assert "its core's mask has no Window" in error["message"]
        talk.send("input_audio_buffer.commit")
        assert talk.next(f"{TRANSCRIPTION}.completed")["usage"]["seconds"] == 2
        talk.append(bytes(RATE))  # the next one has its own seconds
        talk.send("input_audio_buffer.commit")
        talk.next(f"{TRANSCRIPTION}.completed")


def test_tasks_that_cannot_be_heard_live_are_refused_by_name(client):
    with talking(client, "/v1/realtime") as talk:  # the one by CTC is found
        wanted = {"audio": {"input": {"transcription": {"task": "sound -> written:text"}}}}
        error = talk.refused("session.update", session=wanted)
        assert (
            "'sound -> written:text' writes after the whole sound; give the model a task with the head CTC()"
            in error["message"]
        )
        assert talk.said(spoken(1, 1)[1])["transcript"] is not None  # the old task stays
    with serving() as other, talking(other, "/v1/realtime") as talk:
        error = talk.refused("input_audio_buffer.append", audio=base64.b64encode(bytes(8)).decode())
        assert "a sound's tokens look at what comes later; train with AudioFrames(causal=True)" in error["message"]
        with other.websocket_connect("/v1/realtime?task=image -> label") as socket:
            assert socket.receive_json()["session"]["audio"]["input"]["transcription"] is None
            assert "is no sound" in socket.receive_json()["error"]["message"]


def test_what_is_refused_changes_nothing(load, ear):
    """Of two models: neither the model that hears, nor its places, nor the rate."""
    from starlette.testclient import TestClient

    from multimodal.serve.app import make_app
    from multimodal.serve.checkpoints import Checkpoint
    from multimodal.serve.settings import Settings
    from tests.serve.conftest import make_model

    settings = Settings(rows=1, queue=1, capacity=64)
    made = [
        Checkpoint("ear", load, settings),
        Checkpoint("tiny", make_model, settings),
        Checkpoint("deaf", load, settings),
    ]
    text, data = spoken(2, 4)

    def places() -> dict[str, int]:
        return {checkpoint.name: checkpoint.scheduler.leases for checkpoint in made}

    with TestClient(make_app(made, settings)) as client, talking(client, "/v1/realtime?model=ear") as talk:
        before = talk.rate(RATE)
        busy = contextlib.ExitStack()
        for model, rate, words, occupied in (
            ("tiny", RATE, "look at what comes later", False),  # none that can be heard live
            ("deaf", 12_345, "rate=12345: wanted", False),
            ("none", RATE, "there is no model 'none'", False),
            ("ear", 12_345, "rate=12345: wanted", False),
            ("deaf", RATE, "is busy", True),
        ):
            for _ in range(2 * occupied):
                busy.enter_context(made[2].scheduler.lease())
            heard = {"format": {"type": "audio/pcm", "rate": rate}, "transcription": {"model": model}}
            error = talk.refused("session.update", session={"audio": {"input": heard}})
            assert words in error["message"]
            busy.close()
            assert places() == {"ear": 1, "tiny": 0, "deaf": 0}
            read = made[0].scheduler.load.read
            assert talk.said(data)["transcript"] == text
            assert made[0].scheduler.load.read > read
            assert made[1].scheduler.load.read == made[2].scheduler.load.read == 0
            assert talk.rate(RATE) == before
        talk.send("session.update", session={"audio": {"input": {"transcription": {"model": "deaf"}}}})
        assert talk.next("session.updated")["session"]["audio"]["input"]["transcription"]["model"] == "deaf"
        assert places() == {"ear": 0, "tiny": 0, "deaf": 1}


BAD = [
    ("no text", b"{}", "wanted a text message"),
    ("no JSON", "{", "not valid JSON"),
    ("a list", "[]", "wanted an object"),
    ("deep", "[" * 50_000, "not valid JSON"),
    ("no type", "{}", "takes session.update"),
    ("an unknown type", '{"type": "response.create"}', "takes session.update"),
    ("a misspelt type", '{"type": "session.updat"}', "did you mean 'session.update'"),
    ("a type that is no text", '{"type": 7}', "wanted a text"),
    ("no audio", '{"type": "input_audio_buffer.append"}', "wanted the base64"),
    ("no base64", '{"type": "input_audio_buffer.append", "audio": "#"}', "not valid base64"),
    ("a path", '{"type": "input_audio_buffer.append", "audio": "/etc/passwd"}', "no whole number|not valid base64"),
    ("a URL", '{"type": "input_audio_buffer.append", "audio": "http://127.0.0.1:1/"}', "not valid base64"),
    ("half a sample", '{"type": "input_audio_buffer.append", "audio": "AAAA"}', "3 bytes are no whole number"),
    ("too much", '{"type": "input_audio_buffer.append", "audio": "", "x": 1}', "no parameter 'x'"),
    ("nothing to commit", '{"type": "input_audio_buffer.commit"}', "no sound to commit"),
    ("a session that is none", '{"type": "session.update", "session": 3}', "wanted an object"),
    ("another session", '{"type": "session.update", "session": {"type": "realtime"}}', "not one of transcription"),
    ("another setting", '{"type": "session.update", "session": {"voice": "a"}}', "no parameter 'voice'"),
]
INPUTS = [
    ({"turn_detection": {"type": "server_vad"}}, "pauses do not end a sound; send input_audio_buffer.commit"),
    ({"noise_reduction": {"type": "near_field"}}, "not denoised"),
    ({"format": {"type": "audio/pcmu"}}, "not one of audio/pcm"),
    (
        {"format": {"rate": 15_999}},
        "wanted 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000 Hz, or the 8000 Hz",
    ),
    ({"format": {"rate": "8000"}}, "wanted a whole number"),
    ({"transcription": {"model": "gpt-4o-transcribe"}}, "there is no model 'gpt-4o-transcribe'"),
    ({"transcription": {"task": "a -> b"}}, "there is no task 'a -> b'"),
    ({"transcription": {"language": "en"}}, "takes the language"),
    ({"transcription": {"prompt": "names"}}, "reads a prompt"),
    ({"transcription": []}, "wanted an object"),
    ({"transcription": {"temperature": 0}}, "no parameter 'temperature'"),
]


def test_whatever_is_sent_is_answered_and_the_session_goes_on(client):
    import re

    with talking(client) as talk:
        talk.rate(RATE)
        for name, message, problem in BAD:
            send = talk.socket.send_bytes if isinstance(message, bytes) else talk.socket.send_text
            send(message)
            error = talk.next("error")["error"]
            assert re.search(problem, error["message"]), (name, error)
            assert error["type"] == "invalid_request_error"
        for given, problem in INPUTS:
            error = talk.refused("session.update", session={"audio": {"input": given}})
            assert problem in error["message"], (given, error)
        text, data = spoken(2, 4)
        talk.append(data[:4000])
        assert "commit or clear it" in talk.refused("session.update", session={})["message"]
        assert talk.said(data[4000:])["transcript"] == text


def test_too_large_a_message_ends_the_session(client):
    from starlette.websockets import WebSocketDisconnect

    with talking(client) as talk:
        talk.socket.send_text(" " * (2**18 + 1))
        assert "more than the allowed 262144" in talk.next("error")["error"]["message"]
        with pytest.raises(WebSocketDisconnect) as caught:
            talk.socket.receive_json()
        assert caught.value.code == 1009


def test_silence_ends_a_session(load):
    from starlette.websockets import WebSocketDisconnect

    with serving(load, live_idle_s=0.2) as client, talking(client) as talk:
        talk.append(bytes(2000))
        error = talk.next("error")["error"]
        assert (error["code"], "nothing came for 0.2 s" in error["message"]) == ("idle_timeout", True)
        with pytest.raises(WebSocketDisconnect) as caught:
            talk.socket.receive_json()
        assert caught.value.code == 1008


READ = 'tokens_total{direction="read"'


def metric(client: Any, name: str, **options: Any) -> float:
    lines = [
        line for line in client.get("/metrics", **options).text.splitlines() if line.startswith(f"multimodal_{name}")
    ]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_a_client_that_leaves_gives_its_place_back(client):
    log = logging.getLogger("multimodal.serve")
    said_: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said_.append  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    heard, left = metric(client, "heard_seconds_total"), metric(client, "left_total")
    read = metric(client, READ)
    try:
        with talking(client) as talk:
            talk.rate(RATE)
            talk.append(bytes(RATE * 2))
            assert (metric(client, "live_sessions"), metric(client, "open_requests")) == (1, 1)
            assert until(lambda: metric(client, READ) > read)
        assert until(lambda: metric(client, "live_sessions") + metric(client, "open_requests") == 0)
    finally:
        log.removeHandler(handler)
    assert metric(client, "heard_seconds_total") == pytest.approx(heard + 1, rel=1e-3)
    assert metric(client, "left_total") == left + 1
    (record,) = said_
    assert record.getMessage() == "left"
    assert record.fields["endpoint"] == "/v1/realtime"  # type: ignore[attr-defined]
    assert record.fields["prompt_tokens"] >= 20  # type: ignore[attr-defined]


def test_keys_pages_and_places(load):
    from starlette.testclient import WebSocketDenialResponse

    def refused(client: Any, **options: Any) -> Any:
        with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect(LIVE, **options):
            raise AssertionError("it was let in")
        return caught.value

    with serving(load, keys=("right",), live_sessions=1) as client:
        bearer = {"authorization": "Bearer right"}
        assert refused(client).status_code == 401
        assert refused(client, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert refused(client, subprotocols=["realtime", "openai-insecure-api-key.wrong"]).status_code == 401
        assert (
            refused(client, headers={**bearer, "origin": "https://evil.example"}).json()["error"]["code"]
            == "foreign_origin"
        )
        browser = {
            "subprotocols": ["realtime", "openai-insecure-api-key.right"],
            "headers": {"origin": "http://testserver"},
        }
        with talking(client, **browser) as talk:
            assert talk.socket.accepted_subprotocol == "realtime"
            second = refused(client, headers=bearer)
            assert (second.status_code, second.json()["error"]["code"]) == (429, "queue_full")
            assert "1 live sessions are open" in second.json()["error"]["message"]
        assert until(lambda: metric(client, "live_sessions", headers=bearer) == 0)
        with talking(client, headers=bearer) as talk:
            assert talk.events


def test_a_sound_that_fails_is_given_up_alone(client, monkeypatch):
    text, data = spoken(2, 4)
    with talking(client) as talk:
        talk.rate(RATE)

        def fail(*_: Any) -> None:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")

        with monkeypatch.context() as patch:
            patch.setattr(Listener, "push", fail)
            talk.append(data)
            failed = talk.next(f"{TRANSCRIPTION}.failed")
        assert "out of memory; try again" in failed["error"]["message"]
        assert talk.refused("input_audio_buffer.commit")["code"] == "input_audio_buffer_commit_empty"
        assert talk.said(data)["transcript"] == text


def test_a_reload_between_two_sounds_changes_the_model(load):
    made: list[mm.Model] = []

    def loaded() -> mm.Model:
        made.append(load())
        return made[-1]

    text, data = spoken(2, 4)
    with serving(loaded) as client, talking(client) as talk:
        talk.rate(RATE)
        talk.append(data[:8000])
        service = client.app.state.service
        checkpoint, (session,) = service.checkpoints.named(None), service.live
        assert until(lambda: session.item and session.item.listener.tokens)
        checkpoint.reload()
        assert session.item.listener.model is made[0]
        assert talk.said(data[8000:])["transcript"] == text
        talk.append(data)
        talk.next(f"{TRANSCRIPTION}.delta")
        assert session.item.listener.model is made[1]
        talk.send("input_audio_buffer.commit")
        assert talk.next(f"{TRANSCRIPTION}.completed")["transcript"] == text
        talk.rate(RATE)  # makes a listener of the second model, which is replaced before it hears anything
        checkpoint.reload()
        talk.append(data)
        assert until(lambda: session.item and session.item.listener.tokens)
        assert session.item.listener.model is made[2]
        for scheduler in list(checkpoint.retired):
            scheduler.thread.join(30)
            assert not scheduler.thread.is_alive()  # the session has given its place there back


# in a process of its own


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")  # OpenAI's client connects in a way that is going away
def test_the_command_hears_openais_client_and_survives_broken_ones(ear, tmp_path):
    pytest.importorskip("uvicorn", reason=EXTRA)
    pytest.importorskip("websockets", reason=EXTRA)
    library = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    from tests.serve.test_clients import KEY, Server

    server = Server(tmp_path, "--max-message", "100000", model=ear)
    try:
        with library.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as openai:
            hear_a_sound(openai)
        break_connections(server, KEY)
        stop_within_a_sound(server, KEY)
        server.process.wait(60)
        assert [line["event"] for line in server.lines()][-1] == "stopped"
    finally:
        server.stop()


def hear_a_sound(openai: Any) -> None:
    text, data = spoken(8, 3)
    with openai.realtime.connect(model="tiny", extra_query={"intent": "transcription"}) as connection:
        assert connection.recv().type == "session.created"
        form = {"type": "audio/pcm", "rate": RATE}
        heard = {"format": form, "transcription": {"model": "tiny"}, "turn_detection": None}
        connection.session.update(session={"type": "transcription", "audio": {"input": heard}})
        updated = connection.recv()
        assert (updated.type, updated.session.type) == ("session.updated", "transcription")
        assert updated.session.audio.input.transcription.model == "tiny"
        for start in range(0, len(data), 3200):
            connection.input_audio_buffer.append(audio=base64.b64encode(data[start : start + 3200]).decode())
        connection.input_audio_buffer.commit()
        delta, words = "", []
        for event in connection:
            if event.type == f"{TRANSCRIPTION}.delta":
                delta += event.delta
                words += event.words
            elif event.type == f"{TRANSCRIPTION}.completed":
                break
            else:
                assert event.type == "input_audio_buffer.committed"
        assert delta == event.transcript == text
        assert event.usage.seconds == pytest.approx(len(data) / 2 / RATE)
        assert [w["word"] for w in words] == text.split()
        assert words == sorted(words, key=lambda w: w["start"])


def break_connections(server: Any, key: str) -> None:
    """Half a frame, a frame that is too long, a client that is gone without a word, a message that is too large."""
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import connect

    url = server.url.replace("http", "ws") + "/v1/realtime"
    headers = {"Authorization": f"Bearer {key}"}
    with pytest.raises(InvalidStatus) as caught, connect(url):
        raise AssertionError("it was let in")
    assert caught.value.response.status_code == 401
    assert json.loads(caught.value.response.body)["error"]["code"] == "invalid_api_key"
    for sent in (b"\x81\xff\0\0", b"\x81\xfe\xff\xff" + b"x" * 100, b"\xff" * 20):
        with connect(url, additional_headers=headers) as socket:
            socket.recv(30)
            socket.socket.sendall(sent)
            socket.socket.close()
    with connect(url, additional_headers=headers) as socket:
        socket.recv(30)
        socket.send(" " * 100_001)
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(30)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
    with server.client() as client:
        assert until(lambda: metric(client, "live_sessions") == 0)
        assert client.get("/health").json()["status"] == "ok"


def stop_within_a_sound(server: Any, key: str) -> None:
    """What was said before the stop is still written down."""
    from websockets.sync.client import connect

    text, data = spoken(3, 9)
    url = server.url.replace("http", "ws") + "/v1/realtime"
    with connect(url, additional_headers={"Authorization": f"Bearer {key}"}) as socket:
        form = {"input": {"format": {"type": "audio/pcm", "rate": RATE}}}
        socket.send(json.dumps({"type": "session.update", "session": {"audio": form}}))
        for start in range(0, len(data), 9000):
            audio = base64.b64encode(data[start : start + 9000]).decode()
            socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
        socket.send(json.dumps({"type": "unknown"}))  # its answer comes when all of the sound has
        while json.loads(socket.recv(30))["type"] != "error":
            pass
        server.process.send_signal(signal.SIGTERM)
        events = [json.loads(message) for message in socket]
        assert events[-1]["type"] == f"{TRANSCRIPTION}.completed"
        assert events[-1]["transcript"] == text
        assert socket.close_code == 1001
