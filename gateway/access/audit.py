"""The audit log: one line of JSON for each call at a door, also for those that were turned away.

Strangers must not fill the disk: of calls that nobody is known to have made at most STRANGERS_PER_MINUTE get a line, and the
next line of that kind says in `not_recorded` how many did not.
"""

from __future__ import annotations

import datetime
import json
import logging
import logging.handlers
import time

from gateway.access.limits import Bucket
from gateway.access.visit import Visit
from stageline.errors import ConfigError, StagelineError

STRANGERS_PER_MINUTE = 600

logger = logging.getLogger("stageline.audit")


class Audit:
    """Writes to `file`, which may be moved away for rotation, or to the log `stageline.audit`."""

    def __init__(self, file: str | None = None, *, prompts: bool = False) -> None:
        """`prompts`: lines hold the texts of prompts too. Raises ConfigError where the file cannot be written."""
        self.prompts = prompts
        self._strangers = Bucket.full(STRANGERS_PER_MINUTE, time.monotonic())
        self._num_not_recorded = 0
        self._log = logger
        if file is not None:
            try:
                handler = logging.handlers.WatchedFileHandler(file, encoding="utf-8")
            except OSError as error:
                raise ConfigError(
                    "AUDIT_FILE_NOT_WRITABLE",
                    f"security.audit_file {file}: {error.strerror}",
                    field="security.audit_file",
                ) from None
            handler.setFormatter(logging.Formatter("%(message)s"))
            self._log = logging.Logger("stageline.audit.file", logging.INFO)  # nobody else's
            self._log.addHandler(handler)

    def record(
        self, *, door: str, method: str, peer: str, request_id: str, status: str, duration_s: float,
        visit: Visit | None = None, error: StagelineError | None = None,
    ) -> None:  # fmt: skip
        """One call; `visit` is None where nobody is known to have made it. `status`: gRPC's code or HTTP's."""
        if visit is None:
            now_s = time.monotonic()
            if self._strangers.wait_s(1, now_s) > 0:
                self._num_not_recorded += 1
                return
            self._strangers.take(1, now_s)
        error = error or (visit.error if visit is not None else None)
        line: dict[str, object] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "door": door,
            "method": method,
            "peer": peer,
            "tenant": visit.account.tenant if visit is not None else None,
            "key_id": visit.key_id if visit is not None else None,
            "status": status,
            "reason": error.reason if error is not None else "",
            "prompt_tokens": visit.num_prompt_tokens if visit is not None else 0,
            "completion_tokens": visit.num_completion_tokens if visit is not None else 0,
            "duration_s": round(duration_s, 6),
        }
        if visit is None and self._num_not_recorded:
            line["not_recorded"], self._num_not_recorded = self._num_not_recorded, 0
        if visit is not None and visit.prompts is not None:
            line["prompts"] = visit.prompts
        self._log.info(json.dumps(line), extra={"call": line})
