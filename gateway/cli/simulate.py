"""Run the real scheduler against simulated stages: throughput, latency and recovery of a cluster that is not there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace

from gateway.cli.options import config_from
from gateway.cli.plan import add_request_arguments, check_ranges, check_request, make_request
from gateway.planner.catalogue import gpus, inventory_text, read_profile
from gateway.planner.cluster_plan import make_cluster_plan
from gateway.planner.price import Cost, parse_prices, traffic_cost
from gateway.planner.tables import cost_lines
from gateway.scheduler import SchedulerLimits
from gateway.simulator import Failures, GatewayCost, Result, Scenario, Traffic, simulate
from gateway.simulator.recovery import Recovery, recoveries
from gateway.simulator.result import percentiles
from stageline.errors import ConfigError

DAY_S = 86400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline simulate`."""
    add_request_arguments(parser)
    traffic, none = parser.add_argument_group("traffic"), Traffic()
    traffic.add_argument("--requests-per-s", type=float, default=1.0, help="Poisson arrivals, average")
    traffic.add_argument("--daily-swing", type=float, default=0.0, help="0.8: from 0.2 to 1.8 of the average in a day")
    traffic.add_argument("--day-s", type=float, default=DAY_S, help="seconds of a day")
    traffic.add_argument(
        "--streams", type=int, default=0, help="clients that wait for their answers, instead of arrivals"
    )
    traffic.add_argument("--prompt-tokens", type=int, default=none.prompt_tokens, help="median")
    traffic.add_argument("--output-tokens", type=int, default=none.output_tokens, help="median")
    traffic.add_argument(
        "--length-sigma", type=float, default=none.sigma, help="of the log-normal lengths; 0: all equal"
    )
    cluster, costs = parser.add_argument_group("cluster"), GatewayCost()
    cluster.add_argument("--pipelines", type=int, help="default: as many as the GPUs are")
    cluster.add_argument("--gateways", type=int, default=1, help="which share the pipelines")
    cluster.add_argument(
        "--gateway-step-us", type=float, default=1e6 * costs.step_s, help="gateway, microseconds a step"
    )
    cluster.add_argument(
        "--gateway-row-us", type=float, default=1e6 * costs.row_s, help="and each output row of a step"
    )
    cluster.add_argument("--gateway-request-us", type=float, default=1e6 * costs.request_s, help="and each request")
    deaths, no = parser.add_argument_group("failures"), Failures()
    deaths.add_argument("--mtbf-days", type=float, help="mean time between failures of one replica; default: none fail")
    deaths.add_argument("--detection-s", type=float, default=no.detection_s, help="until a death is noticed")
    deaths.add_argument("--takeover-s", type=float, default=no.takeover_s, help="claim, wiring and canary")
    deaths.add_argument("--restart-s", type=float, default=no.restart_s, help="until a dead replica is there again")
    deaths.add_argument("--spares", type=int, default=no.spares, help="of each gateway, for any stage")
    deaths.add_argument(
        "--live-tokens", type=int, help="also: the pause when a stage dies with so many tokens in the cache"
    )
    parser.add_argument("--duration-s", type=float, default=120.0, help="of arrivals, simulated seconds")
    parser.add_argument("--warmup-s", type=float, help="not counted; default: a sixth of the duration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", choices=["table", "json"], default="table")


