"""Requests that no service should answer, made at random: every one is wrong, and each kind of them in another way."""

import base64
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from tests.serve.conftest import data_url, png, wav

MOST_BODY = 2**20  # bytes that the service under test reads
MOST_PIXELS = 2**16
CHAT, SPEECH, PICTURES = "/v1/chat/completions", "/v1/audio/transcriptions", "/v1/images/generations"
WRITE, NAME, HEAR = (
    "/v1/tasks/question%20-%3E%20text",
    "/v1/tasks/image%20-%3E%20label",
    "/v1/tasks/audio%20-%3E%20text",
)
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": [{"type": "text", "text": "why"}]}], "max_tokens": 1},
    WRITE: {"fields": {"question": "why"}, "max_tokens": 1, "model": "tiny"},
    NAME: {"fields": {"image": data_url(png())}, "stream": False},
    HEAR: {"fields": {"audio": data_url(wav(), "audio/wav")}},
    "/v1/embeddings": {"input": ["why"], "encoding_format": "float"},
    "/v1/audio/speech": {"input": "why", "max_tokens": 1},
    PICTURES: {"prompt": "cat", "n": 1, "max_tokens": 1},
}
REQUIRED = {CHAT: "messages", WRITE: "fields", NAME: "fields", HEAR: "fields", "/v1/embeddings": "input"} | {
    "/v1/audio/speech": "input",
    PICTURES: "prompt",
}
NO_TEXT = (7, 1.5, True, [], {}, ["why"], {"a": "why"}, [[]])
NO_NUMBER = ("1", "x", [], {}, True, [1], {"a": 1}, "")
NO_WHOLE = (*NO_NUMBER, 1.5, 0, -1, 10**30, 2.0**70)
WRONG: dict[str, tuple[Any, ...]] = {
    "model": (*NO_TEXT, "large", "../tiny", "tiny\0", ""),
    "task": (*NO_TEXT, "image", "-> text", "x" * 5000),
    "stream": ("yes", "true", 1, 0, [], {}),
    "max_tokens": NO_WHOLE,
    "temperature": (*NO_NUMBER, -1),
    "top_p": (*NO_NUMBER, -1, 2, 1e308),
    "top_k": NO_WHOLE,
    "beams": NO_WHOLE,
    "seed": (*NO_NUMBER, 1.5, 10**30),
    "n": (*NO_WHOLE, 2, 10**6),
    "stop": (7, {}, [1], [""], [None], ["a"] * 2000, [["a"]]),
    "begin": NO_TEXT,
    "only": (7, {}, [1], [""], ["a" * 30_000]),
    "one_of": (7, {}, [1], [""], ["a"] * 2000),
    "repetition": NO_NUMBER,
    "no_repeat": NO_WHOLE,
    "guidance": NO_NUMBER,
}
MESSAGES: tuple[Any, ...] = (
    *("why", [], [[]], {}, 7, [7], [None], [{}], [{"role": "user"}], [{"role": "robot", "content": "why"}]),
    *(
        [{"role": "user", "content": x}]
        for x in (7, {}, [], [7], [None], ["why"], [{"type": "text"}], [{"text": "why"}])
    ),
    *(
        [{"role": "user", "content": [{"type": kind, kind: x}]}]
        for kind in ("image_url", "input_audio")
        for x in NO_TEXT
    ),
    [{"role": "assistant", "content": "why"}],
    [{"role": "user", "content": "why", "tool_calls": [{}]}],
    [{"role": "user", "content": "why"}] * 300,
)
PATHS = (
    *(
        "/etc/passwd",
        "../../etc/passwd",
        "file:///etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "C:\\boot.ini",
        "\\\\host\\share",
    ),
    *(
        "http://127.0.0.1:1/a.png",
        "http://169.254.169.254/latest/meta-data",
        "ftp://a/b",
        "gopher://a",
        "//a/b",
        "~/.ssh/id_rsa",
    ),
    *(
        "data:",
        "data:image/png",
        "data:image/png;base64,",
        "/proc/self/environ",
        "a\0.png",
        "|id",
        "$(id)",
        "%2e%2e%2f",
    ),
)
Random = random.Random


def raw(path: str, body: bytes = b"", kind: str = "application/json", method: str = "POST", *more: bytes) -> bytes:
    """A whole request."""
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: here", b"Connection: close", *more]
    if kind:
        lines.append(f"Content-Type: {kind}".encode())
    return b"\r\n".join([*lines, f"Content-Length: {len(body)}".encode(), b"", body])


