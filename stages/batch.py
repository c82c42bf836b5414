"""A step decoded into arrays. No torch here. T tokens, R rows, M blocks of the longest block table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stageline.errors import InvalidArgumentError
from stageline.stage.v1 import stage_service_pb2 as pb

INT32 = np.dtype("<i4")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """What the layers need of a micro-batch; rows of exactly one token come first."""

    step_id: int
    token_ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int64]  # [T]
    slots: NDArray[np.int64]  # [T]
    query_starts: NDArray[np.int32]  # [R + 1], cumulative
    query_lens: NDArray[np.int32]  # [R]
    context_lens: NDArray[np.int32]  # [R]
    block_tables: NDArray[np.int32]  # [R, M], padded with the row's own first block: what stands in another may be NaN
    sequence_ids: tuple[int, ...]
    fresh_blocks: NDArray[np.int64]  # blocks whose first slot is written by this step
    num_decode_rows: int
    output_rows: tuple[int, ...]  # rows whose last token needs logits
    scored_tokens: NDArray[np.int64]  # [S], places among the T tokens, ascending: their next tokens are scored
    target_ids: NDArray[np.int64]  # [S], those next tokens
    alternatives: tuple[tuple[int, NDArray[np.int64]], ...]  # places among the S, and other tokens scored there

    @property
    def attention_arrays(self) -> tuple[NDArray[Any], ...]:
        """What attention needs on the device: query starts, context lengths, block tables, positions, slots."""
        return self.query_starts, self.context_lens, self.block_tables, self.positions, self.slots

    @property
    def last_tokens(self) -> NDArray[np.int64]:
        """Index of the last token of each row of `output_rows`: [len(output_rows)]."""
        return self.query_starts[1:][list(self.output_rows)].astype(np.int64) - 1

    @classmethod
    def from_step(cls, step: pb.Step, *, vocab_size: int, num_blocks: int, block_size_tokens: int) -> StepBatch:
        """Decode and check a step. Raises InvalidArgumentError for anything that would read or write out of bounds."""
        if not step.rows:
            raise _bad("the step has no rows")
        capacity = num_blocks * block_size_tokens
        wide = np.array([(row.num_tokens, row.context_len) for row in step.rows], dtype=np.int64)
        if wide[:, 0].min() < 1 or (wide[:, 1] < wide[:, 0]).any():
            raise _bad("every row needs at least one token and a context that includes its tokens")
        if wide[:, 1].max() > capacity:  # before anything of that size is made
            raise _bad(f"a context of {wide[:, 1].max()} tokens is more than the {capacity} slots of the KV cache")
        queries, lengths = (np.ascontiguousarray(column, dtype=np.int32) for column in wide.T)
        decode = int((queries == 1).sum())
        if (queries[:decode] != 1).any():
            raise _bad("rows of exactly one token must come first")
        token_ids = _int32(step.token_ids, int(queries.sum()), "token_ids")
        if token_ids.min() < 0 or token_ids.max() >= vocab_size:
            raise _bad(f"token ids must be in [0, {vocab_size})")
        blocks = -(-lengths // block_size_tokens)
        tables = np.zeros((len(queries), int(blocks.max())), dtype=np.int32)
        for index, row in enumerate(step.rows):
            table = _int32(row.block_table, int(blocks[index]), f"block_table of row {index}")
            tables[index] = table[0]
            tables[index, : blocks[index]] = table
        if tables.min() < 0 or tables.max() >= num_blocks:
            raise _bad(f"block ids must be in [0, {num_blocks})")
        starts = np.concatenate(([0], queries.cumsum())).astype(np.int32)
        row_of_token = np.repeat(np.arange(len(queries)), queries)
        offsets = np.arange(len(token_ids)) - starts[row_of_token]
        positions = (lengths - queries)[row_of_token] + offsets
        slots = (
            tables[row_of_token, positions // block_size_tokens].astype(np.int64) * block_size_tokens
            + positions % block_size_tokens
        )
        scored_tokens, target_ids, alternatives = _scored(step, starts, vocab_size)
        return cls(
            step_id=step.step_id,
            token_ids=token_ids,
            positions=positions.astype(np.int64),
            slots=slots,
            query_starts=starts,
            query_lens=queries,
            context_lens=lengths,
            block_tables=tables,
            sequence_ids=tuple(row.sequence_id for row in step.rows),
            fresh_blocks=slots[slots % block_size_tokens == 0] // block_size_tokens,
            num_decode_rows=decode,
            output_rows=tuple(i for i, row in enumerate(step.rows) if row.HasField("sampling")),
            scored_tokens=scored_tokens,
            target_ids=target_ids,
            alternatives=alternatives,
        )


def _scored(
    step: pb.Step, starts: NDArray[np.int32], vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[tuple[int, NDArray[np.int64]], ...]]:
    """The places that rows with `scoring` name, and their targets, [S] each; alternatives of rows' first targets."""
    places, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    alternatives, num_targets = [], 0
    for index, row in enumerate(step.rows):
        if not row.HasField("scoring"):
            continue
        first, count = row.scoring.first_token, len(row.scoring.target_ids) // 4
        if not 1 <= count <= row.num_tokens - first:
            raise _bad(f"row {index} has {count} targets after {first} of its {row.num_tokens} tokens")
        places.append(int(starts[index]) + np.arange(first, first + count))
        targets.append(_int32(row.scoring.target_ids, count, f"target_ids of row {index}").astype(np.int64))
        if others := row.scoring.alternative_ids:
            ids = _int32(others, len(others) // 4, f"alternative_ids of row {index}").astype(np.int64)
            alternatives.append((num_targets, ids))
        num_targets += count
    scored_tokens, target_ids = np.concatenate(places), np.concatenate(targets)
    for ids in (target_ids, *(ids for _, ids in alternatives)):
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            raise _bad(f"target ids must be in [0, {vocab_size})")
    return scored_tokens, target_ids, tuple(alternatives)


def _int32(data: bytes, count: int, name: str) -> NDArray[np.int32]:
    if len(data) != 4 * count:
        raise _bad(f"{name} must hold {count} int32 values, got {len(data)} bytes")
    return np.frombuffer(data, dtype=INT32).astype(np.int32)  # a copy: the message's bytes are read-only


def _bad(message: str) -> InvalidArgumentError:
    return InvalidArgumentError("MALFORMED_STEP", f"malformed step: {message}")
