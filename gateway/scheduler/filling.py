"""How much work one micro-batch gets, so that the micro-batches in flight weigh about the same. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

DECODE_SLOWDOWN = 2.35
"""How many times longer a micro-batch may take because it carries prefill. With T the time of its decode rows alone and
P that of the prefill, tokens of running streams come (T + P) / T times slower and the prompt takes (T + P) / P times as
long as alone: 2.35 and 1.74 here. Both sides of the bargain are about as far from their limits (2.5 and 2)."""

COHORT_SLOWDOWN = 8.0
"""The same while nothing decodes that did so before the prompt arrived. Prompts that came together are best computed together:
each small chunk pays the fixed cost of a step again, and of a burst the first to decode would pace all others."""

BACKGROUND_SLOWDOWN = 1.3
"""How many times longer than its other decode rows alone a micro-batch may take because of the background's rows."""


def num_groups(*, num_stages: int, fixed_s: float | None, overhead_s: float | None) -> int:
    """Into how many micro-batches in flight decode sequences are dealt out.

    With g groups of n/g sequences through k stages, whose step takes a + c·rows and whose ring loses h to hops and
    gateway, every sequence gets a token each max(g·a + c·n, k·a + k·c·n/g + h) seconds. g = k leaves the stages idle for h;
    each group more costs a: what does not depend on the rows, which on most hardware is reading the weights. So one more
    pays only where a is smaller than h. `fixed_s` (a) and `overhead_s` (h) are None until they were measured.
    """
    if not fixed_s or overhead_s is None:
        return num_stages
    return num_stages + int(overhead_s / fixed_s)


def decode_target(*, num_ready: int, num_decoding: int, num_groups: int, num_free_slots: int) -> int:
    """How many of `num_ready` decode sequences go into this micro-batch.

    An even share of all decode sequences (`num_decoding`, those in flight included) over `num_groups` micro-batches, and
    never more than an even share of the ready ones over the slots that are free (this one included): without the latter 5
    sequences would fill 4 slots as 2, 2, 1, 0. `num_free_slots` is at least 1.
    """
    return min(-(-num_decoding // num_groups), -(-num_ready // num_free_slots))


def num_chunks(*, backlog_tokens: int, num_stages: int, fixed_s: float | None, token_s: float | None) -> int | None:
    """Into how many equal chunks a backlog is best cut while nothing decodes; None until costs were measured.

    n chunks leave k stages after n + k - 1 steps of a + c·backlog/n seconds each; that is least at
    n = sqrt((k - 1)·c·backlog/a).
    """
    if not fixed_s or token_s is None:
        return None
    return max(1, round(math.sqrt((num_stages - 1) * token_s * backlog_tokens / fixed_s)))


def ramp(most_tokens: int, in_flight_tokens: Sequence[int]) -> int:
    """The most prefill tokens beside decode rows, given those of the micro-batches in flight.

    Micro-batches return as far apart as they were computed. When all of them grow at once, each finds its stage still busy
    with the one before, and the last of them waits for the growth of all. So they grow by a quarter a round.
    """
    if not in_flight_tokens:
        return most_tokens
    return min(most_tokens, min(in_flight_tokens) + max(1, most_tokens // 4))


def prefill_budget(
    *,
    backlog_tokens: int,
    num_chunks: int,
    free_kv_fraction: float,
    num_decoding: int,
    most_beside_decodes: int | None,
    room_tokens: int,
    max_step_tokens: int,
    min_prefill_tokens: int,
) -> int:
    """Prefill tokens of this micro-batch, by token throttling (gLLM, SC'25, arXiv 2504.14775).

    The backlog, which counts all tokens of the prompts that are not computed yet, in flight or not, is spread over
    `num_chunks` micro-batches: a prompt that arrives alone is cut into as many equal chunks. While sequences decode, the
    less of the KV cache is free, the smaller the chunks, so that decodes end and free blocks before prompts take the last
    ones; and no more than `most_beside_decodes`, what keeps the micro-batch short enough for them. At least
    `min_prefill_tokens`, since a chunk of a few tokens costs a stage almost as much; at most `room_tokens`, what the
    decode rows left of `max_step_tokens`.
    """
    share = -(-backlog_tokens // num_chunks)
    if num_decoding:
        share = min(share, int(max_step_tokens * free_kv_fraction))
        if most_beside_decodes is not None:
            share = min(share, most_beside_decodes)
    return min(room_tokens, max(min_prefill_tokens, share))
