"""Errors that clients get: a status, and a body {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from multimodal.shapes import CheckpointError, ConfigError, MediaError, ShapeError, StreamError
from multimodal.texts import shortened

REFUSED = (ConfigError, MediaError, ShapeError, StreamError)  # clients get their messages
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in the RuntimeErrors of PyTorch


class ApiError(Exception):
    """An error response.

    status: of HTTP. param: the wrong parameter. code: an identifier for programs. retry_s: seconds after which to try again.
    made_up: whether `param` is a name that only the client knows; then the log has none.
    headers: more headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
        made_up: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_s = status, message, param, code, retry_s
        self.made_up, self.more = made_up, dict(headers or {})

    @property
    def kind(self) -> str:
        """The type of the error, as OpenAI's clients know it."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        own = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return own | ({} if self.retry_s is None else {"Retry-After": str(self.retry_s)}) | self.more

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None, *, made_up: bool = False) -> ApiError:
    """An error 400."""
    return ApiError(400, message, param=param, code=code or "invalid_value", made_up=made_up)


@contextmanager
def fields_are(names: Mapping[str, str]) -> Iterator[None]:
    """What is refused inside names the parameter that a field of the task came as."""
    try:
        yield
    except ApiError as error:
        error.param = names.get(error.param or "", error.param)
        raise


def stopping() -> ApiError:
    """Nothing new is taken, because the service stops."""
    return ApiError(503, "the service stops", code="stopping", retry_s=5)


def as_api_error(error: BaseException) -> ApiError:
    """The `ApiError` for any error. For a bug of ours, it has no details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, REFUSED) and not isinstance(error, CheckpointError):
        return bad(shortened(error, 1000))
    if isinstance(error, TimeoutError):
        return ApiError(504, "this took longer than the service allows; ask for less", code="timeout")
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(part in text for part in OUT_OF_MEMORY):
        return ApiError(503, "out of memory; try again later, or send less", retry_s=5)
    return ApiError(500, "internal error; the log of the service has the reason", code="internal_error")
