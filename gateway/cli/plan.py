"""Show which layers each stage holds, what fills each GPU, and what that makes in latency and throughput."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gateway.cli.options import add_config_arguments, config_from
from gateway.config import Config
from gateway.planner.advice import Advice, advise
from gateway.planner.catalogue import Gpu, Host, find_model_config, gpus, host_of, parse_inventory, read_profile
from gateway.planner.cluster_plan import make_cluster_plan
from gateway.planner.cost import Link, Workload
from gateway.planner.k8s import Deployment, as_stream, manifests, write
from gateway.planner.nodes import cluster_gpus, missing_kinds
from gateway.planner.price import parse_prices, plan_cost
from gateway.planner.report import make_plan
from gateway.planner.split import resolve_layers
from gateway.planner.tables import cluster_table, sizes_table
from gateway.planner.types import ClusterPlan, Request
from stageline.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline plan`."""
    where = add_request_arguments(parser)
    where.add_argument("--gpu-memory-bytes", type=int, help="sizes only, on GPUs of this memory; default 80 GiB")
    parser.add_argument("--output", choices=["table", "json", "k8s"], default="table", help="k8s: Kubernetes manifests")
    k8s, defaults = parser.add_argument_group("--output k8s"), Deployment()
    k8s.add_argument("--output-dir", metavar="DIR", help="write the manifests there instead of printing them")
    k8s.add_argument(
        "--image", default=defaults.image, help="image without its tag, such as registry.example/stageline"
    )
    k8s.add_argument("--namespace", default=defaults.namespace, help="namespace of everything")
    k8s.add_argument("--storage-class", default=defaults.storage_class, help="StorageClass that can ReadWriteMany")
    k8s.add_argument("--spare-gpus", dest="stages.spares", metavar="SPARES", help="the same as --stages.spares")
    k8s.add_argument(
        "--operator-namespace", default=defaults.operator_namespace, help="where the KubeRay operator runs"
    )


def add_request_arguments(parser: argparse.ArgumentParser) -> Any:
    """Flags of everything that plans; returns the group of those that say where the GPUs are."""
    add_config_arguments(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--gpu", metavar="NAME:COUNT,…", help="GPUs to plan for, such as a100-80g:4 or l40s-48g:4,a10g-24g:2"
    )
    where.add_argument(
        "--cluster", action="store_true", help="plan for the GPU nodes of the current kubeconfig's cluster"
    )
    parser.add_argument("--profile", metavar="FILE", help="devices of your own, or measured rates: gpus.yaml's format")
    parser.add_argument(
        "--cores",
        type=int,
        help="all stages (and, simulated, gateways) share the cores of one host; default: the profile's",
    )
    parser.add_argument("--usable-fraction", type=float, default=0.9, help="part of a GPU's memory that may be used")
    parser.add_argument("--link-gbps", type=float, default=25.0, help="network between stages, gigabits a second")
    parser.add_argument("--hop-latency-ms", type=float, default=0.3, help="one message to the next stage, ms")
    parser.add_argument("--context-tokens", type=int, default=2048, help="average length of a sequence")
    parser.add_argument(
        "--sequences", type=int, help="that decode at once in a pipeline; default: as many as its KV cache holds"
    )
    parser.add_argument(
        "--gpu-dollars-per-hour",
        metavar="PRICE",
        help="of one GPU: 2.00, or l40s-48g:0.80,a10g-24g:0.35; prices a million tokens",
    )
    return where


def run(args: argparse.Namespace) -> int:
    """Print the plan; a plan that does not fit is printed too, says so, and exits 1."""
    config = config_from(args)
    check_request(args, config)
    _check(args)
    if args.gpu is None and not args.cluster:
        if args.output == "k8s":
            raise ConfigError("GPU_MISSING", "--output k8s needs --gpu NAME:COUNT or --cluster", field="gpu")
        return _sizes(args, config)
    known = gpus() | (read_profile(args.profile) if args.profile else {})
    request = make_request(args, config, known)
    plan = make_cluster_plan(request)
    advice = advise(request, plan, known)
    if args.output == "k8s":
        return _manifests(args, config, request, plan, advice, known)
    price = args.gpu_dollars_per_hour
    cost = None if price is None else plan_cost(plan, parse_prices(price, plan.gpu_counts()))
    if args.output == "json":
        more = {"advice": advice.to_dict(), "cost": cost and cost.to_dict()}
        print(json.dumps(plan.to_dict() | more, indent=2))
    else:
        print(cluster_table(request, plan, advice, cost))
    return 0 if plan.fits else 1


def _manifests(
    args: argparse.Namespace,
    config: Config,
    request: Request,
    plan: ClusterPlan,
    advice: Advice,
    known: Mapping[str, Gpu],
) -> int:
    """Print the manifests, or write them; a plan that does not fit has none."""
    if not plan.fits:
        print(cluster_table(request, plan, advice), file=sys.stderr)
        return 1
    deployment = Deployment(
        image=args.image,
        namespace=args.namespace,
        storage_class=args.storage_class,
        operator_namespace=args.operator_namespace,
        config=config,
    )
    files = manifests(plan, known, deployment)
    if args.cluster:
        for line in missing_kinds(args.storage_class):
            print(f"stageline plan: {line}", file=sys.stderr)
    if args.output_dir is None:
        print(as_stream(files), end="")
        return 0
    write(files, Path(args.output_dir))
    for name in files:
        print(Path(args.output_dir) / name)
    return 0


