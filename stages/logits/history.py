"""What penalties need to know of a sequence: which tokens its prompt and its answer hold, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from stageline.errors import FailedPreconditionError
from stageline.stage.v1 import stage_service_pb2 as pb


class PenaltyHistory:
    """Histories by sequence id. Running a step again changes nothing: tokens are counted by their position."""

    def __init__(self) -> None:
        self._prompt: dict[int, frozenset[int]] = {}
        self._output: dict[int, Counter[int]] = {}
        self._length: dict[int, int] = {}  # tokens counted, prompt included

    def update(self, sequence_id: int, token_ids: NDArray[np.int32], context_len: int, sampling: pb.Sampling) -> None:
        """Replace the history by a registration, or count the row's tokens that are new.

        Raises FailedPreconditionError where a sequence was never registered in this epoch.
        """
        if sampling.HasField("registration"):
            prompt = np.frombuffer(sampling.registration.prompt_token_ids, dtype="<i4")
            output = np.frombuffer(sampling.registration.output_token_ids, dtype="<i4")
            self._prompt[sequence_id] = frozenset(prompt.tolist())
            self._output[sequence_id] = Counter(output.tolist())
            self._length[sequence_id] = len(prompt) + len(output)
            return
        if sequence_id not in self._length:
            raise FailedPreconditionError(
                "SEQUENCE_NOT_REGISTERED",
                f"sequence {sequence_id} has penalties but no history",
                sequence_id=sequence_id,
            )
        first = context_len - len(token_ids)
        fresh = token_ids[max(0, self._length[sequence_id] - first) :]
        self._output[sequence_id].update(fresh.tolist())
        self._length[sequence_id] += len(fresh)

    def seen(self, sequence_id: int) -> NDArray[np.int64]:
        """Ids in prompt or answer, ascending."""
        return np.array(sorted(self._prompt[sequence_id] | self._output[sequence_id].keys()), dtype=np.int64)

    def counts(self, sequence_id: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids of the answer and how often each stands there."""
        output = self._output[sequence_id]
        return np.fromiter(output.keys(), np.int64), np.fromiter(output.values(), np.float32)

    def release(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences."""
        for sequence_id in sequence_ids:
            self._prompt.pop(sequence_id, None)
            self._output.pop(sequence_id, None)
            self._length.pop(sequence_id, None)

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]
