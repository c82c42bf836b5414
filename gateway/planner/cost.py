"""What a stage costs: bytes on its GPU, seconds of a micro-batch on it, seconds of a hop to the next.

Times are rooflines (Williams et al., 2009): a product takes as long as its operations or its bytes need at the device's
peak rate, whichever is longer. They are bounds, not measurements; a profile with measured rates turns them into
predictions. Symbols: D hidden size, F feed-forward size, V vocabulary, T tokens of a micro-batch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.planner.catalogue import Gpu
from gateway.planner.split import StageCost
from stages.config import ModelConfig
from stages.partition import LayerRange, kv_bytes_per_token, layer_tensor_shapes, num_parameters

LoadedSeconds = tuple[float, float, float]
"""On a core: alone on the host, while all its cores compute, and while twice as many processes do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Network between neighbouring stages.

    Defaults of `latency_s` and `software_bytes_per_s` were measured between two processes of a 2-core machine over
    loopback: 0.25-0.36 ms a smallest gRPC round trip, 0.9-1.0 GB/s in 1 MiB frames.
    """

    bytes_per_s: float = 25e9 / 8
    latency_s: float = 0.0003
    software_bytes_per_s: float = 0.95e9

    def seconds(self, num_bytes: int) -> float:
        """Time of one message to the next process."""
        return self.latency_s + num_bytes / min(self.bytes_per_s, self.software_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the plan is made for: sequences of `context_tokens` tokens on average, decoding.

    `step_sequences` decode in one micro-batch where the split is chosen; the limits are those of the scheduler.
    `sequences` decode at once in a pipeline, where its KV cache holds as many (None: as many as it holds).
    """

    context_tokens: int = 2048
    step_sequences: int = 16
    max_step_tokens: int = 2048
    max_step_sequences: int = 256
    sequences: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One micro-batch: T tokens, of which `output_rows` need logits; `attended_tokens` is the sum over the T tokens of
    the positions each attends to, `kv_tokens` the sum over sequences of the positions that are read from the cache."""

    tokens: int
    output_rows: int
    attended_tokens: float
    kv_tokens: float

    @classmethod
    def decode(cls, sequences: int, context_tokens: int) -> Step:
        """One token of each of `sequences`."""
        read = float(sequences * context_tokens)
        return cls(tokens=sequences, output_rows=sequences, attended_tokens=read, kv_tokens=read)

    @classmethod
    def prefill(cls, tokens: int, context_tokens: int) -> Step:
        """A chunk of one prompt, half of which has been computed on average."""
        before = context_tokens / 2
        return cls(tokens=tokens, output_rows=1, attended_tokens=tokens * before, kv_tokens=before)


@functools.cache
def layer_weight_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of one decoder layer."""
    return dtype_bytes * sum(math.prod(shape) for shape in layer_tensor_shapes(config, 0).values())


def layer_seconds(config: ModelConfig, gpu: Gpu, step: Step, dtype_bytes: int) -> float:
    """One decoder layer: its products, then attention over the cache; as measured, else a roofline."""
    if (known := gpu.measured) is not None:
        attention = max(known.kv_token_s * step.kv_tokens, known.attended_token_s * step.attended_tokens)
        return interpolate(known.layer_s, step.tokens) + attention
    weights = layer_weight_bytes(config, dtype_bytes)
    products = max(weights / gpu.memory_bytes_per_s, 2 * (weights / dtype_bytes) * step.tokens / gpu.flops_per_s)
    kv_bytes = step.kv_tokens * kv_bytes_per_token(config, LayerRange(0, 1), dtype_bytes)
    # Scores and weighted values: 2 operations each a query head, channel and attended position.
    operations = 4 * config.num_heads * config.head_dim * step.attended_tokens
    return products + max(kv_bytes / gpu.memory_bytes_per_s, operations / gpu.flops_per_s)


def head_seconds(config: ModelConfig, gpu: Gpu, step: Step, dtype_bytes: int) -> float:
    """`lm_head`, and writing and reading its float32 logits once for the choice; as measured, else a roofline."""
    if gpu.measured is not None:
        return interpolate(gpu.measured.head_s, step.output_rows)
    parameters = config.vocab_size * config.hidden_size
    products = max(
        parameters * dtype_bytes / gpu.memory_bytes_per_s, 2 * parameters * step.output_rows / gpu.flops_per_s
    )
    return products + 2 * 4 * step.output_rows * config.vocab_size / gpu.memory_bytes_per_s


