"""Continuations of one context, scored one after another in the same KV blocks. Pure but for the queue.

A prefix cache of full blocks alone would compute the last, partial block of the context again for every continuation. In a
track that happens once: each continuation is written over the one before it. The logits of the context's last token score
the first token of every continuation of the track, so that one of n tokens costs n - 1. Several tracks run side by side.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence as Sequence_

from gateway.sampling import scored_tokens
from gateway.scheduler import ScheduledRow, Sequence
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
    own = (num_context - 1) % block_size_tokens + 1 if shares_prefix else num_context
    needed = num_context + sum(lengths) - len(lengths)
    affordable = 1 + int(MOST_OVERHEAD * needed / own)
    num_long = sum(length > 1 for length in lengths)
    return max(1, min(affordable, num_long, MAX_TRACKS, most_tokens // (num_context + max(lengths))))


class Track:
    """One sequence with its branches. It stands in a lane as a choice does."""

    masks = None

    def __init__(self, request: ScoreRequest, places: Sequence_[int], sequence_id: int, scores: Scores) -> None:
        """`places` of its continuations in the request, the longest first."""
        self.num_prompt_logprobs, self.deltas = request.num_logprobs, scores
        self.ended = False
        of = request.continuations
        branches = [place for place in places[1:] if len(of[place]) > 1]
        self._places = deque([places[0], *branches])
        self._single = [place for place in places[1:] if len(of[place]) == 1]
        self._continuations = of
        self._found: list[TokenLogprobs] = []
        self._firsts: dict[int, TokenLogprobs] = {}  # of every first token, once the context is computed
        first = of[places[0]]
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
            next_branches=tuple(of[place] for place in branches),
            first_ids=tuple(dict.fromkeys(of[place][0] for place in places[1:] if of[place][0] != first[0])),
        )

    def move(self) -> None:
        """Leave the scheduler: what is not scored yet goes on in a new sequence of the same number."""
        self.sequence = self.sequence.successor()

    def add_scores(self, result: pb.RowResult, row: ScheduledRow) -> None:
        """Take the scores of the next tokens; send those of continuations of one token. Raises what `scored_tokens` raises."""
        scores = scored_tokens(result, row.target_ids, row.alternative_ids)
        num_targets = len(row.target_ids)
        self._found += scores[:num_targets]
        if not self._firsts:
            self._firsts = {entry.token_id: entry for entry in (scores[0], *scores[num_targets:])}
            for place in self._single:
                self._send(place, (self._firsts[self._continuations[place][0]],))

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> bool:
        """A continuation is scored up to its last token: send its scores, return whether it was the last one."""
        self._send(self._places.popleft(), tuple(self._found))
        self.ended = not self._places
        self._found = [] if self.ended else [self._firsts[self._continuations[self._places[0]][0]]]
        return self.ended

    def _send(self, place: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
        cached = self.sequence.num_cached_prompt_tokens
        self.deltas.put_nowait(ContinuationScore(index=place, logprobs=logprobs, cached_context_tokens=cached))

    def fail(self, error: StagelineError) -> None:
        """End the whole request with an error."""
        if not self.ended:
            self.ended = True
            self.deltas.put_nowait(error)
