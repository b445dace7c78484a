"""Whatever a stranger sends is answered by 4xx with a reason, no file of the server is opened, and the service lives on."""

import base64
import builtins
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest

from tests.serve.conftest import data_url, png, serving, wav

CHAT, TASK = "/v1/chat/completions", "/v1/tasks/image -> label"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client():
    with serving(max_body=2**20, max_pixels=2**16, max_seconds=5) as made:
        yield made


@pytest.fixture(autouse=True)
def _alive(client):
    yield
    assert client.get("/health").json()["status"] == "ok"
    assert client.post(TASK, json={"fields": {"image": data_url(png())}}).status_code == 200


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert len(error["message"]) > 10
    assert "Traceback" not in response.text
    return error


DEEP = 100_000
BODIES = {
    "nothing": b"",
    "half": b'{"fields": {"image"',
    "a list": b"[]",
    "a number": b"7",
    "deep lists": b'{"fields": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "open brackets": b"[" * DEEP,
    "no UTF-8": b'{"fields": "\xff\xfe"}',
    "a long number": b'{"seed": ' + b"9" * 10_000 + b"}",
    "twice": b'{"fields": {}, "fields": {}}',
    "NaN": b'{"fields": {"image": [[NaN, 1]]}}',
    "infinity": b'{"fields": {"image": [[1e999, 1]]}}',
    "zero bytes": b"\0" * 1000,
    "UTF-16": '{"fields": {}}'.encode("utf-16"),
    "many values": b"[" + b"1," * 300_000 + b"1]",
}


@pytest.mark.parametrize("data", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("path", [CHAT, TASK, "/v1/embeddings", "/v1/audio/speech", "/v1/images/generations"])
def test_malformed_json(client, path, data):
    refused(client.post(path, content=data, headers=JSON))


FORMS = {
    "no boundary": ("multipart/form-data", b"--x\r\n\r\n--x--"),
    "empty": ("multipart/form-data; boundary=x", b""),
    "another boundary": (
        "multipart/form-data; boundary=x",
        b"--y\r\nContent-Disposition: form-data; name=file\r\n\r\na\r\n--y--",
    ),
    "no name": ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"),
    "no end": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc',
    ),
    "noise": ("multipart/form-data; boundary=x", b"--x" + bytes(range(256)) * 20),
    "long boundary": ("multipart/form-data; boundary=" + "x" * 5000, b"--" + b"x" * 5000),
    "many parts": (
        "multipart/form-data; boundary=x",
        b"".join(b'--x\r\nContent-Disposition: form-data; name="a%d"\r\n\r\n1\r\n' % i for i in range(500))
        + b"--x--\r\n",
    ),
    "a path as a name": (
        "multipart/form-data; boundary=x",
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="../../etc/passwd"\r\n\r\nroot\r\n--x--\r\n',
    ),
}


@pytest.mark.parametrize(("kind", "data"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", TASK])
def test_broken_forms(client, path, kind, data):
    refused(client.post(path, content=data, headers={"content-type": kind}))


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "application/json\x01"])
def test_other_types_of_bodies(client, kind):
    assert "content-type" in refused(client.post(CHAT, content=b"{}", headers={"content-type": kind}))["message"]


