"""What a replica that can be bound to any stage loads it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.executor import StageExecutor
from stages.partition import LayerRange


@dataclass(frozen=True, slots=True)
class LoadedStage:
    """A stage that is ready to compute."""

    executor: StageExecutor
    kv_capacity_blocks: int


class StageLoader(Protocol):
    """Knows the model and has the memory."""

    def description(self) -> pb.DescribeResponse:
        """What Describe says of the replica while it holds no stage: the fields that do not depend on one."""
        ...

    def check(self, layers: LayerRange) -> None:
        """Raises InvalidArgumentError or ResourceExhaustedError where such a stage cannot be loaded; at once."""
        ...

    async def load(self, layers: LayerRange, progress: Callable[[int, int], None]) -> LoadedStage:
        """Load it; `progress(done_bytes, total_bytes)` is called on any thread, and what it raises ends the load."""
        ...
