"""The command serves a checkpoint on a port of this machine, for OpenAI's own client, for curl, and for clients that leave."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import multimodal as mm
from multimodal.transcription import transcribe
from tests.serve.conftest import EXTRA, RATE, data_url, make_model, png, wav, wave

httpx = pytest.importorskip("httpx", reason=EXTRA)
pytest.importorskip("starlette", reason=EXTRA)
pytest.importorskip("uvicorn", reason=EXTRA)
pytest.importorskip("python_multipart", reason=EXTRA)

ROOT = Path(__file__).resolve().parents[2]
CHAT, KEY = "/v1/chat/completions", "a-key-of-tests"


class Server:
    """`multimodal serve` in a process of its own."""

    def __init__(self, folder: Path, *options: str, model: mm.Model | None = None) -> None:
        (model or make_model()).save(folder / "tiny")
        (folder / "keys").write_text(f"{KEY}\n")
        self.log = (folder / "log").open("w+", encoding="utf-8")
        command = ["-m", "multimodal", "serve", str(folder / "tiny"), "--port", "0", "--rows", "4", "--capacity", "128"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        paths = [str(ROOT), str(ROOT / "tokenizers"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, *command, "--api-key-file", str(folder / "keys"), *options],
            cwd=folder,
            env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"serving tiny at (http://127\.0\.0\.1:\d+)", line)
        assert found, line + (folder / "log").read_text()
        self.url = found[1]
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("it does not answer")

    def client(self) -> Any:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120)

    def lines(self) -> list[dict[str, Any]]:
        self.log.flush()
        return [json.loads(line) for line in Path(self.log.name).read_text(encoding="utf-8").splitlines()]

    def gauge(self, name: str) -> float:
        with self.client() as client:
            text = client.get("/metrics").text
        return float(re.search(rf'^multimodal_{name}\{{model="tiny"\}} (\S+)$', text, re.MULTILINE)[1])

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()
        return code


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("serve"))
    yield made
    made.stop()


@pytest.fixture
def openai(server) -> Iterator[Any]:
    library = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    with library.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def parts(*given: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(given)}]


IMAGE = {"type": "image_url", "image_url": {"url": data_url(png())}}
SOUND = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav()).decode(), "format": "wav"}}


def test_openai_chats_with_pictures_and_sound(openai, model):
    assert [m.id for m in openai.models.list()] == ["tiny"]
    for content, task, fields in (
        ([IMAGE, {"type": "text", "text": "why?"}], "image question -> text", {"image": png(), "question": "why?"}),
        ([SOUND], "audio -> words:text", {"audio": wav()}),
    ):
        wanted = model.generate(task, max_tokens=8, **fields)
        options = {"model": "tiny", "messages": parts(*content), "max_tokens": 8, "extra_body": {"task": task}}
        found = openai.chat.completions.create(**options)
        assert found.choices[0].message.content == wanted.value
        assert found.usage.completion_tokens == len(wanted.tokens)
        chunks = list(openai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted.value
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == found.choices[0].finish_reason
        assert chunks[-1].usage == found.usage


def test_openai_transcribes_in_every_format(openai, model):
    (wanted,) = transcribe(model, "audio -> text", [(wave(5, 1.0), RATE)])
    options = {"model": "tiny", "file": ("a.wav", wav(5, 1.0)), "extra_body": {"task": "audio -> text"}}
    create = openai.audio.transcriptions.create
    assert create(**options).text == wanted.text
    for form, text in (("text", wanted.text + "\n"), ("srt", wanted.srt()), ("vtt", wanted.vtt())):
        assert create(**options, response_format=form).rstrip("\n") == text.rstrip("\n")
    whole = create(**options, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert [(w.word, w.start) for w in whole.words] == [(w.text, pytest.approx(w.start_s)) for w in wanted.words]
    assert whole.segments[0].start == pytest.approx(wanted.cues()[0][0] / 1000)
    events = list(create(**options, stream=True))
    assert events[-1].text == wanted.text == "".join(e.delta for e in events[:-1])


def test_openai_embeds_speaks_and_draws(openai, model):
    found = openai.embeddings.create(model="tiny", input=["one", "two"])
    wanted = model.vectors("image <-> text", [{"text": "one"}, {"text": "two"}])
    assert [d.embedding for d in found.data] == [pytest.approx(v, abs=1e-5) for v in wanted.tolist()]
    spoken = openai.audio.speech.create(model="tiny", voice="default", input="hi", extra_body={"max_tokens": 4})
    assert spoken.content.startswith(b"RIFF")
    drawn = openai.images.generate(model="tiny", prompt="cat").data[0].b64_json
    assert base64.b64decode(drawn).startswith(b"\x89PNG")


def test_openai_raises_its_own_errors(openai, server):
    import openai as library

    with pytest.raises(library.NotFoundError, match="there is no model 'gpt'"):
        openai.chat.completions.create(model="gpt", messages=parts(IMAGE))
    with pytest.raises(library.BadRequestError, match="is not supported") as caught:
        openai.chat.completions.create(model="tiny", messages=parts(IMAGE), logprobs=True)
    assert (caught.value.param, caught.value.type) == ("logprobs", "invalid_request_error")
    with pytest.raises(library.AuthenticationError):
        library.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    stream = openai.chat.completions.create(
        model="tiny", messages=parts({"type": "text", "text": "a" * 126}), max_tokens=1, stream=True
    )
    assert [c.choices[0].finish_reason for c in stream][-1] in ("stop", "length")


def test_a_client_that_leaves_gives_its_row_back(server):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 120, "stream": True}
    before = sum(line["event"] == "left" for line in server.lines())
    with server.client() as client:
        for _ in range(3):
            with client.stream("POST", CHAT, json=body) as response:
                next(response.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json={**body, "stream": False, "n": 4, "temperature": 1.0}, timeout=0.01)
    until = time.monotonic() + 60
    while server.gauge("open_requests") + server.gauge("rows") and time.monotonic() < until:
        time.sleep(0.05)
    assert (server.gauge("rows"), server.gauge("open_requests")) == (0, 0)
    assert sum(line["event"] == "left" for line in server.lines()) > before


def test_a_half_sent_request_harms_nobody(server):
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{",
        b"\x16\x03\x01\x02",
        b"GET /" + b"a" * 99_999,
    ):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(sent)
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_page_about_serving_shows_what_works(server, tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    (tmp_path / "cat.png").write_bytes(png())
    (tmp_path / "talk.wav").write_bytes(wav(5, 1.0))
    for block in blocks:
        code = block.replace("http://127.0.0.1:8000", server.url).replace("curl ", "curl -sS --fail-with-body ")
        found = subprocess.run(
            ["bash", "-euc", code],
            cwd=tmp_path,
            env=os.environ | {"KEY": KEY},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert found.returncode == 0, block + found.stdout + found.stderr
        assert found.stdout.strip() or "--output" in block, block


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_hangup_loads_again_and_a_stop_finishes_what_runs(tmp_path):
    server = Server(tmp_path)
    make_model(2).save(tmp_path / "tiny")
    server.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + 60
    while not any(line["event"] == "reloaded" for line in server.lines()) and time.monotonic() < until:
        time.sleep(0.05)
    wanted = make_model(2).generate("question -> text", question="hi", max_tokens=100).value
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "stream": True}
    with server.client() as client, client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted
    lines_of_log = server.lines
    server.process.wait(60)
    assert [line["event"] for line in lines_of_log()][-1] == "stopped"
    server.stop()


def test_the_command_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    from multimodal.cli import main

    def refused(*words: str) -> str:
        assert main(["serve", *words]) == 2
        return capsys.readouterr().err

    make_model().save(tmp_path / "tiny")
    tiny = str(tmp_path / "tiny")
    assert "one checkpoint or more" in refused()
    assert "there is no folder" in refused(str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\n")
    assert "holds no key" in refused(tiny, "--api-key-file", str(tmp_path / "empty"))
    assert "there is no such file" in refused(tiny, "--api-key-file", "/dev/zero")
    (tmp_path / "keys").write_text("# of Ann\n\n", encoding="utf-8")
    assert "holds no key" in refused(tiny, "--api-key-file", str(tmp_path / "keys"))
    for bad in ("two words", "schl\u00fcssel", "key # of Ann", "\u00a0", "a\x0bb", "a\0b"):
        (tmp_path / "keys").write_text(f"# of Ann\n\nright\n  {bad}\n", encoding="utf-8")
        said = refused(tiny, "--api-key-file", str(tmp_path / "keys"))
        assert "keys, line 4: a key is made of letters, digits and signs of ASCII" in said
        assert bad not in said
    (tmp_path / "keys").write_bytes("right".encode("utf-16"))
    assert "cannot be read" in refused(tiny, "--api-key-file", str(tmp_path / "keys"))
    assert "rows=0 must be at least 1" in refused(tiny, "--rows", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in refused(tiny, "--port", str(taken.getsockname()[1]))
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'multimodal-stream[serve]'" in refused(tiny)
    assert isinstance(mm.Model.load(tiny), mm.Model)
