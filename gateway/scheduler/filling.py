"""How much work one micro-batch gets, so that the micro-batches in flight weigh about the same."""

from __future__ import annotations


def decode_target(*, num_ready: int, num_decoding: int, max_in_flight: int, num_free_slots: int) -> int:
    """How many of `num_ready` decode sequences go into this micro-batch.

    An even share of all decode sequences (`num_decoding`, those in flight included) over `max_in_flight` micro-batches,
    and never more than an even share of the ready ones over the slots that are free (this one included): without the
    latter 5 sequences would fill 4 slots as 2, 2, 1, 0. `num_free_slots` is at least 1.
    """
    return min(-(-num_decoding // max_in_flight), -(-num_ready // num_free_slots))


def prefill_budget(
    *,
    backlog_tokens: int,
    max_in_flight: int,
    free_kv_fraction: float,
    num_decoding: int,
    room_tokens: int,
    max_step_tokens: int,
    min_prefill_tokens: int,
) -> int:
    """Prefill tokens of this micro-batch, by token throttling (gLLM, SC'25, arXiv 2504.14775).

    The backlog, which counts every prompt token not computed yet, in flight or not, is spread over the micro-batches in
    flight: a prompt that arrives alone is cut into `max_in_flight` equal chunks. While sequences decode, the less of the
    KV cache is free, the smaller the chunks, so that decodes end and free blocks before prompts take the last ones. At
    least `min_prefill_tokens`, since a chunk of a few tokens costs a stage almost as much; at most `room_tokens`, what the
    decode rows left of `max_step_tokens`.
    """
    share = -(-backlog_tokens // max_in_flight)
    if num_decoding:
        share = min(share, int(max_step_tokens * free_kv_fraction))
    return min(room_tokens, max(min_prefill_tokens, share))
