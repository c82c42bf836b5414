"""Which tokens of which sequences go into the next micro-batch, and into which KV blocks.

Pure: no I/O, no clock, no asyncio, no protobuf. The engine calls `Scheduler`, sends what it returns, and reports back.
"""

from gateway.scheduler.block_pool import BlockPool
from gateway.scheduler.micro_batch import MicroBatch, ScheduledRow
from gateway.scheduler.scheduler import Scheduler
from gateway.scheduler.sequence import Sequence

__all__ = ["BlockPool", "MicroBatch", "ScheduledRow", "Scheduler", "Sequence"]
