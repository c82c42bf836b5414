"""What a request has to say and its client has not read yet. Generation never waits for a reader, so what a slow one leaves
is merged, counted, and bounded: a reader that falls too far behind loses its request."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from gateway.types import ChoiceDelta, TokenLogprobs
from stageline.errors import ResourceExhaustedError, StagelineError


@dataclass(slots=True)
class Unread:
    """Bounds of what is unread, of one request and of all of a gateway, and what all of them have unread now.

    In tokens, each log-probability that comes with one counting as a token. A token alone takes about 50 bytes of memory, a
    log-probability 130.
    """

    most: int = 1 << 62
    most_total: int = 1 << 62
    total: int = 0
    num_readers: int = 0  # requests that have something unread

    def too_much(self, own: int) -> bool:
        """Whether a request with `own` unread tokens is to be ended: over its bound, or, while all together are over
        theirs, more than the average behind."""
        return own > self.most or (self.total > self.most_total and own * self.num_readers > self.total)


@dataclass(slots=True)
class _Merged:
    """Deltas of one choice that nobody has read, joined only when somebody does."""

    last: ChoiceDelta
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, delta: ChoiceDelta) -> None:
        scores = self.last.prompt_logprobs  # they came with the first delta, and belong to it
        self.last = delta if scores is None else replace(delta, prompt_logprobs=scores)
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs

    def joined(self) -> ChoiceDelta:
        return replace(
            self.last,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
        )


class Deltas:
    """Carries the deltas of all choices of one request to one reader. Lives on one event loop."""

    def __init__(self, unread: Unread | None = None) -> None:
        self._unread = unread or Unread()
        self._pending: dict[int, ChoiceDelta | _Merged] = {}  # by choice, the one that waits longest first
        self._size = 0
        self._error: StagelineError | None = None
        self._waiter: asyncio.Future[None] | None = None  # of the one reader

    def put(self, delta: ChoiceDelta) -> bool:
        """Add a delta; False where the request is over, because of an error or since its reader is too far behind."""
        if self._error is not None:
            return False
        before = self._pending.get(delta.index)
        if before is None:
            self._pending[delta.index] = delta
        elif isinstance(before, _Merged):
            before.add(delta)
        else:
            merged = self._pending[delta.index] = _Merged(before)
            merged.add(before)
            merged.add(delta)
        self._count(_size(delta))
        self._wake()
        if self._unread.too_much(self._size):
            size = self._size
            self._forget()
            self.fail(
                ResourceExhaustedError(
                    "READER_TOO_SLOW",
                    f"the client reads too slowly: it left {size} tokens and log-probabilities unread; "
                    "resume from what was read, and read faster",
                    unread=size,
                )
            )
            return False
        return True

    def fail(self, error: StagelineError) -> None:
        """End the request, after what is unread; the first error counts."""
        if self._error is None:
            self._error = error
            self._wake()

    async def get(self) -> ChoiceDelta | StagelineError:
        """All that one choice has to say, or, after everything, the error."""
        while not self._pending:
            if self._error is not None:
                return self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        index = next(iter(self._pending))
        found = self._pending.pop(index)
        delta = found.joined() if isinstance(found, _Merged) else found
        self._count(-_size(delta))
        return delta

    def empty(self) -> bool:
        """Whether `get` would wait, or return the error."""
        return not self._pending

    def close(self) -> None:
        """Nobody will read any more."""
        self._forget()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _forget(self) -> None:
        self._pending.clear()
        self._count(-self._size)

    def _count(self, change: int) -> None:
        had = self._size > 0
        self._size += change
        self._unread.total += change
        self._unread.num_readers += (self._size > 0) - had


def _size(delta: ChoiceDelta) -> int:
    if not delta.logprobs and not delta.prompt_logprobs:
        return len(delta.token_ids)
    scored = (*delta.logprobs, *(delta.prompt_logprobs or ()))
    return len(delta.token_ids) + sum(1 + len(one.top) for one in scored)
