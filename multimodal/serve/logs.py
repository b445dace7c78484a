"""The log of the service: one JSON object a line, with nothing of what clients sent."""

import json
import logging
import time
import traceback
from collections.abc import Iterator
from typing import IO

from multimodal.texts import as_json

log = logging.getLogger("multimodal.serve")


class JsonLines(logging.Formatter):
    """Formats a record as time (UTC), level, event, the fields of the event and, for an error, its class and its lines of code.

    It leaves out the message of an error, which may repeat what a client sent.
    """

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        # asyncio puts the error of a task below its first line
        event = record.getMessage().partition("\n")[0]
        entry = {"time": at, "level": record.levelname.lower(), "event": event}
        entry |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            entry["traceback"] = "".join(_traceback(record.exc_info[1]))
        return json.dumps(json.loads(as_json(entry)))  # only ASCII, whatever a client sent


def _traceback(error: BaseException | None) -> Iterator[str]:
    """The lines of a traceback of an error and of those that led to it, without their messages."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    for i, each in enumerate(reversed(seen)):
        yield "which led to:\n" if i else ""
        yield from traceback.format_tb(each.__traceback__)
        yield f"{type(each).__module__}.{type(each).__qualname__}\n"


def log_to(stream: IO[str], level: int = logging.INFO) -> logging.Handler:
    """Write the log to an open file; returns the handler, so that it can be removed."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
    return handler
