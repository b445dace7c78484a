"""uvicorn's HTTP/1.1, with a timeout for the head (request line and headers) of a request."""

import asyncio
import functools
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from multimodal.serve.answers import json_bytes
from multimodal.serve.errors import ApiError
from multimodal.serve.settings import Settings


class Http(H11Protocol):
    """A connection. Without the timeout, a client that sends its head byte by byte, or nothing, could hold it open for ever.

    head_s: seconds for the head of a request; after them, the client gets an error 408, and the connection is closed.
    """

    def __init__(self, *arguments: Any, head_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.head_s = head_s
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_is_here()
        elif self._late is None:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        self._late = self.loop.call_later(self.head_s, self._refuse_head)

    def _head_is_here(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse_head(self) -> None:
        self._late = None
        if self.transport.is_closing() or self.conn.their_state is not h11.IDLE:
            return
        if self.conn.trailing_data[0]:  # a part of the head has arrived
            error = ApiError(408, f"the head of the request did not arrive within {self.head_s:g} s", code="timeout")
            self.transport.write(_response("408 Request Timeout", error))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with an error 400."""
        error = ApiError(
            400,
            "this is no valid HTTP/1.1 request: its first line, a header, its length or a chunk is malformed",
        )
        self.transport.write(_response("400 Bad Request", error))
        self.transport.close()


def http_protocol(settings: Settings) -> Any:
    """The protocol class for uvicorn's option `http`."""
    return functools.partial(Http, head_s=settings.body_s)


def _response(status: str, error: ApiError) -> bytes:
    """A whole response, after which the connection is closed."""
    body = json_bytes(error.body())
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