def run(args: argparse.Namespace) -> int:
    """Simulate and print. Exit code 1 where the plan does not fit."""
    scenario = make_scenario(args)
    counts = scenario.gpu_counts()
    prices = None if args.gpu_dollars_per_hour is None else parse_prices(args.gpu_dollars_per_hour, counts)
    result = simulate(scenario)
    cost = None if prices is None else traffic_cost(counts, prices, result.output_tokens_per_s)
    pauses: tuple[Recovery, ...] = ()
    if args.live_tokens is not None:
        full, rest = divmod(args.live_tokens, args.context_tokens)
        lengths = [args.context_tokens] * full + ([rest] if rest else [])
        pauses = recoveries(scenario, lengths, lost_stage=len(scenario.plan.stages) // 2)
    if args.output == "json":
        found = {one.strategy: percentiles(one.pauses_s) for one in pauses}
        more = {"recovery_s": found, "cost": cost and cost.to_dict()}
        print(json.dumps({"plan": scenario.plan.to_dict(), **result.to_dict(), **more}, indent=2))
    else:
        print(table(scenario, result, pauses, cost))
    return 0


def make_scenario(args: argparse.Namespace) -> Scenario:
    """What the flags ask to simulate. Raises ConfigError where they do not go together or the plan does not fit."""
    config = config_from(args)
    check_request(args, config)
    if args.gpu is None and not args.cluster:
        raise ConfigError("GPU_MISSING", "simulate needs --gpu NAME:COUNT or --cluster", field="gpu")
    warmup_s = args.duration_s / 6 if args.warmup_s is None else args.warmup_s
    at_least = {
        "--requests-per-s": (args.requests_per_s, 0), "--streams": (args.streams, 0), "--prompt-tokens": (args.prompt_tokens, 1),
        "--output-tokens": (args.output_tokens, 1), "--length-sigma": (args.length_sigma, 0), "--gateways": (args.gateways, 1),
        "--pipelines": (args.pipelines, 1), "--spares": (args.spares, 0),
        "--gateway-step-us": (args.gateway_step_us, 0), "--gateway-row-us": (args.gateway_row_us, 0),
        "--gateway-request-us": (args.gateway_request_us, 0), "--detection-s": (args.detection_s, 0),
        "--takeover-s": (args.takeover_s, 0), "--restart-s": (args.restart_s, 0), "--live-tokens": (args.live_tokens, 2),
    }  # fmt: skip
    check_ranges(
        {
            flag: (value is None or low <= value < float("inf"), f"at least {low}")
            for flag, (value, low) in at_least.items()
        }
        | {
            "--daily-swing": (0 <= args.daily_swing <= 1, "in [0, 1]"),
            "--day-s": (0 < args.day_s < float("inf"), "over 0"),
            "--mtbf-days": (args.mtbf_days is None or 0 < args.mtbf_days < float("inf"), "over 0"),
            "--duration-s": (0 < args.duration_s < float("inf"), "over 0"),
            "--warmup-s": (0 <= warmup_s < args.duration_s, "in [0, --duration-s)"),
        }
    )
    request = make_request(args, config, gpus() | (read_profile(args.profile) if args.profile else {}))
    plan = make_cluster_plan(request)
    if not plan.fits:
        raise ConfigError(
            "PLAN_DOES_NOT_FIT",
            f"{plan.model} does not fit {inventory_text(request.gpus)}; `stageline plan` with the same flags says what would",
            field="gpu",
        )
    pipelines = args.pipelines or plan.num_pipelines
    if args.gateways > pipelines:
        raise ConfigError(
            "GATEWAYS_IDLE",
            f"{args.gateways} gateways for {pipelines} pipelines: each needs at least one",
            field="gateways",
        )
    longest = (
        max(args.prompt_tokens, 1) * 4 + args.output_tokens * 4
        if args.length_sigma
        else args.prompt_tokens + args.output_tokens
    )
    for flag, tokens in (("--live-tokens", args.live_tokens or 0), ("--prompt-tokens", longest)):
        if tokens > plan.kv_capacity_tokens // (2 if flag == "--prompt-tokens" else 1):
            raise ConfigError(
                "KV_CACHE_TOO_SMALL",
                f"{flag}: up to {tokens} tokens, and a pipeline has KV cache for {plan.kv_capacity_tokens}"
                + (" (requests may take half of it)" if flag == "--prompt-tokens" else ""),
                field=flag.lstrip("-"),
            )
    return Scenario(
        request=request,
        plan=plan,
        pipelines=pipelines,
        gateways=args.gateways,
        traffic=Traffic(
            requests_per_s=args.requests_per_s, daily_swing=args.daily_swing, day_s=args.day_s, streams=args.streams,
            prompt_tokens=args.prompt_tokens, output_tokens=args.output_tokens, sigma=args.length_sigma,
        ),
        failures=Failures(
            mtbf_s=None if args.mtbf_days is None else args.mtbf_days * DAY_S, detection_s=args.detection_s,
            takeover_s=args.takeover_s, restart_s=args.restart_s, spares=args.spares,
        ),
        gateway_cost=GatewayCost(
            request_s=args.gateway_request_us / 1e6, step_s=args.gateway_step_us / 1e6, row_s=args.gateway_row_us / 1e6
        ),
        limits=replace(
            SchedulerLimits(prefix_caching=False),
            **{
                name: getattr(config.scheduler, name)
                for name in SchedulerLimits.__dataclass_fields__
                if name != "prefix_caching"
            },
        ),
        duration_s=args.duration_s,
        warmup_s=warmup_s,
        seed=args.seed,
    )  # fmt: skip


def table(scenario: Scenario, result: Result, pauses: tuple[Recovery, ...] = (), cost: Cost | None = None) -> str:
    """For people: milliseconds, per cents, and the assumptions."""
    plan, kinds = scenario.plan, inventory_text(scenario.request.gpus[: len(scenario.plan.stages)])
    lines = [
        f"{plan.model}, {scenario.pipelines} x ({kinds}; layers {plan.layers()}), {scenario.gateways} gateway(s), "
        f"{result.duration_s:g} s simulated",
        f"requests   {result.requests} came, {result.completed} completed, {result.refused} refused, "
        f"{result.unfinished} still under way",
        f"tokens/s   {result.output_tokens_per_s:,.1f} generated, {result.prompt_tokens_per_s:,.1f} of prompts",
        f"TTFT       {_ms(result.ttft_s)}",
        f"ITL        {_ms(result.itl_s)}",
        f"requests   {_ms(result.end_to_end_s)} from end to end",
        "busy       " + ", ".join(f"stage {i} {100 * one:.0f} %" for i, one in enumerate(result.utilization))
        + f"; busiest gateway {100 * result.gateway_utilization:.0f} %",
        "idle       " + ", ".join(f"stage {i} {100 * one:.0f} %" for i, one in enumerate(result.idle_share)),
        f"steps      {result.rows_per_step:.1f} tokens generated a step, {result.preemptions} preemptions",
    ]  # fmt: skip
    if result.deaths:
        lines.append(
            f"deaths     {result.deaths}, {result.moved_sequences} sequences moved to other pipelines, pause "
            f"{_ms(result.recovery_pauses_s)}; pipelines up {100 * result.availability:.3f} % of the time"
        )
    for one in pauses:
        lines.append(
            f"{one.strategy:<10} pause of {len(one.pauses_s)} sequences after a death: {_ms(percentiles(one.pauses_s))}; "
            f"{one.kept_bytes_per_token:,} bytes kept and {one.sent_bytes_per_token:,} sent a token and stage"
        )
    lines += [] if cost is None else cost_lines(cost)
    lines.append("Stage times are the planner's (rooflines unless --profile was measured); prompts share no prefixes.")
    return "\n".join(lines)


def _ms(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {1000 * value:,.0f} ms" for name, value in values.items()) or "none"
