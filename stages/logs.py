"""Log lines of our processes, on stderr: as text, or each as one JSON object. Neither torch nor Ray here."""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys

LOG_FORMATS = ("text", "json")
FIELDS = ("request_id", "pipeline", "epoch", "layers", "batch_id", "replica")
"""What a call of a logger may pass as `extra`."""


class JsonFormatter(logging.Formatter):
    """`time` (UTC), `level`, `logger`, `message`, `pid`, the fields of this process, those of the line, `exception`."""

    def __init__(self, **fields: object) -> None:
        super().__init__()
        self._fields = {"pid": os.getpid(), **fields}

    def format(self, record: logging.LogRecord) -> str:
        """One line, in ASCII: what is not is escaped, line breaks and lone surrogates too."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        call = getattr(record, "call", None)  # of the audit log, whose message is this very object as text
        line: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage() if call is None else "call",
            **self._fields,
            **{name: getattr(record, name) for name in FIELDS if hasattr(record, name)},
            **(call or {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(log_format: str = "text", **fields: object) -> None:
    """Our log lines go to the process's own stderr, which Ray carries to the driver: Serve may redirect sys.stderr.

    `log_format` is one of LOG_FORMATS; in JSON every line of this process has `fields`. From then on a line that cannot be written
    is lost. Python would say so on sys.stderr, which Serve writes to its own log: on a full disk that fails too, and so on until a
    RecursionError ends the request whose line it was.
    """
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.__stderr__)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter(**fields) if log_format == "json" else text)
    for name in ("stageline", "stages"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "stageline" else logging.WARNING)
