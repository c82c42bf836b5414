"""What becomes of a pipeline one of whose stages is about to stop, and of each of its sequences. Pure.

A sequence goes where its last token comes sooner: here, if that is before the stage stops, or on another pipeline, which
computes it again first. Estimates are of now; the keeper asks again and again while the stage drains.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

LEAVE_S = 0.5  # before the stage stops at the latest, so that nothing waits for a stream to break
DOUBT = 1.5  # so much longer than estimated may what stays take


class Action(enum.Enum):
    """What a pipeline with a draining stage does."""

    GO_ON = "go on"  # nobody else could take its work: serve, new work included, until the stage stops
    MOVE = "move"  # new work goes to a pipeline that stands, and so do the sequences that end sooner there
    REOPEN = "reopen"  # other replicas take the place of those that drain; all is computed again
    MERGE = "merge"  # give all to another draining pipeline, which our other stages make whole
    END = "end"  # nothing is left to do: let the stages go


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """`replaced`: there is a chain of our other stages and free ones. `others_ready`: a pipeline stands that does not drain.
    `mends_another`: our other stages, without us, make another draining pipeline whole. `wait_s`: see `reopen_wait_s`."""

    remaining_s: float
    num_sequences: int
    replaced: bool
    others_ready: bool
    mends_another: bool
    wait_s: float = 0.0


def choose(situation: Situation) -> Action:
    """What the pipeline does now."""
    if situation.replaced:
        return Action.REOPEN if situation.wait_s <= 0 else Action.GO_ON
    if situation.num_sequences == 0:
        return Action.END
    if situation.others_ready:
        return Action.MOVE
    if situation.mends_another:
        return Action.MERGE
    return Action.GO_ON


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How quick a pipeline is, as far as it was measured. `token_s`: from one token of a sequence to the next;
    `prefill_token_s`: for each token to compute; `backlog_tokens`: those that wait there already."""

    token_s: float | None
    prefill_token_s: float | None
    backlog_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Remainder:
    """What a sequence has before it: `left_tokens` to generate at most, None where nobody knows, and `num_tokens` to be
    computed again elsewhere. `begun`: anything of it was computed here. `suspected`: stages died of steps it was part
    of, more than once."""

    left_tokens: int | None
    num_tokens: int
    begun: bool
    suspected: bool = False


def stays(sequence: Remainder, *, remaining_s: float, here: Pace, there: Pace) -> bool:
    """Whether a sequence ends here, before the stage stops, and no later than it would elsewhere."""
    here_s = _finish_s(sequence, here)
    if here_s is None or DOUBT * here_s > remaining_s - LEAVE_S:
        return False
    if there.token_s is None or there.prefill_token_s is None or sequence.left_tokens is None:
        return True  # it is served as it is; what would be better, nobody knows
    again_s = (there.backlog_tokens + sequence.num_tokens) * there.prefill_token_s
    return here_s <= again_s + sequence.left_tokens * there.token_s


def reopen_wait_s(sequences: Iterable[Remainder], *, remaining_s: float, here: Pace) -> float:
    """How long to wait before other replicas take over: until all that runs has ended, where that takes no longer than to
    compute it again, else not at all."""
    running = [sequence for sequence in sequences if sequence.begun]
    ends_s = [_finish_s(sequence, here) for sequence in running]
    if not running or here.prefill_token_s is None or None in ends_s:
        return 0.0
    longest_s = max(end_s for end_s in ends_s if end_s is not None)
    again_s = sum(sequence.num_tokens for sequence in running) * here.prefill_token_s
    return longest_s if longest_s <= again_s and DOUBT * longest_s <= remaining_s - LEAVE_S else 0.0


def _finish_s(sequence: Remainder, here: Pace) -> float | None:
    """Until its last token where it is; None where that cannot be told."""
    if not sequence.begun or sequence.left_tokens is None or here.token_s is None:
        return None
    return sequence.left_tokens * here.token_s