def posted(path: str, value: Any) -> bytes:
    return raw(path, json.dumps(value).encode())


def any_path(draw: Random) -> str:
    return draw.choice(list(GOOD))


def any_text(draw: Random, most: int = 30) -> str:
    return "".join(chr(draw.choice((97, 122, 95, 48, 46, 228, 0x4E2D, 0x1F600))) for _ in range(draw.randint(1, most)))


def any_value(draw: Random, depth: int = 0) -> Any:
    kinds = 6 if depth < 3 else 4
    which = draw.randrange(kinds)
    if which < 4:
        return (draw.randint(-9, 9), draw.random(), any_text(draw), None)[which]
    inner = [any_value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    return inner if which == 4 else {any_text(draw, 5): value for value in inner}


def cut(draw: Random) -> bytes:
    path = any_path(draw)
    body = json.dumps(GOOD[path]).encode()
    return raw(path, body[: draw.randrange(len(body))])


def control_byte(draw: Random) -> bytes:
    path = any_path(draw)
    body = bytearray(json.dumps(GOOD[path]).encode())
    body[draw.randrange(len(body))] = draw.choice(b"\0\1\2\x0b\x1b\x1f")
    return raw(path, bytes(body))


def no_utf8(draw: Random) -> bytes:
    path = any_path(draw)
    body = json.dumps(GOOD[path]).encode()
    at = draw.randrange(len(body))
    return raw(path, body[:at] + draw.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8")) + body[at:])


def noise(draw: Random) -> bytes:
    return raw(any_path(draw), b"\0" + draw.randbytes(draw.randint(0, 3000)))


def wrong_type(draw: Random) -> bytes:
    path = draw.choice((CHAT, WRITE))
    if path == CHAT and draw.random() < 0.4:
        return posted(path, {**GOOD[path], "messages": draw.choice(MESSAGES)})
    name = draw.choice(list(WRONG))
    return posted(path, {**GOOD[path], name: draw.choice(WRONG[name])})


def no_object(draw: Random) -> bytes:
    return posted(any_path(draw), draw.choice(([], 7, "why", None, True, [{}], 1.5)))


def wrong_field(draw: Random) -> bytes:
    path = draw.choice((WRITE, NAME, HEAR))
    field = next(iter(GOOD[path]["fields"]))
    wrong = (7, True, [], {}, [None], {"path": "/etc/passwd"}, [[["a"]]], {"data": 7}, {"array": "a"}, 1e300)
    fields = draw.choice((7, "why", [], [1], {}, True, {field: draw.choice(wrong)}))
    return posted(path, {**GOOD[path], "fields": fields})


def unknown(draw: Random) -> bytes:
    path, name = any_path(draw), "x" + any_text(draw)
    value = json.loads(json.dumps(GOOD[path]))
    inside = [value, *([value["fields"]] if "fields" in value else []), *value.get("messages", [])]
    draw.choice(inside)[name] = any_value(draw) or 1
    return posted(path, value)


def missing(draw: Random) -> bytes:
    path = any_path(draw)
    return posted(path, {name: value for name, value in GOOD[path].items() if name != REQUIRED[path]})


def twice(draw: Random) -> bytes:
    path = any_path(draw)
    name = draw.choice(list(GOOD[path]))
    body = json.dumps(GOOD[path])
    return raw(path, f'{body[:-1]}, "{name}": {json.dumps(any_value(draw))}}}'.encode())


def json_bomb(draw: Random) -> bytes:
    depth = draw.choice((1000, 3000, 30_000, 90_000))
    before, after = draw.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    name = draw.choice(("messages", "fields", "stop", "x"))
    closed = draw.random() < 0.5
    text = before * depth + ("1" + after * depth if closed else "")
    return raw(any_path(draw), f'{{"{name}": {text}}}'.encode())


def large_json(draw: Random) -> bytes:
    body = draw.choice(
        (b'{"stop": [' + b'"a",' * 200_000 + b'"a"]}', b'{"a":1,"b": "' + b"c" * (MOST_BODY + 1) + b'"}')
    )
    return raw(any_path(draw), body)


def number(draw: Random) -> bytes:
    text = draw.choice(
        ("9" * 10_000, "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "0x10", "01", "+1", "1.", ".5", "1e", "--1")
    )
    return raw(draw.choice((CHAT, WRITE)), f'{{"{draw.choice(("seed", "temperature", "top_p"))}": {text}}}'.encode())


def with_media(draw: Random, picture: str, sound: str) -> bytes:
    """A request at any door for media, one of which is wrong."""
    return draw.choice(
        (
            lambda: posted(NAME, {"fields": {"image": picture}}),
            lambda: posted(HEAR, {"fields": {"audio": sound}}),
            lambda: posted(CHAT, _said({"type": "image_url", "image_url": {"url": picture}})),
            lambda: posted(
                CHAT,
                _said(
                    {"type": "input_audio", "input_audio": {"data": sound.partition(",")[2] or sound, "format": "wav"}}
                ),
            ),
        )
    )()


def _said(part: Any) -> dict[str, Any]:
    task = {"task": "audio -> text"} if part["type"] == "input_audio" else {}
    return {"messages": [{"role": "user", "content": [part]}], **task}


def base64_broken(draw: Random) -> bytes:
    data = base64.b64encode(png()).decode()
    at = draw.randrange(len(data))
    text = data[:at] + draw.choice(("#", "*", "\0", "é", "!", "\u2028")) + data[at + 1 :]
    return with_media(draw, f"data:image/png;base64,{text}", f"data:audio/wav;base64,{text}")


def paths(draw: Random) -> bytes:
    path = draw.choice(PATHS)
    return with_media(draw, path, path)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def picture_bomb(draw: Random) -> bytes:
    rows, columns = (draw.choice((300, 5000, 60_000, 2**31 - 1)) for _ in range(2))
    head = _chunk(b"IHDR", struct.pack(">LLBBBBB", columns, rows, 8, draw.choice((0, 2, 6)), 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress(b"\0" * draw.choice((10, 10**6)), 9))
    extra = _chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 10**7, 9)) if draw.random() < 0.3 else b""
    made = b"\x89PNG\r\n\x1a\n" + head + extra + data + _chunk(b"IEND", b"")
    return posted(NAME, {"fields": {"image": data_url(made)}})


def media_broken(draw: Random) -> bytes:
    picture, sound = png(), wav()
    magic = (
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"BM",
        b"RIFF\xff\xff\xff\xffWAVE",
        b"\xff\xd8\xff\xe0",
        b"OggS",
        b"fLaC",
        b"II*\0",
    )
    junk = draw.choice((*magic, b"%PDF-1.4", b"PK\3\4", b"\x1f\x8b", b"<svg/>")) + draw.randbytes(draw.randint(0, 300))
    if draw.random() < 0.5:
        return with_media(draw, data_url(junk), data_url(junk, "audio/wav"))
    return with_media(
        draw, data_url(picture[: draw.randrange(len(picture) // 2)]), data_url(sound[: draw.randrange(40)], "audio/wav")
    )


def too_long(draw: Random) -> bytes:
    return posted(HEAR, {"fields": {"audio": data_url(wav(0, 6 + draw.random()), "audio/wav")}})


def form(*parts: bytes, boundary: bytes = b"x") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


def part(name: str, data: bytes, more: str = "") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data


def form_broken(draw: Random) -> bytes:
    file = part("file", wav(), '; filename="a.wav"')
    task = part("task", b"audio -> text")
    good = form(task, file)
    kind = "multipart/form-data; boundary=x"
    made = draw.choice(
        (
            lambda: (kind, good[: draw.randrange(len(good) - 6)]),
            lambda: (kind.replace("=x", "=" + draw.choice(("y", "xx", "", '"', "x" * 300))), good),
            lambda: ("multipart/form-data", good),
            lambda: (kind, form(task, file, file)),
            lambda: (kind, form(task, part("file", wav()))),
            lambda: (kind, form(task, file, part("x" + any_text(draw), b"1"))),
            lambda: (kind, form(task, part("file", draw.randbytes(200), f'; filename="{draw.choice(PATHS[:7])}"'))),
            lambda: (kind, form(task, file, *(part(f"a{i}", b"1") for i in range(draw.choice((70, 3000)))))),
            lambda: (kind, form(task, *(part(f"f{i}", b"1", '; filename="a"') for i in range(40)))),
            lambda: (kind, form(task, b"Content-Disposition: form-data\r\n\r\n1", file)),
            lambda: (kind, form(task, b"Content-Disposition: attachment\r\n\r\n1", file)),
            lambda: (kind, form(task, b"\0" * 50 + b"\r\n\r\n1", file)),
            lambda: (kind, form(task, part("response_format", draw.choice((b"mp3", b"", b"\xff", b"json\0"))), file)),
            lambda: (kind, form(task, part("stream", draw.choice((b"yes", b"2", b"[]"))), file)),
            lambda: (kind, form(part("task", draw.choice((b"text", b"", b"\xff\xfe", b"image -> label"))), file)),
            lambda: (kind, form(part("model", b"large"), file)),
            lambda: (kind, b"--x" + draw.randbytes(500)),
            lambda: (kind, form(file.replace(b"form-data", b"form-data; " + b"a" * 20_000))),
        )
    )()
    return raw(SPEECH, made[1], made[0])


def other_type(draw: Random) -> bytes:
    path = any_path(draw)
    kinds = (
        "",
        "text/plain",
        "application/xml",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "a" * 2000,
        "/",
        ";",
    )
    return raw(path, json.dumps(GOOD[path]).encode(), draw.choice(kinds))


def huge_headers(draw: Random) -> bytes:
    one = b"X-A: " + b"a" * draw.choice((70_000, 200_000))
    many = b"\r\n".join(b"X-%d: %s" % (i, b"a" * 90) for i in range(1500))
    return raw(any_path(draw), b"{}", "application/json", "POST", draw.choice((one, many)))


def broken_http(draw: Random) -> bytes:
    path = any_path(draw)
    whole = json.dumps(GOOD[path]).encode()
    head = b"POST %s HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Type: application/json\r\n" % path.encode()
    return draw.choice(
        (
            head + b"Content-Length: -5\r\n\r\n" + whole,
            head + b"Content-Length: abc\r\n\r\n" + whole,
            head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + whole,
            head + b"Transfer-Encoding: gzip\r\n\r\n" + whole,
            head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n" + whole,
            head + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + whole,
            head + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n" + whole,
            head + b"Bad Name: 1\r\n\r\n",
            head + b"X: \0\r\n\r\n",
            head + b" folded\r\n\r\n",
            b"POST\r\n\r\n",
            b"\r\n\r\n\0\0\0\0\r\n\r\n",
            b"POST " + path.encode() + b" HTTP/9.9\r\n\r\n",
            b"POST " + path.encode() + b" with spaces HTTP/1.1\r\nHost: here\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
            b"SSH-2.0-a\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            draw.randbytes(draw.randint(10, 100)).replace(b"\n", b"") + b"\r\n\r\n",
        )
    )


def no_route(draw: Random) -> bytes:
    up = draw.choice(
        ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd", "/page.html", "/static/../x")
    )
    lost = draw.choice(
        (up, "/v1", "/v1/x", "/admin", "/.env", "/v1/tasks/x", "/v1/tasks/%00", "/v1/models/../x", "/" + "a" * 9000)
    )
    whole = json.dumps(GOOD[WRITE]).encode()
    made = (
        lambda: raw(lost, whole),
        lambda: raw("/x" if lost.startswith("/v1/tasks") else lost, b"", "", "GET"),
        lambda: raw(
            any_path(draw),
            whole,
            "application/json",
            draw.choice(("PUT", "DELETE", "PATCH", "TRACE", "post", "X" * 50)),
        ),
        lambda: raw(draw.choice(("/", "/health", "/metrics", "/v1/models")), whole),
        lambda: raw("/v1/models/" + draw.choice(("x", "%00", "..%2f", "tiny%20")), b"", "", "GET"),
        lambda: raw("/v1/models/tiny/reload"),  # nobody has a key
    )
    return draw.choice(made)()


def foreign(draw: Random) -> bytes:
    path = any_path(draw)
    origin = draw.choice(
        (b"https://evil.example", b"null", b"http://here.evil.example", b"http://here:1", b"\xff", b"http://[")
    )
    return raw(path, json.dumps(GOOD[path]).encode(), "application/json", "POST", b"Origin: " + origin)


KINDS: tuple[Callable[[Random], bytes], ...] = (
    *(
        cut,
        control_byte,
        no_utf8,
        noise,
        wrong_type,
        no_object,
        wrong_field,
        unknown,
        missing,
        twice,
        json_bomb,
        large_json,
    ),
    *(
        number,
        base64_broken,
        paths,
        picture_bomb,
        media_broken,
        too_long,
        form_broken,
        other_type,
        huge_headers,
        broken_http,
    ),
    *(no_route, foreign),
)


def malformed(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(kind, request) of this many requests, each kind as often as the others."""
    draw = random.Random(seed)
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        yield kind.__name__, kind(draw)


def slow(draw: Random) -> tuple[bytes, bytes]:
    """A request of which only the first part is sent, and what comes a while later."""
    path = any_path(draw)
    whole = posted(path, GOOD[path])
    body = whole.index(b"\r\n\r\n") + 4
    at = draw.choice((body, draw.randrange(body, len(whole) - 1), draw.randrange(10, body - 4)))
    return whole[:at], whole[at : at + 1]
