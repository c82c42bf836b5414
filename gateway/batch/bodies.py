"""The body of a batch line, checked as the HTTP door checks it. Pure."""

from __future__ import annotations

from pydantic import ValidationError

from gateway.api.http.bodies import CompletionBody
from gateway.api.http.chat_body import ChatBody
from gateway.api.http.errors import from_validation
from gateway.batch.lines import LineRequest
from gateway.types import MAX_PRIORITY
from stageline.errors import InvalidArgumentError

_BODIES: dict[str, type[CompletionBody] | type[ChatBody]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}
# As in the HTTP body, where the lower goes first: after everybody who waits for an answer (0), also where a line asks for more.
PRIORITY, FIRST_PRIORITY = MAX_PRIORITY, 1


def checked_body(line: LineRequest) -> CompletionBody | ChatBody:
    """The line's body with the priority of batches. Raises what the HTTP door would answer with, and InvalidArgumentError
    for a stream."""
    try:
        body = _BODIES[line.url].model_validate(line.body)
    except ValidationError as error:
        raise from_validation(error.errors()[0]) from None
    if body.stream:
        raise InvalidArgumentError(
            "STREAM_IN_BATCH", "stream must be false or left out in a batch: the answer is one line", field="stream"
        )
    body.check()
    wanted = PRIORITY if body.priority is None else max(FIRST_PRIORITY, body.priority)
    return body.model_copy(update={"priority": wanted})
