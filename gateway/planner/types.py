"""What is planned and what comes out: plain values."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from gateway.planner.catalogue import Gpu
from gateway.planner.cost import Link, Workload
from stages.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to plan. `gpus` are all GPUs there are, in the order written; `num_stages` (default: one a GPU) and `layers`
    as in the configuration. `usable_fraction` of a GPU's memory may be used, the rest stays unassigned. `num_spares` GPUs
    more, besides `gpus`, hold a replica each that can take any stage (`stages.spares`)."""

    model: str
    config: ModelConfig
    gpus: tuple[Gpu, ...]
    dtype: str = "bfloat16"
    num_stages: int | None = None
    layers: str | None = None
    link: Link = field(default_factory=Link)
    workload: Workload = field(default_factory=Workload)
    usable_fraction: float = 0.9
    block_size_tokens: int = 256
    num_spares: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Every byte of one GPU. `unassigned_bytes` is below 0 where the stage does not fit."""

    total_bytes: int
    weight_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    cuda_reserve_bytes: int
    unassigned_bytes: int

    @property
    def used_bytes(self) -> int:
        """All that is assigned."""
        return self.total_bytes - self.unassigned_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One stage. Times are those of a micro-batch: `decode_one_s` of one sequence, `decode_s` of a full one, `prefill_s`
    of a full chunk. `hop_*` is the way to the next stage, or from the last to the gateway."""

    index: int
    gpu: str
    layers: str
    num_layers: int
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    memory: Memory
    decode_one_s: float
    decode_s: float
    prefill_s: float
    hop_decode_s: float
    hop_prefill_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """Of one pipeline at the plan's workload. `sequences` decode at once in `in_flight` micro-batches."""

    latency_s_per_token: float
    ttft_s: float
    sequences: int
    in_flight: int
    tokens_per_s: float
    prefill_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """A plan. `kv_capacity_tokens` and `performance` are those of one pipeline, of which there are `num_pipelines`.

    `spare_gpu` is what each of `num_spares` spares runs on: the kind that holds the stage with the most bytes, so that it
    has room for any other; None without spares, and where nothing fits.
    """

    model: str
    dtype: str
    parameters: int
    num_pipelines: int
    stages: tuple[PlannedStage, ...]
    block_size_tokens: int
    num_blocks: int
    kv_capacity_tokens: int
    fits: bool
    performance: Performance | None
    num_spares: int = 0
    spare_gpu: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def layers(self) -> str:
        """The split as `stages.layers` takes it."""
        return ",".join(stage.layers for stage in self.stages)

    def gpu_counts(self) -> dict[str, int]:
        """How many GPUs of each kind all pipelines and spares take together."""
        counts = {kind: count * self.num_pipelines for kind, count in Counter(s.gpu for s in self.stages).items()}
        if self.spare_gpu is not None:
            counts[self.spare_gpu] += self.num_spares
        return counts
