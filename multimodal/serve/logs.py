"""The log of the service: one JSON object a line."""

import json
import logging
import time
import traceback
from typing import IO

from multimodal.texts import as_json

log = logging.getLogger("multimodal.serve")


class JsonLines(logging.Formatter):
    """Formats a record as time (UTC), level, event, the fields of the event and, for an error, its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        entry = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        entry |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            entry["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(json.loads(as_json(entry)))  # only ASCII, whatever a client sent


def log_to(stream: IO[str], level: int = logging.INFO) -> logging.Handler:
    """Write the log to an open file; returns the handler, so that it can be removed."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
    return handler
