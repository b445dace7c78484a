"""Under load, with clients that leave, at its limits, while a model is loaded again, and when it is stopped."""

import asyncio
import contextlib
import gc
import io
import json
import logging
import threading
import time
import weakref
from typing import Any

import pytest

import multimodal as mm
from multimodal.shapes import ConfigError
from tests.serve.conftest import EXTRA, data_url, make_model, png, serving, wav

httpx = pytest.importorskip("httpx", reason=EXTRA)
pytest.importorskip("starlette", reason=EXTRA)

from multimodal.serve import scheduler as scheduler_module  # noqa: E402
from multimodal.serve.app import make_app  # noqa: E402
from multimodal.serve.checkpoints import Checkpoint, Checkpoints, named_folder  # noqa: E402
from multimodal.serve.logs import log_to  # noqa: E402
from multimodal.serve.settings import Settings  # noqa: E402

CHAT = "/v1/chat/completions"


def body(words: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": words}], **options}


def idle(checkpoint: Checkpoint, seconds: float = 60) -> bool:
    """Whether everything is given back soon: rows, places, tokens that wait."""
    until = time.monotonic() + seconds
    scheduler = checkpoint.scheduler
    while time.monotonic() < until:
        engine = scheduler.engine
        if not (
            scheduler.leases or scheduler.waiting_tokens or scheduler._running or scheduler._gathered or engine.busy
        ):
            return engine.free_rows == engine.rows
        time.sleep(0.02)
    return False


def mixed(number: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(task, the fields as they are sent, the fields for the model alone) of a request."""
    picture, sound = png(number, 8 + 4 * (number % 3)), wav(number, 0.1 + 0.05 * (number % 4))
    question = "why " * (number % 5) + "now?"
    return [
        ("image -> text", {"image": data_url(picture)}, {"image": picture}),
        (
            "image question -> text",
            {"image": data_url(picture), "question": question},
            {"image": picture, "question": question},
        ),
        ("question -> text", {"question": question}, {"question": question}),
        ("audio -> words:text", {"audio": data_url(sound, "audio/wav")}, {"audio": sound}),
        ("image -> label", {"image": data_url(picture)}, {"image": picture}),
        ("label -> drawing", {"label": "dog"}, {"label": "dog"}),
        ("audio -> text", {"audio": data_url(sound, "audio/wav")}, {"audio": sound}),
    ][number % 7]


def test_forty_clients_of_mixed_tasks_get_what_each_would_get_alone_though_some_leave(model):
    settings = Settings(rows=4, capacity=128, queue=64, timeout_s=300)
    checkpoint = Checkpoint("tiny", make_model, settings)
    app = make_app([checkpoint], settings)
    count = 40
    wanted = []
    for number in range(count):
        task, _, fields = mixed(number)
        options = {"max_tokens": 4 + number % 9} if model.packer.heads[task].autoregressive else {}
        wanted.append(model.generate(task, **fields, **options))

    async def ask(client: Any, number: int) -> Any:
        task, fields, _ = mixed(number)
        options = {"max_tokens": 4 + number % 9} if model.packer.heads[task].autoregressive else {}
        asked = client.post(f"/v1/tasks/{task}", json={"fields": fields, **options})
        if number % 5:
            return (await asked).json()
        with contextlib.suppress(asyncio.TimeoutError):  # this client leaves
            await asyncio.wait_for(asked, 0.01 * (number % 4))
        return None

    async def every() -> list[Any]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=300) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(count)))

    found = asyncio.run(every())
    for number, (answer, alone) in enumerate(zip(found, wanted, strict=True)):
        if answer is None:
            continue
        (got,) = answer["answers"]
        if alone.tokens is not None:
            assert got["ids"] == alone.tokens.content.tolist(), number
        if isinstance(alone.value, str):
            assert got["value"] == alone.value
        assert got["probability"] == pytest.approx(alone.probability, abs=1e-5)
    assert sum(answer is not None for answer in found) == 32
    assert idle(checkpoint)
    load = checkpoint.scheduler.load
    assert load.packed > load.passes  # what came together was packed
    assert checkpoint.close(60)


@pytest.fixture
def held(monkeypatch):
    """Decoding stands still until the event is set."""
    go = threading.Event()
    work = scheduler_module.Scheduler._work

    def wait(self: Any) -> None:
        go.wait(60)
        work(self)

    monkeypatch.setattr(scheduler_module.Scheduler, "_work", wait)
    return go


def test_a_full_queue_is_429_and_says_when_to_come_again(held):
    with serving(rows=1, queue=1) as client:
        service = client.app.state.service
        scheduler = service.checkpoints.by_name["tiny"].scheduler
        answers: list[Any] = []
        threads = [
            threading.Thread(target=lambda: answers.append(client.post(CHAT, json=body("a", max_tokens=2))))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 30
        while scheduler.leases < 2 and time.monotonic() < until:
            time.sleep(0.01)
        refused = client.post(CHAT, json=body("b", max_tokens=2))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        held.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert client.post(CHAT, json=body("b", max_tokens=2)).status_code == 200


def test_the_log_has_nothing_of_what_clients_sent(monkeypatch):
    """Marked words in every place of requests that are answered, refused, or fail by a bug of ours."""
    stream, mark = io.StringIO(), "xyzzy"
    handler = log_to(stream)
    try:
        with serving() as client:
            broken = {"fields": {"question": mark}, mark: 1}
            wav_url = data_url(mark.encode(), "audio/wav")
            for path, sent in (
                (CHAT, body(mark, max_tokens=2)),
                (CHAT, body(mark, model=mark)),
                (CHAT, body("a", task=mark)),
                (CHAT, body("a", **{mark: mark})),
                (CHAT, {"messages": [{"role": mark, "content": mark}]}),
                (CHAT, body("a", begin=mark, stop=[mark], response_format={"type": mark}, max_tokens=2)),
                ("/v1/tasks/question -> text", broken),
                ("/v1/tasks/question -> text", {"fields": {"question": "a", mark: mark}}),
                ("/v1/tasks/image -> label", {"fields": {"image": f"/{mark}.png"}}),
                ("/v1/tasks/audio -> words:text", {"fields": {"audio": wav_url}}),
                ("/v1/tasks/label -> drawing", {"fields": {"label": mark}}),
                (f"/v1/tasks/{mark}", {}),
                (f"/{mark}", {}),
            ):
                client.post(path, json=sent)
            client.get(f"/v1/models/{mark}", headers={"Authorization": mark, "Origin": f"http://{mark}"})
            client.post("/v1/tasks/question -> text", data={mark: "1", "question": mark}, files={mark: (mark, b"")})

            def fails(*_: Any) -> None:
                try:
                    raise KeyError(mark)
                except KeyError as error:
                    raise RuntimeError(f"{mark} is broken") from error

            monkeypatch.setattr("multimodal.serve.native.fields_of", fails)
            assert client.post("/v1/tasks/question -> text", json={"fields": {"question": mark}}).status_code == 500
    finally:
        logging.getLogger("multimodal.serve").removeHandler(handler)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert mark not in stream.getvalue()
    refused = [(line["code"], line["param"]) for line in lines if line["event"] == "refused"]
    assert {("model_not_found", "model"), ("unknown_parameter", None), ("unknown_field", None)} <= set(refused)
    assert ("invalid_value", "image") in refused
    record = logging.makeLogRecord({"name": "asyncio", "msg": f"Task exception was never retrieved\nfuture: {mark}"})
    assert json.loads(handler.format(record))["event"] == "Task exception was never retrieved"
    assert mark not in handler.format(record)
    (failed,) = [line for line in lines if line["event"] == "failed"]
    # the lines of code are there, of both errors
    assert ", in fails" in failed["traceback"]
    assert failed["traceback"].index("builtins.KeyError") < failed["traceback"].index("builtins.RuntimeError")


def test_too_many_waiting_tokens_are_429(held):
    with serving(rows=1, queue=8, queue_tokens=40) as client:
        scheduler = client.app.state.service.checkpoints.by_name["tiny"].scheduler
        first = threading.Thread(target=lambda: client.post(CHAT, json=body("a" * 30, max_tokens=2)))
        first.start()
        until = time.monotonic() + 30
        while not scheduler.waiting_tokens and time.monotonic() < until:
            time.sleep(0.01)
        refused = client.post(CHAT, json=body("a" * 30, max_tokens=2))
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        held.set()
        first.join()


def test_an_answer_that_takes_too_long_is_504_and_gives_its_row_back(held):
    with serving(timeout_s=0.2) as client:
        found = client.post(CHAT, json=body("a"))
        assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
        streamed = client.post(CHAT, json=body("a", stream=True))
        assert streamed.status_code == 200
        assert '"code": "timeout"' in streamed.text
        held.set()
        assert idle(client.app.state.service.checkpoints.by_name["tiny"])


def test_a_sample_that_fails_spoils_no_other():
    class Fails(mm.Model):
        def logits(self, stream: Any, **options: Any) -> Any:
            if float(stream.content["image"][:, :16].max()) > 0.999:  # behind the pixels are rows and columns
                raise RuntimeError("white pixels")
            return super().logits(stream, **options)

    def load() -> mm.Model:
        model = make_model()
        model.__class__ = Fails
        return model

    with serving(load, gather_ms=200) as client:
        fields = [{"image": [[0.5] * 8] * 8}, {"image": [[1.0] * 8] * 8}, {"image": [[0.2] * 8] * 8}]
        answers: dict[int, Any] = {}

        def ask(i: int) -> None:
            answers[i] = client.post("/v1/tasks/image -> label", json={"fields": fields[i]})

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answers[i].status_code for i in range(3)] == [200, 500, 200]
        assert "white pixels" not in answers[1].text  # the reason is for the log


def test_a_step_that_fails_ends_its_requests_and_no_later_one(monkeypatch):
    with serving() as client:
        scheduler = client.app.state.service.checkpoints.by_name["tiny"].scheduler

        def broken() -> Any:
            raise KeyError("a bug")

        monkeypatch.setattr(scheduler.engine, "step", broken)
        assert client.post(CHAT, json=body("a")).status_code == 500
        assert client.post(CHAT, json=body("a")).status_code == 200


def test_a_reload_drops_no_request():
    seeds = iter([1, 2, 3])
    with serving(lambda: make_model(next(seeds)), keys=("secret",)) as client:
        key = {"authorization": "Bearer secret"}
        checkpoint = client.app.state.service.checkpoints.by_name["tiny"]
        answers: list[Any] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answers.append(client.post(CHAT, json=body("hello", max_tokens=6), headers=key))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        old = checkpoint.scheduler
        while len(answers) < 3:
            time.sleep(0.01)
        assert client.post("/v1/models/tiny/reload", headers=key).json()["reloaded"]
        before = len(answers)
        while len(answers) < before + 6:
            time.sleep(0.01)
        stop.set()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {200}
        texts = {
            seed: make_model(seed).generate("question -> text", question="hello", max_tokens=6).value for seed in (1, 2)
        }
        assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == set(texts.values())
        old.thread.join(30)
        assert not old.thread.is_alive()
        assert checkpoint.scheduler is not old
        weights = weakref.ref(old.model)
        del old
        gc.collect()
        assert weights() is None  # nothing holds the old model any more


def test_a_reload_that_fails_leaves_the_old_model():
    there = [make_model]

    def load() -> mm.Model:
        if not there:
            raise ConfigError("the folder is gone")
        return there.pop()()

    with serving(load, keys=("secret",)) as client:
        key = {"authorization": "Bearer secret"}
        failed = client.post("/v1/models/tiny/reload", headers=key)
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "reload_failed")
        assert client.post(CHAT, json=body("a", max_tokens=2), headers=key).status_code == 200


def test_keys():
    with serving(keys=("one", "two")) as client:
        assert client.get("/health").status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer three"},
            {"authorization": "Basic one"},
            {"authorization": "one"},
        ):
            for refused in (
                client.get("/v1/models", headers=headers),
                client.post(CHAT, json=body("a"), headers=headers),
            ):
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
                assert refused.json()["error"]["type"] == "authentication_error"
        for key in ("one", "two"):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    with serving() as client:
        assert client.post("/v1/models/tiny/reload").status_code == 403


def test_keys_of_a_file(tmp_path):
    from multimodal.cli.serve import _keys

    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbfone\r\n# the next is of Ann\r\n\r\n\ttwo#2 \r\n  # three\r\n")
    assert _keys(file) == ("one", "two#2")
    with serving(keys=_keys(file)) as client:
        for key, status in (("one", 200), ("two#2", 200), ("# three", 401), ("", 401)):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == status
    for bad in ("", "a b", "\u00e9"):
        with pytest.raises(ConfigError, match="serve: key 2: a key is made of letters"):
            Settings(keys=("right", bad))


def test_whoever_comes_while_a_model_is_loaded_again_gets_the_new_one(monkeypatch):
    """A request reads the scheduler, which ends before the request has its place."""
    with serving() as client:
        checkpoint = client.app.state.service.checkpoints.by_name["tiny"]
        lease, reloads = scheduler_module.Scheduler.lease, [checkpoint.reload]

        def late(scheduler: Any) -> Any:
            if reloads:
                reloads.pop()()
                scheduler.thread.join(30)
                assert not scheduler.thread.is_alive()
            return lease(scheduler)

        monkeypatch.setattr(scheduler_module.Scheduler, "lease", late)
        assert client.post(CHAT, json=body("a", max_tokens=2)).status_code == 200
        assert not reloads
        monkeypatch.setattr(scheduler_module.Scheduler, "lease", lease)
        scheduler = checkpoint.scheduler
        assert checkpoint.close(30)
        with pytest.raises(scheduler_module.Closed), scheduler.lease():
            pass
        refused = client.post(CHAT, json=body("a", max_tokens=2))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        assert refused.headers["retry-after"] == "5"
        assert scheduler.leases == 0


def test_places_are_given_as_long_as_somebody_has_one():
    settings = Settings(rows=2, capacity=128)
    scheduler = scheduler_module.Scheduler(make_model(), "tiny", settings)
    told: list[Any] = []
    with scheduler.lease():
        scheduler.close()
        with scheduler.lease():
            scheduler.submit(scheduler_module.ModelCall(lambda model: "seen", told.append))
    scheduler.thread.join(30)
    assert told == ["seen"]
    assert not scheduler.thread.is_alive()


def test_a_stop_finishes_what_runs():
    settings = Settings(rows=2, capacity=128)
    checkpoint = Checkpoint("tiny", make_model, settings)
    scheduler = checkpoint.scheduler
    told: list[Any] = []
    from multimodal.generate.request import new_request

    with scheduler.lease():
        for i in range(4):
            request = new_request(
                scheduler.model.packer, "question -> text", {"question": "a" * (i + 1)}, "a", None, {}
            )
            request.limit = 20
            scheduler.submit(scheduler_module.Writing(request, told.append))
        scheduler.close()
        time.sleep(0.2)
        assert scheduler.thread.is_alive()
    assert checkpoint.close(60)
    assert sum(piece.prediction is not None for piece in told) == 4


def test_the_log_has_a_json_object_a_line_and_nothing_of_what_was_said():
    written = io.StringIO()
    handler = log_to(written)
    try:
        with serving() as client:
            client.post(CHAT, json=body("a secret word", max_tokens=2))
            client.post(
                CHAT, content=json.dumps(body("another", colour="\ud800")), headers={"content-type": "application/json"}
            )
    finally:
        logging.getLogger("multimodal.serve").removeHandler(handler)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    (answered,) = [line for line in lines if line["event"] == "answered"]
    assert (answered["status"], answered["task"], answered["written_tokens"]) == (200, "question -> text", 2)
    assert [line["status"] for line in lines if line["event"] == "refused"] == [400]
    assert "secret" not in written.getvalue()


def test_checkpoints_have_names_of_their_own(tmp_path):
    assert named_folder(str(tmp_path / "digits"))[0] == "digits"
    assert named_folder(str(tmp_path / "digits" / "model"))[0] == "digits"
    assert named_folder(f"small={tmp_path / 'digits'}") == ("small", tmp_path / "digits")
    with pytest.raises(ConfigError, match="one checkpoint or more"):
        Checkpoints([])
    with pytest.raises(ConfigError, match="rows=0 must be at least 1"):
        Settings(rows=0)


def test_several_checkpoints_have_a_thread_each():
    from starlette.testclient import TestClient

    settings = Settings(rows=2, capacity=128)
    checkpoints = [
        Checkpoint(name, lambda seed=seed: make_model(seed), settings) for seed, name in ((1, "one"), (2, "two"))
    ]
    with TestClient(make_app(checkpoints, settings)) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["one", "two"]
        for seed, name in ((1, "one"), (2, "two")):
            wanted = make_model(seed).generate("question -> text", question="hi", max_tokens=6).value
            found = client.post(CHAT, json=body("hi", max_tokens=6, model=name)).json()
            assert (found["model"], found["choices"][0]["message"]["content"]) == (name, wanted)
        for path, sent in ((CHAT, body("hi")), ("/v1/tasks/question -> text", {"fields": {"question": "hi"}})):
            refused = client.post(path, json=sent)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "missing_model")
            assert "'one', 'two'" in refused.text
    assert not any(checkpoint.scheduler.thread.is_alive() for checkpoint in checkpoints)