def test_bodies_that_are_too_large(client):
    refused(client.post(CHAT, content=b" " * (2**20 + 1), headers=JSON), 413)

    def parts():
        for _ in range(64):
            yield b" " * 2**15

    refused(client.post(CHAT, content=parts(), headers=JSON), 413)  # without a length in its head


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """The names of files that were opened meanwhile; a file that is there to be found."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    (tmp_path / "secret.wav").write_bytes(wav())
    names: list[str] = []
    real = builtins.open, io.open

    def noticed(file: Any, *arguments: Any, **options: Any) -> Any:
        names.append(str(file))
        return real[0](file, *arguments, **options)

    import soundfile
    from PIL import Image

    sound, picture = soundfile.SoundFile.__init__, Image.open

    def noticed_sound(self: Any, file: Any, *arguments: Any, **options: Any) -> None:
        names.append(str(file))
        sound(self, file, *arguments, **options)

    def noticed_picture(file: Any, *arguments: Any, **options: Any) -> Any:
        names.append(str(file))
        return picture(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", noticed)
    monkeypatch.setattr(io, "open", noticed)
    monkeypatch.setattr(soundfile.SoundFile, "__init__", noticed_sound)
    monkeypatch.setattr(Image, "open", noticed_picture)
    return tmp_path, names


def test_a_text_is_never_opened_as_a_file(client, opened):
    folder, names = opened
    picture, sound = str(folder / "secret.png"), str(folder / "secret.wav")
    there = [
        picture,
        f"file://{picture}",
        "/etc/passwd",
        "http://127.0.0.1:1/a.png",
        "ftp://a/b",
        "C:\\a.png",
        "",
        "data:",
    ]
    for path in there:
        refused(client.post(TASK, json={"fields": {"image": path}}))
        refused(client.post("/v1/tasks/audio -> text", json={"fields": {"audio": path}}))
        part = {"type": "image_url", "image_url": {"url": path}}
        refused(client.post(CHAT, json={"messages": [{"role": "user", "content": [part]}]}))
        refused(client.post(TASK, files={"image": (None, path)}))  # a part of a form that is no file
    for value in ({"path": picture, "bytes": None}, {"path": picture}, [picture], [[picture]], {"data": picture}):
        refused(client.post(TASK, json={"fields": {"image": value}}))
    for value in (sound, {"path": sound, "bytes": None}, [sound, 8000], {"array": sound, "sampling_rate": 8000}):
        refused(client.post("/v1/tasks/audio -> text", json={"fields": {"audio": value}}))
    speech = {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}
    refused(client.post(CHAT, json={"task": "audio -> text", "messages": [{"role": "user", "content": [speech]}]}))
    refused(client.post("/v1/audio/transcriptions", files={"file": (None, sound)}))
    refused(client.post("/v1/audio/transcriptions", data={"file": sound}))
    # a text is what it says
    assert (
        client.post("/v1/tasks/question -> text", json={"fields": {"question": picture}, "max_tokens": 1}).status_code
        == 200
    )
    assert [name for name in names if str(folder) in name or "passwd" in name] == []
    assert client.post(TASK, json={"fields": {"image": data_url(png())}}).status_code == 200
    assert any("BytesIO" in name for name in names)  # the test notices what is opened


def test_texts_for_kinds_of_numbers_are_refused_unless_the_operator_allows_them():
    from multimodal.serve.errors import ApiError
    from multimodal.serve.settings import Settings
    from multimodal.serve.values import encoded, takes
    from multimodal_tokenizers import Features, Ids

    kind = Features(2, normalise="none")
    assert takes(kind) == "numbers"
    assert len(encoded(kind, "pose", [[1, 2], [3, 4]], "pose", Settings())) == 2
    for value in ("/etc/passwd", [["a"]], {"path": "x"}):
        with pytest.raises(ApiError, match="--strings"):
            encoded(kind, "pose", value, "pose", Settings())
    with pytest.raises(ApiError, match="wanted an array"):
        encoded(kind, "pose", "/etc/passwd", "pose", Settings(strings=("pose",)))
    assert takes(Ids(5)) == "numbers"


def bomb(rows: int, columns: int) -> bytes:
    """A PNG of a few kilobytes that says it has this many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    head = struct.pack(">LLBBBBB", columns, rows, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
        + chunk(b"IEND", b"")
    )


def long_wav(seconds: float) -> bytes:
    return wav(0, seconds)


def test_more_tokens_than_one_pass_reads_are_refused():
    with serving(pass_tokens=20) as client:
        assert client.post(TASK, json={"fields": {"image": data_url(png(0, 16))}}).status_code == 200
        error = refused(client.post(TASK, json={"fields": {"image": data_url(png(0, 40))}}))
        assert "101 tokens, more than the 20" in error["message"]


