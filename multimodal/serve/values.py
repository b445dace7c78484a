"""Turns what a client sent for a field into tokens: texts, pictures, sounds, numbers. Never opens a file that it names."""

import base64
import binascii
import dataclasses
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from multimodal.composite import Composite
from multimodal.declare import OURS
from multimodal.files import parse_json
from multimodal.media import file_source
from multimodal.media.sources import paths_refused
from multimodal.serve.errors import ApiError, bad
from multimodal.serve.settings import Settings
from multimodal.shapes import MediaError
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, Tokens, describe

TEXT, CLASS, PICTURE, SOUND, NUMBERS = "text", "class", "picture", "sound", "numbers"
FETCH_S = 10.0  # seconds in which an allowed host has to answer


@dataclass(frozen=True)
class Upload:
    """A file in a form.

    data: its bytes.
    """

    data: bytes = dataclasses.field(repr=False)


def takes(tokenizer: Tokenizer) -> str:
    """The form of the values of this kind: TEXT, CLASS, PICTURE, SOUND or NUMBERS."""
    if tokenizer.text:
        return TEXT
    if tokenizer.classes:
        return CLASS
    if isinstance(getattr(tokenizer, "rate_hz", None), int):
        return SOUND
    if isinstance(getattr(tokenizer, "max_pixels", None), int):
        return PICTURE
    # a tokenizer that wraps another, such as `Codes` of pictures or a `Tower`
    return next((takes(inner) for inner in inside(tokenizer).values()), NUMBERS)


def limited(tokenizer: Tokenizer, settings: Settings) -> Tokenizer:
    """The same tokenizer with the limits of the service, which are checked before a picture or sound is decoded."""
    changes: dict[str, Any] = {name: limited(inner, settings) for name, inner in inside(tokenizer).items()}
    for name in {"max_pixels", "max_seconds"} & set(_fields(tokenizer)):
        changes[name] = min(getattr(tokenizer, name), getattr(settings, name))
    same = all(getattr(tokenizer, name) == value for name, value in changes.items())
    return tokenizer if same else dataclasses.replace(tokenizer, **changes)  # type: ignore[type-var]