def interpolate(points: Sequence[tuple[int, float]], size: int) -> float:
    """Between measured points a line; below the first as long as that, for nothing nothing; beyond the last in proportion."""
    if size <= 0:
        return 0.0
    (smallest, first_s), (largest, last_s) = points[0], points[-1]
    if size <= smallest:
        return first_s
    if size >= largest:
        return last_s * size / largest
    for (low, low_s), (high, high_s) in itertools.pairwise(points):
        if size <= high:
            return low_s + (high_s - low_s) * (size - low) / (high - low)
    raise AssertionError("points are ascending")


def stage_seconds(config: ModelConfig, layers: LayerRange, gpu: Gpu, step: Step, dtype_bytes: int) -> float:
    """Time of a micro-batch on a stage."""
    head = head_seconds(config, gpu, step, dtype_bytes) if layers.is_last(config) else 0.0
    return gpu.step_overhead_s + len(layers) * layer_seconds(config, gpu, step, dtype_bytes) + head


def loaded_seconds(
    config: ModelConfig, layers: LayerRange, gpus: tuple[Gpu, Gpu, Gpu], step: Step, dtype_bytes: int
) -> LoadedSeconds:
    """`stage_seconds` on each of `Gpu.under_load`."""
    alone_s, busy_s, crowded_s = (stage_seconds(config, layers, gpu, step, dtype_bytes) for gpu in gpus)
    return alone_s, busy_s, crowded_s


def at_load(seconds: LoadedSeconds, load: float) -> float:
    """Seconds on a core at a `Host.load`, interpolated."""
    alone_s, busy_s, crowded_s = seconds
    if load <= 1:
        return alone_s + load * (busy_s - alone_s)
    return busy_s + (load - 1) * (crowded_s - busy_s)


def weight_bytes(config: ModelConfig, layers: LayerRange, gpu: Gpu, dtype_bytes: int) -> int:
    """Weights of a stage. On the cores of a host (`gpu.host`) products have a layout of their own, so that a stage that looks up
    tied embeddings and multiplies with them holds them twice."""
    parameters = num_parameters(config, layers)
    if gpu.host is not None and config.tie_word_embeddings and len(layers) == config.num_layers:
        parameters += config.vocab_size * config.hidden_size
    return parameters * dtype_bytes


def activation_bytes(config: ModelConfig, workload: Workload, dtype_bytes: int, *, last: bool) -> int:
    """Largest sum of live tensors besides weights and cache while a full micro-batch is computed.

    In the MLP, for each token: gate and up side by side (2F), silu(gate) (F), their product (F); four sets of hidden
    states (4D); queries, keys and values, rotated in place, and what attention returned (twice queries and twice keys);
    cosines and sines. On the last stage, afterwards, for each sequence: logits in the model's dtype and
    three times in float32 (the rows, their exponentials for the log-sum-exp, a processed copy).
    """
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width = 4 * config.intermediate_size + 4 * config.hidden_size + 2 * (queries + keys) + 2 * config.head_dim
    mlp = workload.max_step_tokens * dtype_bytes * width
    logits = workload.max_step_sequences * config.vocab_size * (dtype_bytes + 3 * 4)
    return max(mlp, logits) if last else mlp


def usable_bytes(
    config: ModelConfig, gpu: Gpu, workload: Workload, dtype_bytes: int, fraction: float, *, last: bool
) -> int:
    """What a GPU has for weights and KV cache: `fraction` of its memory less the reserve and the activations."""
    return (
        int(gpu.memory_bytes * fraction)
        - gpu.reserve_bytes
        - activation_bytes(config, workload, dtype_bytes, last=last)
    )


def stage_cost(
    config: ModelConfig, gpu: Gpu, workload: Workload, dtype_bytes: int, fraction: float, *, first: bool, last: bool
) -> StageCost:
    """The cost model of one place in the pipeline, for `split.cut`: decode at the workload's batch and context."""
    step = Step.decode(workload.step_sequences, workload.context_tokens)
    ends = LayerRange(0 if first else 1, config.num_layers if last else config.num_layers - 1)
    layers_only = len(ends) * layer_weight_bytes(config, dtype_bytes)
    return StageCost(
        layer_s=layer_seconds(config, gpu, step, dtype_bytes),
        fixed_s=gpu.step_overhead_s + (head_seconds(config, gpu, step, dtype_bytes) if last else 0.0),
        memory_bytes=usable_bytes(config, gpu, workload, dtype_bytes, fraction, last=last),
        layer_bytes=layer_weight_bytes(config, dtype_bytes),
        fixed_bytes=weight_bytes(config, ends, gpu, dtype_bytes) - layers_only,
        kv_layer_bytes_per_token=kv_bytes_per_token(config, LayerRange(0, 1), dtype_bytes),
    )
