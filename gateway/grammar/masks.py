"""The masks of one sequence: which tokens its grammar allows next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher

from stageline.errors import InvalidArgumentError

SLOW_MASK_S = 0.02
"""CPU time of a mask that a step of other sequences does not wait for. Those of ordinary grammars take about a millisecond."""


def allows_only(mask: bytes, token_ids: Sequence[int]) -> bool:
    """Whether every token that a mask allows is among `token_ids`."""
    bits = int.from_bytes(mask, "little")
    for token_id in token_ids:
        bits &= ~(1 << token_id)
    return bits == 0


class RowMasks:
    """Computes the mask of the next position as soon as a token is known, while the loop does other things.

    `ready` is the mask of the current position: ceil(vocab_size / 8) bytes, bit i of byte i/8 for token i. It is read
    once before the next `advance`. It fails with InvalidArgumentError where the grammar exceeds its limits on the way,
    or where a resumed sequence does not follow it. `slow`: one of its masks took more than SLOW_MASK_S.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor],
        num_bytes: int,
        token_ids: tuple[int, ...],
        *,
        slow: bool,
    ) -> None:
        """`pools`: for masks, and for those of slow grammars."""
        self._matcher, self._pools, self._num_bytes, self.slow = matcher, pools, num_bytes, slow
        self.ready = self._submit(token_ids)

    def advance(self, token_id: int) -> None:
        """The sequence went on with `token_id`."""
        self.ready = self._submit((token_id,))

    def _submit(self, token_ids: tuple[int, ...]) -> asyncio.Future[bytes]:
        ready = asyncio.get_running_loop().run_in_executor(self._pools[self.slow], self._compute, token_ids)
        ready.add_done_callback(_retrieved)
        return ready

    def _compute(self, token_ids: tuple[int, ...]) -> bytes:
        matcher, began_s = self._matcher, time.thread_time()
        followed = not token_ids or matcher.consume_tokens(list(token_ids))
        mask = matcher.compute_bitmask() if followed else b""
        self.slow = self.slow or time.thread_time() - began_s > SLOW_MASK_S
        if not matcher.is_error():
            return mask[: self._num_bytes]
        fault = matcher.get_error().partition("<non-verbose")[0].strip()
        if matcher.stop_reason() in ("ParserTooComplex", "LexerTooComplex") or followed:
            raise InvalidArgumentError(
                "GRAMMAR_TOO_COMPLEX", f"the grammar exceeds its limits in the middle of the answer: {fault:.300}"
            )
        raise InvalidArgumentError("GRAMMAR_NOT_FOLLOWED", f"the tokens so far do not follow the grammar: {fault:.300}")


def _retrieved(future: asyncio.Future[bytes]) -> None:
    if not future.cancelled():
        future.exception()  # whoever needs the mask looks again; nobody may, where the request has ended