def make_request(args: argparse.Namespace, config: Config, known: Mapping[str, Gpu]) -> Request:
    """What the flags ask to plan."""
    if args.cluster:
        found = cluster_gpus(known)
        for line in found.left_out:
            print(f"stageline plan: left out {line}", file=sys.stderr)
        devices = found.gpus
    else:
        devices = parse_inventory(args.gpu, known)
    host = host_of(devices)
    if args.cores is not None:
        devices = tuple(
            replace(gpu, host=Host(cores=args.cores) if host is None else replace(host, cores=args.cores))
            for gpu in devices
        )
    model_config = find_model_config(config.model.path, config.model.revision)
    if args.context_tokens > model_config.max_position_embeddings:
        raise ConfigError(
            "CONTEXT_TOO_LONG",
            f"--context-tokens is {args.context_tokens}, the model goes to {model_config.max_position_embeddings}",
            field="context_tokens",
            value=args.context_tokens,
        )
    block = config.kv_cache.block_size_tokens or 256  # what FlashAttention-2's paged KV takes
    model = config.model.path
    return Request(
        model=Path(model).name if Path(model).exists() else model,
        config=model_config,
        gpus=devices,
        dtype=config.model.dtype,
        num_stages=config.stages.count,
        layers=config.stages.layers,
        link=Link(bytes_per_s=args.link_gbps * 1e9 / 8, latency_s=args.hop_latency_ms / 1e3),
        workload=Workload(
            context_tokens=args.context_tokens,
            sequences=args.sequences,
            max_step_tokens=config.scheduler.max_step_tokens,
            max_step_sequences=config.scheduler.max_step_sequences,
        ),
        usable_fraction=args.usable_fraction,
        block_size_tokens=block,
        num_spares=config.stages.spares,
    )


def check_request(args: argparse.Namespace, config: Config) -> None:
    """Raises ConfigError for a missing model and for values of `add_request_arguments` that are out of range."""
    if not config.model.path:
        raise ConfigError(
            "MODEL_MISSING",
            "--model is required: a folder, a .gguf file, a hub id, or a known name such as qwen2-72b",
            field="model.path",
        )
    if config.model.quantization is not None:
        raise ConfigError(
            "QUANTIZATION_NOT_PLANNED",
            "the planner counts bytes of bfloat16 or float32 weights; quantized ones are for stages on the CPU, which no GPU "
            "plan holds: leave --quantization out",
            field="model.quantization",
            value=config.model.quantization,
        )
    check_ranges(
        {
            "--usable-fraction": (0 < args.usable_fraction <= 1, "in (0, 1]"),
            "--link-gbps": (0 < args.link_gbps < float("inf"), "over 0"),
            "--hop-latency-ms": (0 <= args.hop_latency_ms < float("inf"), "at least 0"),
            "--context-tokens": (args.context_tokens >= 1, "at least 1"),
            "--cores": (args.cores is None or args.cores >= 1, "at least 1"),
            "--sequences": (args.sequences is None or args.sequences >= 1, "at least 1"),
        }
    )
    if args.gpu is None and not args.cluster:
        for flag, field in (("--profile", "profile"), ("--gpu-dollars-per-hour", "gpu_dollars_per_hour")):
            if getattr(args, field) is not None:
                raise ConfigError(
                    "CONFIG_INVALID", f"{flag} is about GPUs by name: it needs --gpu or --cluster", field=field
                )


def check_ranges(limits: Mapping[str, tuple[bool, str]]) -> None:
    """Raises ConfigError that names the flags which are not right, each with what it must be."""
    wrong = {flag: must for flag, (right, must) in limits.items() if not right}
    if wrong:
        what = "; ".join(f"{flag} must be {must}" for flag, must in wrong.items())
        raise ConfigError("CONFIG_INVALID", f"out of range: {what}", field=next(iter(wrong)))


def _check(args: argparse.Namespace) -> None:
    check_ranges(
        {
            "--gpu-memory-bytes": (args.gpu_memory_bytes is None or args.gpu_memory_bytes >= 1, "at least 1"),
        }
    )
    if args.output_dir is not None and args.output != "k8s":
        raise ConfigError("CONFIG_INVALID", "--output-dir belongs to --output k8s", field="output_dir")
    if args.gpu_dollars_per_hour is not None and args.output == "k8s":
        raise ConfigError(
            "CONFIG_INVALID", "manifests hold no prices: --gpu-dollars-per-hour goes with --output table or json",
            field="gpu_dollars_per_hour",
        )  # fmt: skip


def _sizes(args: argparse.Namespace, config: Config) -> int:
    """Bytes and tokens of a split on GPUs that have a memory and no name."""
    model = find_model_config(config.model.path, config.model.revision)
    plan = make_plan(
        model,
        resolve_layers(model, config.stages.count, config.stages.layers),
        dtype=config.model.dtype,
        gpu_memory_bytes=args.gpu_memory_bytes or 80 << 30,
        usable_fraction=args.usable_fraction,
        block_size_tokens=config.block_size_tokens(),
    )
    print(json.dumps(plan.to_dict(), indent=2) if args.output == "json" else sizes_table(plan))
    return 0 if plan.fits else 1