def inside(tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    """The tokenizers among the fields of a tokenizer."""
    fields = ((name, getattr(tokenizer, name)) for name in _fields(tokenizer))
    return {name: value for name, value in fields if isinstance(value, Tokenizer)}


def _fields(tokenizer: Any) -> list[str]:
    """The constructor arguments of a dataclass."""
    fields = dataclasses.fields(tokenizer) if dataclasses.is_dataclass(tokenizer) else ()
    return [field.name for field in fields if field.init]


def encoded(tokenizer: Tokenizer, kind: str, raw: Any, where: str, settings: Settings) -> Tokens | None:
    """The tokens of the raw value that a client sent for one field; None if it sent null.

    where: the name of the field, for errors.

    Raises:
        ApiError: this is no value of the kind.
    """
    if raw is None:
        return None
    if isinstance(tokenizer, Composite) and type(tokenizer).__module__.partition(".")[0] in OURS:
        return _composed(tokenizer, kind, raw, where, settings)
    refused: ApiError | None = None
    with paths_refused():
        for value in _readings(takes(tokenizer), kind, raw, where, settings):
            try:
                return limited(tokenizer, settings)(value)
            except ValueError as error:
                refused = bad(f"{where}: {shortened(error, 500)}", where)
    assert refused is not None
    raise refused


def _composed(tokenizer: Composite, kind: str, raw: Any, where: str, settings: Settings) -> Tokens:
    """The tokens of a value of several parts, each of which is read as a field of its kind is."""

    def piece(path: str, part: Tokenizer, value: Any) -> Tokens:
        at = f"{where}.{path}"
        tokens = encoded(part, f"{kind}.{path}", value, at, settings)
        if tokens is None:
            raise bad(f"{at}: wanted a value, not null", where)
        return tokens

    if isinstance(raw, Upload):
        try:
            raw = parse_json(raw.data, object)
        except ValueError as error:
            raise bad(f"{where}: this file is no JSON: {shortened(error, 100)}", where) from None
    try:
        tokens = tokenizer.composed(raw, piece)
    except MediaError as error:
        raise bad(f"{where}: {shortened(error, 500)}", where) from error
    if not 0 < len(tokens) <= tokenizer.max_tokens:
        raise bad(f"{where}: {len(tokens)} tokens; wanted 1 to {tokenizer.max_tokens}", where)
    return tokens


def _readings(form: str, kind: str, raw: Any, where: str, settings: Settings) -> list[Any]:
    """The possible values of a raw value, the most likely first."""
    if form in (TEXT, CLASS):
        if isinstance(raw, Upload):
            raw = _decoded(raw.data, where)
        if form == TEXT and not isinstance(raw, str):
            raise bad(f"{where}: wanted a text, not {describe(raw)}", where)
        if isinstance(raw, Mapping):
            raise bad(f"{where}: wanted the name of a class, or a list of names, not an object", where)
        return [raw]
    if form in (PICTURE, SOUND):
        return [_media(form, raw, where, settings)]
    if isinstance(raw, Upload):
        try:
            raw = parse_json(raw.data, object)
        except ValueError:
            return [raw.data]  # a file of a kind that the user defined
    elif isinstance(raw, str) and raw[:5].lower() == "data:":
        return [url_bytes(raw, where, settings)]
    if kind not in settings.strings and (text := _text_in(raw)) is not None:
        raise bad(
            f"{where}: {shortened(repr(text), 60)} is a text, and values of {kind!r} are numbers. A text could name a file of the "
            "server; if this kind opens no files, the operator can allow texts with --strings",
            where,
        )
    if not isinstance(raw, list):
        return [raw]
    try:
        return [raw, np.array(raw, dtype=np.float32)]
    except (ValueError, TypeError, OverflowError):  # the lists have different lengths
        return [raw]


def _text_in(value: Any) -> str | None:
    """The first text in a JSON value."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return next(iter(value), None)  # keys are texts
    if isinstance(value, list):
        return next((text for inner in value if (text := _text_in(inner)) is not None), None)
    return None


def _media(form: str, raw: Any, where: str, settings: Settings) -> Any:
    """A picture or a sound: the bytes of its file, an array, or a pair (wave_S, rate_hz)."""
    if isinstance(raw, Upload):
        return raw.data
    if isinstance(raw, str):
        return url_bytes(raw, where, settings)
    if isinstance(raw, dict) and isinstance(raw.get("data"), str) and set(raw) <= {"data", "format"}:
        return base64_bytes(raw["data"], where)
    if form == SOUND and isinstance(raw, dict) and set(raw) == {"array", "sampling_rate"}:
        return _array(raw["array"], where), raw["sampling_rate"]
    if form == PICTURE and isinstance(raw, list):
        return _array(raw, where)
    also = '{"array": [..], "sampling_rate": 16000}' if form == SOUND else "rows of numbers in 0..1"
    raise bad(f"{where}: wanted a {form} as a data: URL, a file of a form, or {also}; not {describe(raw)}", where)


def _array(raw: Any, where: str) -> np.ndarray:
    try:
        if not isinstance(raw, list) or _text_in(raw) is not None:
            raise ValueError("no list of numbers")
        return np.array(raw, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        raise bad(f"{where}: wanted lists of numbers of equal lengths, not {describe(raw)}", where) from None


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(f"{where}: this is not UTF-8 text: {error}", where) from None


def base64_bytes(text: str, where: str) -> bytes:
    """Decode base64, or a data: URL."""
    if text[:5].lower() == "data:":
        return url_bytes(text, where, Settings())
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(f"{where}: this is not valid base64: {error}", where) from None


def url_bytes(url: str, where: str, settings: Settings) -> bytes:
    """The bytes in a data: URL, or at a URL of an allowed host."""
    if url[:5].lower() == "data:":
        try:
            source, _ = file_source(url, where)
        except MediaError as error:
            raise bad(str(error), where) from None
        assert not hasattr(source, "open")
        return source.read()  # type: ignore[union-attr]
    try:
        parts = urllib.parse.urlsplit(url)
        host, scheme = (parts.hostname or "").lower(), parts.scheme.lower()
    except ValueError:
        host = scheme = ""
    if scheme not in ("http", "https") or host not in settings.hosts:
        shown = shortened(repr(url), 60)
        if scheme in ("http", "https"):
            hosts = ", ".join(settings.hosts) or "none"
            raise bad(
                f"{where}: {shown} is not fetched; this service fetches only from the hosts of its option --allow-host ({hosts}): "
                "send the file itself, or a data:..;base64,.. URL",
                where,
            )
        file = url if len(url) <= 60 and url.isprintable() and not any(letter.isspace() for letter in url) else "FILE"
        raise bad(
            f"{where}: {shown} is no data:..;base64,.. URL, and no file is opened by its name; send such a URL, or in a form the "
            f"file itself: -F {where}=@{file}",
            where,
        )
    return _fetched(url, where, settings)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """Follow no redirect, since it could lead to a host that is not allowed."""


def _fetched(url: str, where: str, settings: Settings) -> bytes:
    opener = urllib.request.build_opener(_NoRedirect(), urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=FETCH_S) as answer:
            data = answer.read(settings.max_body + 1)
    except (OSError, ValueError) as error:  # including URLError and HTTPError
        raise bad(f"{where}: {shortened(repr(url), 100)} cannot be fetched: {shortened(error, 100)}", where) from None
    if len(data) > settings.max_body:
        raise ApiError(
            413, f"{where}: {shortened(repr(url), 100)} has more than {settings.max_body} bytes", param=where
        )
    return data
