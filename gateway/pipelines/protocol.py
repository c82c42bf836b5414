"""What the driver of a pipeline decides: pure. pipeline.py has the calls and streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stageline.errors import UnavailableError


def next_claim(granted: Sequence[int]) -> tuple[int, int] | None:
    """The next stage to claim, by its place, and the epoch it must at least grant; None when all granted the same.

    `granted` are the epochs that the stages granted last, 0 where none was. A stage issues its own epochs, so those that
    granted a lower one than another stage are claimed again.
    """
    highest = max(granted)
    return next(((place, highest) for place, epoch in enumerate(granted) if not epoch or epoch < highest), None)


@dataclass(frozen=True, slots=True)
class StepWindow:
    """The steps of an epoch that are out: those after `last_returned`, up to `last_sent`."""

    last_sent: int = 0
    last_returned: int = 0

    @property
    def oldest(self) -> int | None:
        """The step to return next; None when none is out."""
        return None if self.last_returned == self.last_sent else self.last_returned + 1

    def send(self, step_id: int) -> StepWindow:
        """One more is sent; they count from 1."""
        assert step_id == self.last_sent + 1, f"step {step_id} is sent after step {self.last_sent}"
        return replace(self, last_sent=step_id)

    def take(self, step_id: int) -> StepWindow:
        """A result came. Raises UnavailableError RESULT_OUT_OF_ORDER for any but that of the oldest step that is out."""
        if step_id != self.oldest:
            raise UnavailableError(
                "RESULT_OUT_OF_ORDER", f"the result of step {step_id} came where that of step {self.oldest} was due",
                step_id=step_id,
            )  # fmt: skip
        return replace(self, last_returned=step_id)
