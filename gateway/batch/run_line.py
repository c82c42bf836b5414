"""One line of a batch through the engine: the same body, checks and answer as at the HTTP door."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import ValidationError

from gateway.access import visit as visits
from gateway.api.http.answers import AnswerWriter, ChatWriter, CompletionWriter
from gateway.api.http.bodies import CompletionBody
from gateway.api.http.chat_body import ChatBody
from gateway.api.http.errors import from_validation
from gateway.api.service import Frontend
from gateway.batch.lines import LineRequest
from gateway.types import MAX_PRIORITY
from stageline.errors import InvalidArgumentError

# url → (body, writer, prefix of ids)
_URLS: dict[str, tuple[type[CompletionBody] | type[ChatBody], type[AnswerWriter], str]] = {
    "/v1/completions": (CompletionBody, CompletionWriter, "cmpl"),
    "/v1/chat/completions": (ChatBody, ChatWriter, "chatcmpl"),
}
# As in the HTTP body, where the lower goes first: after everybody who waits for an answer (0), also where a line asks for more.
PRIORITY, FIRST_PRIORITY = MAX_PRIORITY, 1


class LineRunner:
    """Runs lines for their tenants, behind all interactive requests; among lines the lower `priority` goes first."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def __call__(self, line: LineRequest, tenant: str, request_id: str) -> dict[str, Any]:
        """The answer's object. Raises what the HTTP door would answer with."""
        body_class, writer_class, prefix = _URLS[line.url]
        try:
            body = body_class.model_validate(line.body)
        except ValidationError as error:
            raise from_validation(error.errors()[0]) from None
        if body.stream:
            raise InvalidArgumentError(
                "STREAM_IN_BATCH", "stream must be false or left out in a batch: the answer is one line", field="stream"
            )
        body.check()
        wanted = PRIORITY if body.priority is None else max(FIRST_PRIORITY, body.priority)
        body = body.model_copy(update={"priority": wanted})
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