BAD_PICTURES = {
    "bomb": bomb(30_000, 30_000),
    "large": bomb(300, 300),
    "cut": png()[:40],
    "text": b"hello",
    "empty": b"",
    "sound": wav(),
    "gif": b"GIF89a" + b"\xff" * 50,
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "svg": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
}


@pytest.mark.parametrize("data", BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_bad_pictures(client, data):
    refused(client.post(TASK, json={"fields": {"image": data_url(data)}}))
    refused(client.post(TASK, files={"image": ("a.png", data)}))


@pytest.mark.parametrize("data", [b"", b"RIFF", wav()[:30], png(), b"ID3" + b"\0" * 100, long_wav(6)], ids=len)
def test_bad_sounds(client, data):
    refused(client.post("/v1/audio/transcriptions", files={"file": ("a.wav", data)}, data={"task": "audio -> text"}))
    refused(client.post("/v1/tasks/audio -> text", files={"audio": ("a.wav", data)}))


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,###", "data:image/png", "data:;base64,aGVsbG8", "data:image/png;base64,%zz", "DATA:,"],
)
def test_bad_data_urls(client, url):
    refused(client.post(TASK, json={"fields": {"image": url}}))


WRONG: list[Any] = [
    None,
    0,
    -1,
    1.5,
    True,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    "a" * 5000,
    10**30,
    [1, "a"],
]


def test_values_of_every_wrong_type_are_refused_or_answered(client):
    """No answer is 5xx, for any value of any parameter."""
    bodies = {
        CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "/v1/embeddings": {"input": "a"},
        "/v1/audio/speech": {"input": "a", "max_tokens": 1},
        "/v1/images/generations": {"prompt": "cat"},
        "/v1/tasks/question -> text": {"fields": {"question": "a"}, "max_tokens": 1},
    }
    random = np.random.default_rng(0)
    names = (
        "messages",
        "model",
        "task",
        "stream",
        "stop",
        "seed",
        "n",
        "temperature",
        "top_p",
        "beams",
        "begin",
        "only",
        "fields",
    )
    for path, good in bodies.items():
        for name in {*names, *good}:
            for value in random.permutation(len(WRONG))[:5]:
                body = {**good, name: WRONG[value]}
                found = client.post(path, content=json.dumps(body), headers=JSON)
                assert found.status_code in (200, 400, 404, 413), (path, name, WRONG[value], found.text)
                if found.status_code != 200:
                    assert found.json()["error"]["message"]


def test_foreign_pages_are_refused(client):
    found = client.post(TASK, files={"image": ("a.png", png())}, headers={"origin": "https://evil.example"})
    assert refused(found, 403)["code"] == "foreign_origin"
    own = {"origin": "http://testserver"}
    assert client.post(TASK, files={"image": ("a.png", png())}, headers=own).status_code == 200


def test_only_allowed_hosts_are_asked(monkeypatch):
    from multimodal.serve import values
    from multimodal.serve.errors import ApiError
    from multimodal.serve.settings import Settings

    asked: list[str] = []
    monkeypatch.setattr(values, "_fetched", lambda url, where, settings: asked.append(url) or png())
    settings = Settings(hosts=("good.example",))
    assert values.url_bytes("https://good.example/a.png", "image", settings) == png()
    for url in (
        *(
            "https://evil.example/good.example",
            "https://good.example@evil.example/a",
            "https://good.example.evil.example/",
        ),
        *(
            "file://good.example/etc/passwd",
            "http://[good.example/",
            "//good.example/a",
            "good.example",
            "gopher://good.example/",
        ),
    ):
        with pytest.raises(ApiError, match=r"fetches only from the hosts of its option --allow-host|is no data:"):
            values.url_bytes(url, "image", settings)
    assert asked == ["https://good.example/a.png"]


def test_base64_is_strict():
    from multimodal.serve.errors import ApiError
    from multimodal.serve.values import base64_bytes

    assert base64_bytes(base64.b64encode(b"abc").decode(), "x") == b"abc"
    with pytest.raises(ApiError, match="not valid base64"):
        base64_bytes("/etc/passwd", "x")
