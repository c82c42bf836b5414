"""One line of a batch through the engine: the same body, checks and answer as at the HTTP door."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway.access import visit as visits
from gateway.api.http.answers import AnswerWriter, ChatWriter, CompletionWriter
from gateway.api.service import Frontend
from gateway.batch.bodies import checked_body
from gateway.batch.lines import LineRequest

# url → (writer, prefix of ids)
_URLS: dict[str, tuple[type[AnswerWriter], str]] = {
    "/v1/completions": (CompletionWriter, "cmpl"),
    "/v1/chat/completions": (ChatWriter, "chatcmpl"),
}


class LineRunner:
    """Runs lines for their tenants, behind all interactive requests; among lines the lower `priority` goes first."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def __call__(self, line: LineRequest, tenant: str, request_id: str) -> dict[str, Any]:
        """The answer's object. Raises what the HTTP door would answer with."""
        body = checked_body(line)
        writer_class, prefix = _URLS[line.url]
        frontend, visit = self._frontend, self._frontend.doorkeeper.visit_of(tenant)
        visit.enter()
        visits.current.set(visit)  # of this line's own task
        try:
            accepted = [await frontend.accept(raw) for raw in body.raw_requests(request_id, None)]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(frontend.collect(one)) for one in accepted]
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        finally:
            visit.leave()
        writer = writer_class(f"{prefix}-{request_id}", accepted, frontend.model, frontend.tokenizer)
        return writer.whole([task.result() for task in tasks])
