"""Turns predictions and pieces into responses: JSON, data: URLs of pictures and sounds, server-sent events."""

import base64
import mimetypes
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response, StreamingResponse

from multimodal.heads import Prediction
from multimodal.serve.errors import ApiError
from multimodal.texts import as_json
from multimodal.tokenizer import Tokenizer
from multimodal.value_files import file_of

TYPES = {".png": "image/png", ".wav": "audio/wav"}
DONE = b"data: [DONE]\n\n"


def json_bytes(data: Any) -> bytes:
    """JSON as UTF-8; lone surrogates, which UTF-8 cannot encode, are written as \\u escapes."""
    return as_json(data).encode("utf-8", "backslashreplace")


def json_response(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(json_bytes(data), status, headers=headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """The response for an error."""
    return json_response(error.body(), error.status, error.headers)


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(data) + b"\n\n"


class EventStream:
    """A response of server-sent events. end: called when the response ends, also after an error or if it never began."""

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        self.events, self.end = events, end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy must not buffer the events
        try:
            await StreamingResponse(self.events, media_type="text/event-stream", headers=headers)(scope, receive, send)
        finally:
            self.end()


def value_json(tokenizer: Tokenizer, value: Any) -> Any:
    """A value as JSON: a picture, a sound or what the kind writes itself as a data: URL, any other value unchanged."""
    file = file_of(tokenizer, value)
    if file is None:
        return value
    kind = TYPES.get(file[0]) or f"{mimetypes.types_map.get(file[0], 'application/octet-stream')};name=answer{file[0]}"
    return f"data:{kind};base64,{base64.b64encode(file[1]).decode()}"


def answer_json(tokenizer: Tokenizer, answer: Prediction) -> dict[str, Any]:
    """A prediction with its probabilities. tokenizer: of the written kind."""
    found: dict[str, Any] = {
        "value": value_json(tokenizer, answer.value),
        "confidence": answer.confidence,
        "probability": {str(name): p for name, p in answer.probability.items()},
        "complete": answer.complete,
    }
    if answer.tokens is not None:
        found |= {"ended": answer.ended, "tokens": len(answer.tokens)}
        if not answer.tokens.content.is_floating_point():
            found["ids"] = answer.tokens.content.tolist()
    if answer.others:
        found["others"] = [answer_json(tokenizer, other) for other in answer.others]
    return found


def finish_reason(answer: Prediction) -> str:
    """Why an answer ended, in the terms of chat completions."""
    return "stop" if answer.complete else "length"


def usage(prompt: int, written: int) -> dict[str, int]:
    """Token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
