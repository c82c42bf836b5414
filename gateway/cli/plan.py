"""Show which layers each stage holds, how many bytes they are and how many tokens fit beside them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gateway.cli.options import add_config_arguments, config_from
from gateway.planner.report import Plan, make_plan
from gateway.planner.split import resolve_layers
from stageline.errors import ConfigError
from stages.checkpoint import open_checkpoint
from stages.config import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline plan`."""
    add_config_arguments(parser)
    parser.add_argument("--gpu-memory-bytes", type=int, default=80 << 30, help="memory of one GPU; default 80 GiB")
    parser.add_argument("--usable-fraction", type=float, default=0.9, help="part of it for weights and KV cache")
    parser.add_argument("--output", choices=["table", "json"], default="table")


def run(args: argparse.Namespace) -> int:
    """Print the plan; a plan that does not fit is printed too, says so, and exits 1."""
    config = config_from(args)
    if not config.model.path:
        raise ConfigError(
            "MODEL_MISSING", "--model is required: a folder, a .gguf file, or a hub id", field="model.path"
        )
    if args.gpu_memory_bytes < 1 or not 0 < args.usable_fraction <= 1:
        raise ConfigError("CONFIG_INVALID", "--gpu-memory-bytes must be at least 1 and --usable-fraction in (0, 1]")
    folder = Path(config.model.path)
    # A plan needs the shapes only: a folder with nothing but config.json will do.
    model = (
        ModelConfig.from_file(folder / "config.json")
        if (folder / "config.json").is_file()
        else open_checkpoint(config.model.path, revision=config.model.revision).config
    )
    ranges = resolve_layers(model, config.stages.count, config.stages.layers)
    plan = make_plan(
        model,
        ranges,
        dtype=config.model.dtype,
        gpu_memory_bytes=args.gpu_memory_bytes,
        usable_fraction=args.usable_fraction,
        block_size_tokens=config.block_size_tokens(),
    )
    print(json.dumps(plan.to_dict(), indent=2) if args.output == "json" else _table(plan))
    return 0 if plan.fits else 1


def _table(plan: Plan) -> str:
    rows = [
        f"{'stage':>5}  {'layers':>9}  {'parameters':>15}  {'weights GiB':>11}  {'KV B/token':>10}  {'KV tokens':>10}"
    ]
    rows += [
        f"{stage.index:>5}  {stage.layers:>9}  {stage.parameters:>15,}  {stage.weight_bytes / 2**30:>11.2f}  "
        f"{stage.kv_bytes_per_token:>10,}  {stage.kv_capacity_tokens:>10,}"
        for stage in plan.stages
    ]
    verdict = (
        f"the pipeline holds {plan.kv_capacity_tokens:,} tokens of KV cache"
        if plan.fits
        else "does not fit: a stage with 0 KV tokens has no room; use more stages or larger GPUs"
    )
    return "\n".join([*rows, f"{plan.parameters:,} parameters; {verdict}"])
