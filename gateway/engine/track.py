"""Continuations of one context, scored one after another in the same KV blocks. Pure but for the queue.

A prefix cache of full blocks alone would compute the last, partial block of the context again for every continuation. In a
track that happens once: each continuation is written over the one before it, and the context's last token is computed with
each, since its logits score the first token. Several tracks run side by side.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence as Sequence_

from gateway.sampling import scored_tokens
from gateway.scheduler import Sequence
from gateway.types import ContinuationScore, ScoreRequest, TokenLogprobs
from stageline.errors import StagelineError
from stageline.stage.v1 import stage_service_pb2 as pb

Scores = asyncio.Queue[ContinuationScore | StagelineError]

MOST_OVERHEAD = 0.15
"""Of the tokens that must be computed anyway, those that more tracks may cost."""
MAX_TRACKS = 64


def num_tracks(
    *, num_context: int, lengths: Sequence_[int], block_size_tokens: int, shares_prefix: bool, most_tokens: int
) -> int:
    """How many tracks score continuations of so many tokens each (`lengths`, at least one).

    Every track but the first computes what no cache holds of the context: its last block. As many as cost no more than
    MOST_OVERHEAD, and together at most `most_tokens` with the context counted in each: what may wait in the queue.
    """
    own = (num_context - 1) % block_size_tokens if shares_prefix else num_context - 1
    affordable = MAX_TRACKS if own == 0 else 1 + int(MOST_OVERHEAD * (num_context + sum(lengths)) / own)
    return max(1, min(affordable, len(lengths), MAX_TRACKS, most_tokens // (num_context + max(lengths))))


class Track:
    """One sequence with its branches. It stands in a lane as a choice does."""

    masks = None

    def __init__(self, request: ScoreRequest, places: Sequence_[int], sequence_id: int, scores: Scores) -> None:
        """`places` of its continuations in the request, the longest first."""
        self.num_prompt_logprobs, self.deltas = request.num_logprobs, scores
        self.ended = False
        self._places = deque(places)
        self._found: list[TokenLogprobs] = []
        first, *others = (request.continuations[place] for place in places)
        start = len(request.context_token_ids)
        self.sequence = Sequence(
            sequence_id=sequence_id,
            prompt_token_ids=request.context_token_ids + first[:-1],
            max_total_tokens=start + len(first),
            priority=request.priority,
            request_key=id(scores),
            tenant=request.tenant,
            deadline_s=request.deadline_s,
            use_prefix_cache=request.use_prefix_cache,
            cache_salt=request.cache_salt,
            score_from=start,
            forced_token_id=first[-1],
            branch_start=start,
            next_branches=tuple(others),
        )

    def move(self) -> None:
        """Leave the scheduler: what is not scored yet goes on in a new sequence of the same number."""
        self.sequence = self.sequence.successor()

    def add_scores(self, result: pb.RowResult, target_ids: Sequence_[int]) -> None:
        """Take the scores of the next tokens. Raises what `scored_tokens` raises."""
        self._found += scored_tokens(result, target_ids)

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> bool:
        """A continuation is scored up to its last token: send its scores, return whether it was the last one."""
        self.deltas.put_nowait(
            ContinuationScore(
                index=self._places.popleft(),
                logprobs=tuple(self._found),
                cached_context_tokens=self.sequence.num_cached_prompt_tokens,
            )
        )
        self._found.clear()
        self.ended = not self._places
        return self.ended

    def fail(self, error: StagelineError) -> None:
        """End the whole request with an error."""
        if not self.ended:
            self.ended = True
            self.deltas.put_nowait(error)
