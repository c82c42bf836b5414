"""What a door does with an exception that is not typed: log it whole, tell the client nothing but where to look."""

from __future__ import annotations

import logging

from gateway.access import visit as visits
from gateway.api.request_id import current
from stageline.errors import InternalError, ResourceExhaustedError, StagelineError

logger = logging.getLogger("stageline.gateway")


def as_typed(error: Exception, *, where: str) -> StagelineError:
    """A typed error as it is; any other becomes InternalError, with its traceback in the log and not in the answer.
    The audit log names it."""
    typed = error if isinstance(error, StagelineError) else _internal(error, where)
    if (visit := visits.current.get()) is not None:
        visit.error = typed
    return typed


def _internal(error: Exception, where: str) -> InternalError:
    name = current.get()
    logger.error("request %s: %s failed", name, where, exc_info=error, extra={"request_id": name})
    return InternalError(
        "INTERNAL", f"{where} failed inside the server; its log has the cause under request {name}",
        where=where, request_id=name,
    )  # fmt: skip


def reader_stalled(write_timeout_s: float) -> ResourceExhaustedError:
    """The end of a stream whose client took nothing for so long. Logged: the client may never see it."""
    name = current.get()
    logger.warning(
        "request %s: its client read nothing for %g s, the stream is ended", name, write_timeout_s,
        extra={"request_id": name},
    )  # fmt: skip
    return ResourceExhaustedError(
        "READER_TOO_SLOW", f"the client reads too slowly: it took nothing for {write_timeout_s:g} s; "
        "resume from what was read, and read faster",
    )  # fmt: skip
