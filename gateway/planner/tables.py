"""Plans as text for people."""

from __future__ import annotations

from gateway.planner.advice import Advice
from gateway.planner.catalogue import inventory_text
from gateway.planner.price import Cost
from gateway.planner.report import Plan
from gateway.planner.types import ClusterPlan, Request

GIB = 1 << 30


def sizes_table(plan: Plan) -> str:
    """The table of a split without GPUs by name."""
    rows = [
        f"{'stage':>5}  {'layers':>9}  {'parameters':>15}  {'weights GiB':>11}  {'KV B/token':>10}  {'KV tokens':>10}"
    ]
    rows += [
        f"{stage.index:>5}  {stage.layers:>9}  {stage.parameters:>15,}  {stage.weight_bytes / GIB:>11.2f}  "
        f"{stage.kv_bytes_per_token:>10,}  {stage.kv_capacity_tokens:>10,}"
        for stage in plan.stages
    ]
    verdict = (
        f"the pipeline holds {plan.kv_capacity_tokens:,} tokens of KV cache"
        if plan.fits
        else "does not fit: a stage with 0 KV tokens has no room; use more stages or larger GPUs"
    )
    return "\n".join([*rows, f"{plan.parameters:,} parameters; {verdict}"])


def cluster_table(request: Request, plan: ClusterPlan, advice: Advice, cost: Cost | None = None) -> str:
    """Everything a plan says: memory of each GPU, times of each stage and hop, what binds, what would help, what it costs."""
    work = request.workload
    pipelines = "1 pipeline" if plan.num_pipelines == 1 else f"{plan.num_pipelines} pipelines"
    lines = [
        f"{plan.model}: {plan.parameters:,} parameters, {request.config.num_layers} layers, {plan.dtype}; "
        f"{inventory_text(request.gpus)}; {pipelines} of {len(plan.stages)} stages",
        "",
        "memory of each GPU, GiB",
        f"{'stage':>5}  {'GPU':<13}  {'layers':>7}  {'weights':>8}  {'KV cache':>8}  {'activations':>11}  "
        f"{'CUDA':>5}  {'unassigned':>10}  {'total':>6}  {'KV tokens it could hold':>23}",
    ]
    for stage in plan.stages:
        m = stage.memory
        lines.append(
            f"{stage.index:>5}  {stage.gpu:<13}  {stage.layers:>7}  {m.weight_bytes / GIB:>8.2f}  "
            f"{m.kv_cache_bytes / GIB:>8.2f}  {m.activation_bytes / GIB:>11.2f}  {m.cuda_reserve_bytes / GIB:>5.2f}  "
            f"{m.unassigned_bytes / GIB:>10.2f}  {m.total_bytes / GIB:>6.2f}  {stage.kv_capacity_tokens:>23,}"
        )
    if plan.performance is None:
        return "\n".join(
            [*lines, "", "does not fit: a stage has no room for 2 KV blocks beside its weights", *advice.help]
        )
    if plan.spare_gpu is not None:
        lines.append(f"{plan.num_spares} more {plan.spare_gpu} wait as spares: each can take any of these stages")
    perf = plan.performance
    rows = -(-perf.sequences // perf.in_flight)
    lines += [
        "",
        "time of a micro-batch on each stage, and of the hop after it, ms",
        f"{'stage':>5}  {'decode, 1 sequence':>18}  {f'decode, {rows}':>12}  {'hop':>6}  "
        f"{'prefill chunk':>13}  {'hop':>6}",
    ]
    lines += [
        f"{s.index:>5}  {1e3 * s.decode_one_s:>18.2f}  {1e3 * s.decode_s:>12.2f}  {1e3 * s.hop_decode_s:>6.2f}  "
        f"{1e3 * s.prefill_s:>13.2f}  {1e3 * s.hop_prefill_s:>6.2f}"
        for s in plan.stages
    ]
    lines += [
        "",
        f"KV cache: {plan.kv_capacity_tokens:,} tokens a pipeline ({plan.num_blocks:,} blocks of "
        f"{plan.block_size_tokens}), {perf.sequences} sequences of {work.context_tokens} tokens at once",
        f"latency: {1e3 * perf.latency_s_per_token:.1f} ms a token for one sequence; "
        f"first token of a prompt of {work.context_tokens} after {perf.ttft_s:.2f} s",
        f"throughput: {perf.tokens_per_s * plan.num_pipelines:,.0f} tokens/s decoded with {perf.in_flight} micro-batches "
        f"in flight; {perf.prefill_tokens_per_s * plan.num_pipelines:,.0f} tokens/s of prompts",
        f"bound by: {advice.binding}",
        *(f"  {line}" for line in advice.help),
        *([] if cost is None else cost_lines(cost)),
        "Times are rooflines of the catalogue's peak rates (bounds, not measurements); hops as measured over loopback.",
    ]
    return "\n".join(lines)


def cost_lines(cost: Cost) -> list[str]:
    """Dollars of a million tokens, and under which assumptions."""
    parts = [
        f"${dollars:,.2f} a million {what} tokens"
        for what, dollars in (
            ("output", cost.dollars_per_million_output_tokens),
            ("prompt", cost.dollars_per_million_prompt_tokens),
        )
        if dollars is not None
    ]
    return [
        f"cost: {', '.join(parts) or 'nothing was generated'}; ${cost.dollars_per_hour:,.2f} an hour for {cost.num_gpus} GPUs",
        *(f"  {line}" for line in cost.assumptions),
    ]
