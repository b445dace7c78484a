"""Reads the body of a request, JSON or multipart, into parameters by name, within the limits of the service."""

import asyncio
import json
import math
import sys
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from multimodal.files import parse_json
from multimodal.serve.errors import ApiError, bad
from multimodal.serve.settings import Settings
from multimodal.serve.values import Upload
from multimodal.shapes import did_you_mean
from multimodal.texts import is_text, shortened

MOST_FILES, MOST_FIELDS = 16, 64  # of a form
LONGEST_LIST = 1000  # texts in one parameter


class Params:
    """The parameters of a request. Endpoints take each one by its type; `done` raises an error for a parameter that nobody took.

    form: whether they came as multipart, where numbers are texts.
    sent: the names of those that came.
    """

    def __init__(self, values: dict[str, Any], form: bool = False) -> None:
        self.values, self.form, self.sent = dict(values), form, frozenset(values)
        self.known: list[str] = []

    def take(self, name: str) -> Any:
        """The raw value of a parameter; None if it is missing or null."""
        self.known.append(name)
        return self.values.pop(name, None)

    def text(self, name: str, default: Any = None, one_of: Sequence[str] = ()) -> Any:
        """A text, or the default."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise bad(f"{name}: wanted a text, not {_shown(value)}", name)
        if one_of and value not in one_of:
            raise bad(f"{name}={_shown(value)} is not one of {', '.join(one_of)}{did_you_mean(value, one_of)}", name)
        return value

    def number(self, name: str, default: Any = None, low: float = -math.inf, high: float = math.inf) -> Any:
        """A finite number, or the default."""
        value = self.take(name)
        if value is None:
            return default
        if self.form and isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise bad(f"{name}: wanted a number, not {_shown(value)}", name) from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise bad(f"{name}: wanted a number, not {_shown(value)}", name)
        if not abs(value) <= 1e300 or not low <= value <= high:
            most = f" to {high:g}" if high < math.inf else " or more"
            bounds = f"; wanted {low:g}{most}" if low > -math.inf else "; wanted a finite number"
            raise bad(f"{name}={_shown(value)}{bounds}", name)
        return float(value)

    def whole(self, name: str, default: Any = None, low: int = -(2**63), high: int = 2**63 - 1) -> Any:
        """A whole number, or the default."""
        value = self.take(name)
        if value is None:
            return default
        if self.form and isinstance(value, str):
            try:
                value = int(value)
            except ValueError:
                raise bad(f"{name}: wanted a whole number, not {_shown(value)}", name) from None
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(f"{name}: wanted a whole number, not {_shown(value)}", name)
        if not low <= value <= high:
            raise bad(f"{name}={_shown(value)}; wanted a whole number from {low} to {high}", name)
        return value

    def flag(self, name: str) -> bool:
        """A boolean; False if it is missing."""
        value = self.take(name)
        if self.form and value in ("true", "false", "1", "0", "True", "False"):
            value = value in ("true", "1", "True")
        if value is not None and not isinstance(value, bool):
            raise bad(f"{name}: wanted true or false, not {_shown(value)}", name)
        return bool(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A text or a list of texts, as a tuple; () if it is missing."""
        value = self.take(name)
        if value is None:
            return ()
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
            raise bad(f"{name}: wanted a text, or a list of texts that are not empty; not {_shown(value)}", name)
        if len(value) > LONGEST_LIST:
            raise bad(f"{name} has {len(value)} texts, more than {LONGEST_LIST}", name)
        return tuple(value)

    def without(self, why: str, **allowed: Iterable[Any]) -> None:
        """Raise an error if an unsupported parameter is given, unless its value is one of these, which have no effect.

        why: the reason, for the error. allowed: {parameter: values without effect}.
        """
        for name, values in allowed.items():
            value = self.take(name)
            nothing = any(type(value) is type(v) and value == v for v in values)
            if self.form and isinstance(value, str):
                nothing = nothing or value in [json.dumps(v) for v in values]
            if value is not None and not nothing:
                raise bad(f"{name}={_shown(value)} is not supported: {why}; leave it out", name, "unsupported_value")

    def done(self) -> None:
        """Raise an error for the first parameter that nobody took."""
        for name in self.values:
            hint = did_you_mean(name, self.known)
            raise bad(
                f"there is no parameter {shortened(repr(name), 60)} here{hint or ', and none is ignored'}; known are "
                f"{', '.join(sorted(set(self.known)))}",
                shortened(name, 60),
                "unknown_parameter",
                made_up=True,
            )

    def missing(self, name: str, message: str) -> ApiError:
        """The error for a parameter that did not come; of one that came under a name like it, what its name is."""
        known = {*self.known, name}
        for given in self.values:
            if given not in known and did_you_mean(given, [name]):
                hint = f"there is no parameter {shortened(repr(given), 60)} here; did you mean {name!r}?"
                return bad(hint, shortened(given, 60), "unknown_parameter", made_up=True)
        return bad(message, name, "missing_parameter")


