"""What penalties need to know of a sequence: which tokens its prompt and its answer hold, and how often."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stageline.errors import FailedPreconditionError, InternalError
from stageline.stage.v1 import stage_service_pb2 as pb


@dataclass(slots=True)
class _History:
    length: int  # tokens counted, prompt included
    seen: NDArray[np.int64]  # ids of prompt and answer, ascending
    output: NDArray[np.int64]  # ids of the answer, ascending
    counts: NDArray[np.float32]  # how often each of `output` stands in the answer


class PenaltyHistory:
    """Histories by sequence id. Running a step again changes nothing: tokens are counted by their position."""

    def __init__(self) -> None:
        self._histories: dict[int, _History] = {}

    def update(self, sequence_id: int, token_ids: NDArray[np.int32], context_len: int, sampling: pb.Sampling) -> None:
        """Replace the history by a registration, or count the row's tokens that are new.

        Raises FailedPreconditionError (SEQUENCE_NOT_REGISTERED) where a sequence was never registered in this epoch,
        and InternalError (HISTORY_GAP) where tokens between the history and the row were never counted.
        """
        if sampling.HasField("registration"):
            prompt = np.frombuffer(sampling.registration.prompt_token_ids, dtype="<i4").astype(np.int64)
            answer = np.frombuffer(sampling.registration.output_token_ids, dtype="<i4").astype(np.int64)
            length = len(prompt) + len(answer)
            if length < context_len:
                raise _gap(sequence_id, length, context_len)
            output, counts = np.unique(answer, return_counts=True)
            seen = np.unique(np.concatenate((prompt, answer)))
            self._histories[sequence_id] = _History(length, seen, output, counts.astype(np.float32))
            return
        history = self._histories.get(sequence_id)
        if history is None:
            raise FailedPreconditionError(
                "SEQUENCE_NOT_REGISTERED",
                f"sequence {sequence_id} has penalties but no history",
                sequence_id=sequence_id,
            )
        first = context_len - len(token_ids)
        if first > history.length:
            raise _gap(sequence_id, history.length, first)
        for token in token_ids[history.length - first :].tolist():
            _count(history, token)

    def seen(self, sequence_id: int) -> NDArray[np.int64]:
        """Ids in prompt or answer, ascending."""
        return self._histories[sequence_id].seen

    def counts(self, sequence_id: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids of the answer, ascending, and how often each stands there."""
        history = self._histories[sequence_id]
        return history.output, history.counts

    def release(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences."""
        for sequence_id in sequence_ids:
            self._histories.pop(sequence_id, None)

    def reset(self) -> None:
        """Forget everything."""
        self._histories.clear()


def _count(history: _History, token: int) -> None:
    history.length += 1
    place = int(np.searchsorted(history.seen, token))
    if place == len(history.seen) or history.seen[place] != token:
        history.seen = np.insert(history.seen, place, token)
    place = int(np.searchsorted(history.output, token))
    if place == len(history.output) or history.output[place] != token:
        history.output = np.insert(history.output, place, token)
        history.counts = np.insert(history.counts, place, np.float32(0))
    history.counts[place] += 1


def _gap(sequence_id: int, counted: int, first: int) -> InternalError:
    return InternalError(
        "HISTORY_GAP",
        f"sequence {sequence_id}: the penalty history holds {counted} tokens, but the row follows {first}; "
        "the tokens between were never counted",
        sequence_id=sequence_id,
        counted=counted,
        first=first,
    )
