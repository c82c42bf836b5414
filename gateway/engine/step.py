"""A micro-batch on the wire. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gateway.engine.choice import ChoiceState
from gateway.engine.track import Track
from gateway.sampling import place_sampling
from gateway.scheduler import MicroBatch, ScheduledRow
from stageline.stage.v1 import stage_service_pb2 as pb


def build_step(batch: MicroBatch, choices: Mapping[int, ChoiceState | Track]) -> pb.Step:
    """The Step of a micro-batch; `choices` has every sequence in it, by id."""
    step = pb.Step(step_id=batch.step_id, released_sequence_ids=batch.released_sequence_ids)
    step.token_ids = _int32([token for row in batch.rows for token in row.token_ids])
    for scheduled in batch.rows:
        row = step.rows.add(
            sequence_id=scheduled.sequence.sequence_id,
            num_tokens=scheduled.num_tokens,
            context_len=scheduled.context_len,
            block_table=_int32(scheduled.block_table),
        )
        choice = choices[scheduled.sequence.sequence_id]
        if scheduled.target_ids:
            row.scoring.num_logprobs = choice.num_prompt_logprobs
            row.scoring.first_token = scheduled.scored_from
            row.scoring.target_ids = _int32(scheduled.target_ids)
            row.scoring.alternative_ids = _int32(scheduled.alternative_ids)
        if scheduled.wants_output and isinstance(choice, ChoiceState) and choice.sequence.forced_token_id is None:
            _ask(row.sampling, scheduled, choice)
    return step


def _ask(sampling: pb.Sampling, row: ScheduledRow, choice: ChoiceState) -> None:
    sampling.CopyFrom(choice.asked)
    registration = None
    if row.needs_registration and choice.params.has_penalties():
        registration = row.sequence.prompt_token_ids, row.sequence.output_token_ids[: row.output_position]
    place_sampling(
        sampling,
        output_position=row.output_position,
        suppressed=choice.suppressed(row.output_position),
        registration=registration,
    )
    if mask := choice.allowed_tokens():
        sampling.allowed_token_bitmask = mask


def _int32(values: Sequence[int]) -> bytes:
    return np.array(values, dtype="<i4").tobytes()
