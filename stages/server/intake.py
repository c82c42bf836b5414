"""Which steps an epoch of a stage takes: a pure state machine.

One stream keeps its order, but an epoch can have several: a neighbour that is wired again opens a new one while what it sent
on the old one still arrives. Executing a step twice is harmless only where everything after it is executed again too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stageline.errors import FailedPreconditionError


@dataclass(frozen=True, slots=True)
class Intake:
    """The steps of `epoch` are taken once each, in order, from 1; `last_step` is the one taken last."""

    epoch: int
    last_step: int = 0

    def admit(self, *, epoch: int, step_id: int) -> Intake:
        """Take one more step. Raises FailedPreconditionError STALE_EPOCH or STEP_OUT_OF_ORDER."""
        if epoch != self.epoch:
            raise FailedPreconditionError(
                "STALE_EPOCH", f"a step of epoch {epoch} came to epoch {self.epoch}; claim the stage again",
                epoch=epoch, current_epoch=self.epoch,
            )  # fmt: skip
        if step_id != self.last_step + 1:
            raise FailedPreconditionError(
                "STEP_OUT_OF_ORDER",
                f"step {step_id} came after step {self.last_step}: every step of an epoch is sent once, in order, from 1; "
                "begin a new epoch",
                step_id=step_id, expected_step_id=self.last_step + 1,
            )  # fmt: skip
        return replace(self, last_step=step_id)
