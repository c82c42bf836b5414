"""Which tokens of which sequences go into the next micro-batch, and into which KV blocks.

Pure: no I/O, no clock, no asyncio, no protobuf. The engine calls `Scheduler`, sends what it returns, and reports back.
"""

from gateway.scheduler.block_pool import BlockPool
from gateway.scheduler.integrity import check_integrity
from gateway.scheduler.limits import SchedulerLimits
from gateway.scheduler.micro_batch import MicroBatch, ScheduledRow
from gateway.scheduler.scheduler import PROBE_PRIORITY, Scheduler
from gateway.scheduler.sequence import Sequence
from gateway.scheduler.step_cost import StepTiming

__all__ = [
    "PROBE_PRIORITY",
    "BlockPool",
    "MicroBatch",
    "ScheduledRow",
    "Scheduler",
    "SchedulerLimits",
    "Sequence",
    "StepTiming",
    "check_integrity",
]
