"""A pipeline on given GPUs: who holds what, every byte of each GPU, and what that makes in tokens a second."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from gateway.planner.catalogue import Gpu, host_of
from gateway.planner.cost import (
    Step,
    activation_bytes,
    at_load,
    loaded_seconds,
    stage_cost,
    stage_seconds,
    weight_bytes,
)
from gateway.planner.report import DTYPE_BYTES
from gateway.planner.split import check_num_stages, cut, resolve_layers, split, to_ranges
from gateway.planner.types import ClusterPlan, Memory, Performance, PlannedStage, Request
from gateway.scheduler.filling import num_groups
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
    sequences, flights, rows = _occupancy(request, gpus, ranges, blocks * block)
    stages = []
    for index, (gpu, layers, (weights, activations, per_token, free)) in enumerate(
        zip(gpus, ranges, sizes, strict=True)
    ):
        kv_bytes = blocks * block * per_token
        last = layers.is_last(config)
        steps = (_decode(request, 1), _decode(request, rows), _chunk(request))
        one_s, decode_s, prefill_s = (stage_seconds(config, layers, gpu, step, size) for step in steps)
        # The last stage returns a few candidates a row, not hidden states.
        hops = [request.link.seconds(0 if last else step.tokens * config.hidden_size * size) for step in steps]
        stages.append(
            PlannedStage(
                index=index,
                gpu=gpu.name,
                layers=str(layers),
                num_layers=len(layers),
                parameters=num_parameters(config, layers),
                weight_bytes=weights,
                kv_bytes_per_token=per_token,
                kv_capacity_tokens=max(0, free) // (per_token * block) * block,
                memory=Memory(
                    total_bytes=gpu.memory_bytes,
                    weight_bytes=weights,
                    kv_cache_bytes=kv_bytes,
                    activation_bytes=activations,
                    cuda_reserve_bytes=gpu.reserve_bytes,
                    unassigned_bytes=gpu.memory_bytes - weights - kv_bytes - activations - gpu.reserve_bytes,
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
        performance=_performance(request, gpus, ranges, stages, (sequences, flights, rows)) if fits else None,
        num_spares=request.num_spares,
        spare_gpu=max(stages, key=lambda one: one.memory.used_bytes).gpu if fits and request.num_spares else None,
    )


def _sizes(request: Request, gpu: Gpu, layers: LayerRange) -> tuple[int, int, int, int]:
    """Bytes of a stage: weights, activations, KV of a token, and what is left for the KV cache (may be below 0)."""
    config, size = request.config, DTYPE_BYTES[request.dtype]
    weights = weight_bytes(config, layers, gpu, size)
    activations = activation_bytes(config, request.workload, size, last=layers.is_last(config))
    free = int(gpu.memory_bytes * request.usable_fraction) - gpu.reserve_bytes - activations - weights
    return weights, activations, kv_bytes_per_token(config, layers, size), free


def _decode(request: Request, rows: int) -> Step:
    return Step.decode(rows, request.workload.context_tokens)


def _chunk(request: Request) -> Step:
    workload = request.workload
    return Step.prefill(min(workload.max_step_tokens, workload.context_tokens), workload.context_tokens)


def _occupancy(
    request: Request, gpus: Sequence[Gpu], ranges: Sequence[LayerRange], kv_tokens: int
) -> tuple[int, int, int]:
    """Sequences that decode at once, micro-batches they are spread over as the scheduler does it, and rows of each."""
    workload, link = request.workload, request.link
    size = DTYPE_BYTES[request.dtype]
    fixed_s = max(
        stage_seconds(request.config, layers, gpu, _decode(request, 1), size)
        for layers, gpu in zip(ranges, gpus, strict=True)
    )
    overhead_s = 2 * link.seconds(0) + (len(gpus) - 1) * link.seconds(request.config.hidden_size * size)
    groups = min(in_flight(len(gpus)), num_groups(num_stages=len(gpus), fixed_s=fixed_s, overhead_s=overhead_s))
    most = groups * min(workload.max_step_sequences, workload.max_step_tokens)
    wanted = most if workload.sequences is None else workload.sequences
    sequences = max(1, min(kv_tokens // workload.context_tokens, most, wanted))
    flights = min(groups, sequences)
    return sequences, flights, -(-sequences // flights)


def _performance(
    request: Request,
    gpus: Sequence[Gpu],
    ranges: Sequence[LayerRange],
    stages: Sequence[PlannedStage],
    occupancy: tuple[int, int, int],
) -> Performance:
    """A ring: in flight ÷ (all stages and hops) micro-batches a second, and no more than the slowest part can do, nor
    than the cores of a host that all stages share."""
    link, workload, hidden = request.link, request.workload, request.config.hidden_size
    size = DTYPE_BYTES[request.dtype]
    sequences, flights, rows = occupancy
    entry_s = link.seconds(0)  # token ids to stage 0
    one_hop_s = link.seconds(hidden * size)
    latency_s = entry_s + sum(s.decode_one_s for s in stages) + (len(stages) - 1) * one_hop_s + link.seconds(0)
    hops_s = entry_s + sum(s.hop_decode_s for s in stages)
    decode_s = _together(request, gpus, ranges, _decode(request, rows), flights)
    slowest_s = max(*decode_s, *(s.hop_decode_s for s in stages))
    chunk = _chunk(request).tokens
    chunks = -(-workload.context_tokens // chunk)
    prefill_s = _together(request, gpus, ranges, _chunk(request), len(stages))
    slowest_chunk_s = max(*prefill_s, *(s.hop_prefill_s for s in stages), _on_cores(request, prefill_s))
    return Performance(
        latency_s_per_token=latency_s,
        ttft_s=entry_s + sum(s.prefill_s + s.hop_prefill_s for s in stages) + (chunks - 1) * slowest_chunk_s,
        sequences=sequences,
        in_flight=flights,
        tokens_per_s=sequences
        / flights
        * min(1 / max(slowest_s, _on_cores(request, decode_s)), flights / (sum(decode_s) + hops_s)),
        prefill_tokens_per_s=chunk / slowest_chunk_s,
    )


def _together(
    request: Request, gpus: Sequence[Gpu], ranges: Sequence[LayerRange], step: Step, at_once: int
) -> list[float]:
    """Seconds of a step on each stage while up to `at_once` of them compute: on a shared host slower than alone."""
    host, size = host_of(gpus), DTYPE_BYTES[request.dtype]
    load = 0.0 if host is None else host.load(min(at_once, len(gpus)))
    return [
        at_load(loaded_seconds(request.config, layers, gpu.under_load(), step, size), load)
        for gpu, layers in zip(gpus, ranges, strict=True)
    ]


def _on_cores(request: Request, seconds: Sequence[float]) -> float:
    """Seconds that the cores of a shared host need for a step on all stages; 0 where each stage has its own device."""
    host = host_of(request.gpus)
    if host is None:
        return 0.0
    return (sum(seconds) + len(seconds) * host.hop_core_s) / host.capacity(2 * host.cores)


def scaled(request: Request, resource: str, factor: float) -> Request:
    """The same request with one resource of every GPU, or of the link, multiplied by `factor`."""
    if resource == "link bandwidth":
        return replace(request, link=replace(request.link, bytes_per_s=request.link.bytes_per_s * factor))
    if resource == "hop latency":
        return replace(request, link=replace(request.link, latency_s=request.link.latency_s / factor))
    if resource == "cores":
        hosts = [gpu.host and replace(gpu.host, cores=int(gpu.host.cores * factor)) for gpu in request.gpus]
        return replace(
            request, gpus=tuple(replace(gpu, host=host) for gpu, host in zip(request.gpus, hosts, strict=True))
        )
    rate = {"memory": "memory_bytes", "memory bandwidth": "memory_bytes_per_s", "compute": "flops_per_s"}[resource]
    gpus = tuple(replace(gpu, **{rate: type(getattr(gpu, rate))(getattr(gpu, rate) * factor)}) for gpu in request.gpus)
    return replace(request, gpus=gpus)