def _shown(value: Any) -> str:
    if isinstance(value, Upload):
        return "a file"
    try:
        return shortened(json.dumps(value), 60)
    except (TypeError, ValueError, RecursionError):
        return type(value).__name__


async def read_params(request: Request, settings: Settings) -> Params:
    """The parameters in the body of a request.

    Raises:
        ApiError: the body is too large, too slow, malformed, or of another content type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise bad(
            f"content-type: wanted application/json or multipart/form-data, not {shortened(repr(kind), 60)}",
            "content-type",
        )
    try:
        data = await asyncio.wait_for(_read(request, settings), settings.body_s)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.body_s:g} s", code="timeout") from None
    if kind == "application/json":
        try:
            values = parse_json(data)
        except UnicodeDecodeError as error:
            raise bad(f"the body is not UTF-8: {error}", code="invalid_json") from None
        except ValueError as error:
            raise bad(f"the body is not valid JSON: {shortened(error, 200)}", code="invalid_json") from None
        return Params(values)
    return Params(await _form(request, data, settings), form=True)


async def _read(request: Request, settings: Settings) -> bytes:
    too_large = ApiError(413, f"the body has more than the allowed {settings.max_body} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and len(length) < 20 and int(length) > settings.max_body:
        raise too_large
    parts, count = [], 0
    async for part in request.stream():
        count += len(part)
        if count > settings.max_body:
            raise too_large
        parts.append(part)
    return b"".join(parts)


class _FormParser(MultiPartParser):
    """A parser that knows whether the form is complete, and can close the files of incomplete parts."""

    ended = False
    spool_max_size = sys.maxsize  # never write to disk: the body is in memory already

    def on_end(self) -> None:
        self.ended = True

    def close(self) -> None:
        """Close the files of all parts; Starlette does so only for some errors."""
        for file in getattr(self, "_files_to_close_on_error", ()):
            file.close()


async def _form(request: Request, data: bytes, settings: Settings) -> dict[str, Any]:
    async def once() -> AsyncGenerator[bytes]:
        yield data
        yield b""

    parser = _FormParser(
        request.headers,
        once(),
        max_files=MOST_FILES,
        max_fields=MOST_FIELDS,
        max_part_size=settings.max_body,
    )
    found: dict[str, Any] = {}
    try:
        form = await parser.parse()
        if not parser.ended:
            raise MultiPartException("it has no end")
        for name, value in form.multi_items():
            key, several = name.removesuffix("[]"), name.endswith("[]")
            if not is_text(key):
                raise MultiPartException("the name of a part is no text")
            got = value if isinstance(value, str) else Upload(await value.read())
            if several:
                found.setdefault(key, []).append(got)
            elif key in found:
                raise bad(
                    f"the form has {shortened(repr(name), 60)} twice", shortened(name, 60), "invalid_form", made_up=True
                )
            else:
                found[key] = got
    except (ApiError, ClientDisconnect):
        raise
    except MultiPartException as error:
        raise bad(f"the form cannot be read: {shortened(error.message, 200)}", code="invalid_form") from None
    except Exception as error:  # the parser raises errors of many classes for malformed forms
        raise bad(f"the form cannot be read: {type(error).__name__}", code="invalid_form") from None
    finally:
        parser.close()
    return found
