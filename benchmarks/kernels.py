"""A stage's whole forward against a bare loop of the matrix products in it: what everything else costs.

`python -m benchmarks.kernels --model FOLDER`. All layers and `lm_head` in one stage, random tokens and KV. The two sides
run in turn; a ratio is the median of the products alone over the median of the whole forward, so 1 is the bound that
matrix products set, called from Python one by one: a decode step that is one call may pass it. Prints one JSON object, then
a Markdown table; `--twin` times a slow twin beside it, with weights in the checkpoint's layout (`products`) or torch's operators in place of compiled functions (`operators`);
`--profile` adds the operators of one case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import here
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.batch import StepBatch
from stages.checkpoint import Checkpoint, open_checkpoint
from stages.models.qwen2 import DecoderLayer
from stages.partition import LayerRange
from stages.runner import StageRunner
from stages.weights import load_weights

BLOCK_TOKENS = 16
# name: (rows, new tokens of a row, context with them, the ratio aimed at)
CASES = {
    "decode, 1 row": (1, 1, 200, 0.85),
    "decode, 16 rows": (16, 1, 200, 0.8),
    "prefill, 2,048 tokens": (1, 2048, 2048, 0.8),
}
NUM_BLOCKS = max(rows * -(-context // BLOCK_TOKENS) for rows, _, context, _ in CASES.values())


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    layers: LayerRange | None = None,
    quantization: str | None = None,
    *,
    packed_weights: bool = True,
    compiled: bool = True,
) -> StageRunner:
    """These layers as one stage, with a KV cache; without `layers` the whole model."""
    layers = layers or LayerRange(0, checkpoint.config.num_layers)
    runner = StageRunner(
        checkpoint.config, layers, dtype=dtype, device=torch.device("cpu"), block_size_tokens=BLOCK_TOKENS,
        quantization=quantization, packed_weights=packed_weights, compiled=compiled,
    )  # fmt: skip
    load_weights(checkpoint, layers, runner.model, dtype=dtype)
    runner.allocate_kv(NUM_BLOCKS)
    return runner


def batch_of(rows: int, new_tokens: int, context: int, vocab_size: int) -> StepBatch:
    """A step of equal rows over blocks scattered in the cache; the last token of each needs logits."""
    random = np.random.default_rng(0)
    step = pb.Step(step_id=1, token_ids=random.integers(0, vocab_size, rows * new_tokens).astype("<i4").tobytes())
    blocks = -(-context // BLOCK_TOKENS)
    for row, table in enumerate(random.permutation(NUM_BLOCKS)[: rows * blocks].reshape(rows, blocks)):
        added = step.rows.add(sequence_id=row, num_tokens=new_tokens, context_len=context)
        added.block_table = table.astype("<i4").tobytes()
        added.sampling.SetInParent()
    return StepBatch.from_step(step, vocab_size=vocab_size, num_blocks=NUM_BLOCKS, block_size_tokens=BLOCK_TOKENS)


def products_alone(runner: StageRunner, tokens: int, rows: int) -> Callable[[], Tensor]:
    """Every product of a step in its order, with the bias, residual and activation that are part of it; nothing else."""
    model, config = runner.model, runner.config
    hidden_TD = torch.randn(tokens, config.hidden_size).to(runner.dtype)
    attended_TD = torch.randn(tokens, config.num_heads * config.head_dim).to(runner.dtype)
    inner_TF = torch.randn(tokens, config.intermediate_size).to(runner.dtype)
    last_RD = hidden_TD[:rows].clone()

    @torch.inference_mode()
    def run() -> Tensor:
        for layer in model.layers:
            assert isinstance(layer, DecoderLayer)
            layer.qkv(hidden_TD)
            layer.o(attended_TD, hidden_TD)
            layer.gate_up(hidden_TD)
            layer.down(inner_TF, hidden_TD)
        return hidden_TD if model.lm_head is None else model.lm_head(last_RD)

    return run


def alternate(sides: tuple[Callable[[], object], ...], runs: int) -> list[list[float]]:
    """Milliseconds of each side, taken in turn after one warm run."""
    times_ms: list[list[float]] = [[] for _ in sides]
    for run in range(runs + 1):
        for side, taken in zip(sides, times_ms, strict=True):
            began = time.perf_counter()
            side()
            if run:
                taken.append((time.perf_counter() - began) * 1e3)
    return times_ms


def quartiles(times_ms: list[float]) -> list[float]:
    """Rounded; of one run itself."""
    return [round(q, 2) for q in (statistics.quantiles(times_ms) if len(times_ms) > 1 else times_ms)]


def main() -> int:
    """Load, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode-runs", type=int, default=41)
    parser.add_argument("--prefill-runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--twin", choices=("products", "operators"), help="also run this slow twin")
    parser.add_argument("--profile", choices=tuple(CASES), help="also print where this case's time goes, to stderr")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    checkpoint, dtype = open_checkpoint(args.model), getattr(torch, args.dtype)
    runner = load(checkpoint, dtype)
    other = {"packed_weights": args.twin != "products", "compiled": args.twin != "operators"}
    twin = load(checkpoint, dtype, **other) if args.twin else None
    results = {}
    for name, (rows, new_tokens, context, target) in CASES.items():
        batch = batch_of(rows, new_tokens, context, runner.config.vocab_size)
        whole = partial(runner.execute, batch, None)
        bare = products_alone(runner, rows * new_tokens, rows)
        sides = (whole, bare) if twin is None else (whole, bare, partial(twin.execute, batch, None))
        whole_ms, bare_ms, *twin_ms = alternate(sides, args.decode_runs if new_tokens == 1 else args.prefill_runs)
        medians = statistics.median(whole_ms), statistics.median(bare_ms)
        results[name] = {
            "whole_ms": round(medians[0], 2),
            "products_ms": round(medians[1], 2),
            "ratio": round(medians[1] / medians[0], 3),
            "target": target,
            "whole_quartiles_ms": quartiles(whole_ms),
            "products_quartiles_ms": quartiles(bare_ms),
            "runs": len(whole_ms),
        }
        if twin_ms:
            results[name]["twin_ms"] = round(statistics.median(twin_ms[0]), 2)
        if args.profile == name:
            with torch.profiler.profile() as profile:
                whole()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)
    report = {
        "what": "whole forward of one stage against its matrix products alone",
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "threads": args.threads,
        "products": runner.report(),
        "torch": torch.__version__,
        **here(),
        "cases": results,
    }
    print(json.dumps(report, indent=2))
    print("\n| case | whole, ms | products alone, ms | ratio | target |\n|---|---|---|---|---|")
    for name, r in results.items():
        print(f"| {name} | {r['whole_ms']} | {r['products_ms']} | {r['ratio']} | {r['target']} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
