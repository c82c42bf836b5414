"""Which tokens of which sequences go into the next micro-batch."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.scheduler.micro_batch import MicroBatch
from gateway.scheduler.sequence import Sequence


class Scheduler:
    """The scheduler of one pipeline: continuous batching, chunked prefill, several micro-batches in flight.

    The engine calls `schedule` until it returns None, sends each micro-batch, and calls `complete` (or `fail`) for each
    when it returns, in the order in which they were sent. Answers of an earlier epoch never reach the scheduler.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size_tokens: int,
        max_step_tokens: int = 2048,
        max_step_sequences: int = 256,
        max_in_flight: int = 1,
        max_waiting_sequences: int = 1024,
        min_prefill_tokens: int = 64,
    ) -> None:
        """Limits are per pipeline (`num_blocks`, `max_in_flight`, `max_waiting_sequences`) or per micro-batch.

        `max_in_flight` must not exceed any stage's queue depth; it may be set at any time, also while micro-batches are
        in flight. `min_prefill_tokens` is the least prefill a micro-batch carries while prompts wait and
        `max_step_tokens` leaves room.
        """
        raise NotImplementedError

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; `sequence.num_tokens` is under `max_total_tokens` and at least 1.

        Raises ResourceExhaustedError QUEUE_FULL when `max_waiting_sequences` wait already, InvalidArgumentError
        KV_CACHE_TOO_SMALL when the sequence could not be held even if it had all KV blocks alone.
        """
        raise NotImplementedError

    def schedule(self) -> MicroBatch | None:
        """The next micro-batch; None when nothing can run now or `max_in_flight` are out.

        With nothing in flight, None means that there are no sequences.
        """
        raise NotImplementedError

    def complete(self, step_id: int, tokens: Mapping[int, int]) -> None:
        """The oldest micro-batch in flight returned; `tokens` maps sequence id to chosen token id.

        There is one for every row that wants an output and whose sequence is not `finished`: `finish` first the sequences
        whose answer is unusable. Others are ignored. Each token is appended to its `output_token_ids`; a sequence that
        reaches `max_total_tokens` is finished here (a later `finish` of it does nothing).
        """
        raise NotImplementedError

    def fail(self, step_id: int) -> tuple[Sequence, ...]:
        """The oldest micro-batch in flight was not executed (StepError): its live sequences are finished and returned."""
        raise NotImplementedError

    def finish(self, sequence_id: int) -> bool:
        """End a sequence (stop token, cancelled, expired) at any time; False if there is none of that id (any more).

        Its blocks are free as soon as no micro-batch in flight touches them.
        """
        raise NotImplementedError

    cancel = finish

    def reset(self, num_blocks: int) -> tuple[Sequence, ...]:
        """A new epoch with `num_blocks` empty blocks: nothing is in flight, step ids restart from 1.

        All sequences wait to be computed again, in their old order. Those that cannot fit `num_blocks` are finished and
        returned.
        """
        raise NotImplementedError

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        raise NotImplementedError

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks: new, preempted, or sent back by a reset."""
        raise NotImplementedError

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be given to a sequence now."""
        raise NotImplementedError

    @property
    def num_in_flight(self) -> int:
        """Micro-batches sent and not returned."""
        raise NotImplementedError

    @property
    def num_preemptions(self) -> int:
        """Preemptions since the scheduler was made; a growing number means too few KV blocks."""
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Every invariant, or AssertionError. Costs time in proportion to blocks and tokens in flight: for tests."""
        raise NotImplementedError
