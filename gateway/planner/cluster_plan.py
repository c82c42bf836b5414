"""A pipeline on given GPUs: who holds what, every byte of each GPU, and what that makes in tokens a second."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from gateway.planner.catalogue import Gpu
from gateway.planner.cost import (
    CUDA_RESERVE_BYTES,
    Step,
    activation_bytes,
    stage_cost,
    stage_seconds,
)
from gateway.planner.report import DTYPE_BYTES
from gateway.planner.split import check_num_stages, cut, resolve_layers, split, to_ranges
from gateway.planner.types import ClusterPlan, Memory, Performance, PlannedStage, Request
from stageline.errors import ConfigError
from stages.partition import LayerRange, kv_bytes_per_token, num_parameters
from stages.spec import DEFAULT_QUEUE_DEPTH_STEPS

MIN_BLOCKS = 2


def make_cluster_plan(request: Request) -> ClusterPlan:
    """The best plan for a request. Raises ConfigError where stages, layers and GPUs do not go together."""
    chosen, num_pipelines = _pipeline_gpus(request)
    plans = []
    for gpus in _orders(chosen):
        ranges = _ranges(request, gpus)
        plans.append(_plan(request, gpus, ranges, num_pipelines))
    # `min` keeps the first of equals: the order in which the user wrote the GPUs.
    return min(plans, key=lambda plan: (not plan.fits, -plan.performance.tokens_per_s if plan.performance else 0.0))


def _pipeline_gpus(request: Request) -> tuple[tuple[Gpu, ...], int]:
    """The GPUs of one pipeline, and how many such pipelines there are."""
    gpus, wanted = request.gpus, request.num_stages
    if wanted is None and request.layers is not None:
        wanted = len(resolve_layers(request.config, None, request.layers))
    if wanted is None:
        wanted = len(gpus)
    check_num_stages(wanted, request.config.num_layers)
    if wanted == len(gpus):
        return gpus, 1
    if wanted > len(gpus):
        raise ConfigError(
            "NOT_ENOUGH_GPUS", f"{wanted} stages need {wanted} GPUs, {len(gpus)} are given", field="stages.count"
        )
    if len(set(gpus)) > 1:
        raise ConfigError(
            "STAGES_GPUS_DIFFER",
            f"{wanted} stages on {len(gpus)} GPUs of several kinds: a mixed inventory is one pipeline of all its GPUs; "
            "leave --stages out or name only the GPUs to use",
            field="stages.count",
        )
    if len(gpus) % wanted:
        raise ConfigError(
            "STAGES_GPUS_DIFFER",
            f"{len(gpus)} GPUs are not a whole number of pipelines of {wanted} stages; "
            f"use {len(gpus) // wanted * wanted} of them",
            field="stages.count",
        )
    return gpus[:wanted], len(gpus) // wanted


def _orders(gpus: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    """The GPUs with their kinds in every order, the given one first; beyond 4 kinds the given one only."""
    kinds = list(dict.fromkeys(gpus))
    if len(kinds) > 4:
        return [tuple(gpus)]
    return [tuple(gpu for kind in order for gpu in gpus if gpu == kind) for order in itertools.permutations(kinds)]


def _ranges(request: Request, gpus: Sequence[Gpu]) -> tuple[LayerRange, ...]:
    config, workload, size = request.config, request.workload, DTYPE_BYTES[request.dtype]
    if request.layers is not None:
        return resolve_layers(config, len(gpus), request.layers)
    last = len(gpus) - 1
    costs = [
        stage_cost(config, gpu, workload, size, request.usable_fraction, first=i == 0, last=i == last)
        for i, gpu in enumerate(gpus)
    ]
    wanted = in_flight(len(gpus)) * workload.step_sequences * workload.context_tokens
    lengths = cut(config.num_layers, costs, min_tokens=MIN_BLOCKS * request.block_size_tokens, wanted_tokens=wanted)
    return to_ranges(lengths) if lengths else split(config, len(gpus))


def in_flight(num_stages: int) -> int:
    """Micro-batches a gateway keeps in a pipeline (`gateway.pipelines.pipeline`)."""
    return min(num_stages + 1, DEFAULT_QUEUE_DEPTH_STEPS)


def _plan(request: Request, gpus: Sequence[Gpu], ranges: Sequence[LayerRange], num_pipelines: int) -> ClusterPlan:
    config, size, block = request.config, DTYPE_BYTES[request.dtype], request.block_size_tokens
    sizes = [_sizes(request, gpu, layers) for gpu, layers in zip(gpus, ranges, strict=True)]
    blocks = min(max(0, free) // (per_token * block) for _, _, per_token, free in sizes)
    fits = blocks >= MIN_BLOCKS
    blocks = blocks if fits else 0
    sequences, flights, rows = _occupancy(request, len(gpus), blocks * block)
    stages = []
    for index, (gpu, layers, (weights, activations, per_token, free)) in enumerate(
        zip(gpus, ranges, sizes, strict=True)
    ):
        kv_bytes = blocks * block * per_token
        last = layers.is_last(config)
        workload = request.workload
        steps = (
            Step.decode(1, workload.context_tokens),
            Step.decode(rows, workload.context_tokens),
            Step.prefill(min(workload.max_step_tokens, workload.context_tokens), workload.context_tokens),
        )
        one_s, decode_s, prefill_s = (stage_seconds(config, layers, gpu, step, size) for step in steps)
        # The last stage returns a few candidates a row, not hidden states.
        hops = [request.link.seconds(0 if last else step.tokens * config.hidden_size * size) for step in steps]
        stages.append(
            PlannedStage(
                index=index,
                gpu=gpu.name,
                layers=str(layers),
                num_layers=len(layers),
                parameters=weights // size,
                weight_bytes=weights,
                kv_bytes_per_token=per_token,
                kv_capacity_tokens=max(0, free) // (per_token * block) * block,
                memory=Memory(
                    total_bytes=gpu.memory_bytes,
                    weight_bytes=weights,
                    kv_cache_bytes=kv_bytes,
                    activation_bytes=activations,
                    cuda_reserve_bytes=CUDA_RESERVE_BYTES,
                    unassigned_bytes=gpu.memory_bytes - weights - kv_bytes - activations - CUDA_RESERVE_BYTES,
                ),
                decode_one_s=one_s,
                decode_s=decode_s,
                prefill_s=prefill_s,
                hop_decode_s=hops[1],
                hop_prefill_s=hops[2],
            )
        )
    return ClusterPlan(
        model=request.model,
        dtype=request.dtype,
        parameters=num_parameters(config, LayerRange(0, config.num_layers)),
        num_pipelines=num_pipelines,
        stages=tuple(stages),
        block_size_tokens=block,
        num_blocks=blocks,
        kv_capacity_tokens=blocks * block,
        fits=fits,
        performance=_performance(request, stages, sequences, flights, rows) if fits else None,
        num_spares=request.num_spares,
        spare_gpu=max(stages, key=lambda one: one.memory.used_bytes).gpu if fits and request.num_spares else None,
    )


def _sizes(request: Request, gpu: Gpu, layers: LayerRange) -> tuple[int, int, int, int]:
    """Bytes of a stage: weights, activations, KV of a token, and what is left for the KV cache (may be below 0)."""
    config, size = request.config, DTYPE_BYTES[request.dtype]
    weights = num_parameters(config, layers) * size
    activations = activation_bytes(config, request.workload, size, last=layers.is_last(config))
    free = int(gpu.memory_bytes * request.usable_fraction) - CUDA_RESERVE_BYTES - activations - weights
    return weights, activations, kv_bytes_per_token(config, layers, size), free


def _occupancy(request: Request, num_stages: int, kv_tokens: int) -> tuple[int, int, int]:
    """Sequences that decode at once, micro-batches they are spread over, and rows of each."""
    workload = request.workload
    most = in_flight(num_stages) * min(workload.max_step_sequences, workload.max_step_tokens)
    sequences = max(1, min(kv_tokens // workload.context_tokens, most))
    flights = min(in_flight(num_stages), sequences)
    return sequences, flights, -(-sequences // flights)


def _performance(
    request: Request, stages: Sequence[PlannedStage], sequences: int, flights: int, rows: int
) -> Performance:
    """A ring: in flight ÷ (all stages and hops) micro-batches a second, and no more than the slowest part can do."""
    link, workload, hidden = request.link, request.workload, request.config.hidden_size
    size = DTYPE_BYTES[request.dtype]
    entry_s = link.seconds(0)  # token ids to stage 0
    one_hop_s = link.seconds(hidden * size)
    latency_s = entry_s + sum(s.decode_one_s for s in stages) + (len(stages) - 1) * one_hop_s + link.seconds(0)
    ring_s = entry_s + sum(s.decode_s + s.hop_decode_s for s in stages)
    slowest_s = max(max(s.decode_s, s.hop_decode_s) for s in stages)
    chunk = min(workload.max_step_tokens, workload.context_tokens)
    chunks = -(-workload.context_tokens // chunk)
    slowest_chunk_s = max(max(s.prefill_s, s.hop_prefill_s) for s in stages)
    return Performance(
        latency_s_per_token=latency_s,
        ttft_s=entry_s + sum(s.prefill_s + s.hop_prefill_s for s in stages) + (chunks - 1) * slowest_chunk_s,
        sequences=sequences,
        in_flight=flights,
        tokens_per_s=sequences / flights * min(1 / slowest_s, flights / ring_s),
        prefill_tokens_per_s=chunk / slowest_chunk_s,
    )


def scaled(request: Request, resource: str, factor: float) -> Request:
    """The same request with one resource of every GPU, or of the link, multiplied by `factor`."""
    if resource == "link bandwidth":
        return replace(request, link=replace(request.link, bytes_per_s=request.link.bytes_per_s * factor))
    if resource == "hop latency":
        return replace(request, link=replace(request.link, latency_s=request.link.latency_s / factor))
    rate = {"memory": "memory_bytes", "memory bandwidth": "memory_bytes_per_s", "compute": "flops_per_s"}[resource]
    gpus = tuple(replace(gpu, **{rate: type(getattr(gpu, rate))(getattr(gpu, rate) * factor)}) for gpu in request.gpus)
    return replace(request, gpus=gpus)
