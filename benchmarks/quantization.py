"""What weight-only quantization costs in perplexity and gains in time, against the same weights in bfloat16.

`python -m benchmarks.quantization --model FOLDER`. The text is the Python language's own help pages (`pydoc_data.topics`,
on every machine that has Python): windows of equal length, each from its beginning, every token but the first scored.
Times are whole forwards of the model as one stage, taken in turn. Prints one JSON object, then a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels import BLOCK_TOKENS, NUM_BLOCKS, alternate, batch_of, load
from benchmarks.report import here
from gateway.tokenizer import load_tokenizer
from stages.attention import AttentionContext
from stages.checkpoint import open_checkpoint
from stages.kv_cache import KVCache
from stages.runner import StageRunner

CPU = torch.device("cpu")
KINDS = {"bfloat16": None, "int8": "int8", "int4": "int4"}
# name: (rows, new tokens of a row, context with them)
CASES = {"decode, 1 row": (1, 1, 200), "decode, 16 rows": (16, 1, 200), "prefill, 512 tokens": (1, 512, 512)}


def windows(folder: Path, length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` token ids."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = load_tokenizer(folder).encode(text)
    assert len(ids) >= length * count, f"the text has {len(ids)} tokens"
    return [list(ids[start : start + length]) for start in range(0, length * count, length)]


@torch.inference_mode()
def scores(runner: StageRunner, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Natural log-probability of every token but the first, and whether it was the likeliest: each [len(ids) - 1]."""
    batch = batch_of(1, len(ids), len(ids), runner.config.vocab_size)
    cache = KVCache(
        runner.config,
        runner.layers,
        num_blocks=NUM_BLOCKS,
        block_size_tokens=BLOCK_TOKENS,
        dtype=runner.dtype,
        device=CPU,
    )
    ids_T = torch.tensor(ids)
    hidden_TD = runner.model(
        ids_T, AttentionContext.from_batch(batch, runner.transfers.to_device(batch.attention_arrays)), cache
    )
    logprobs, best = [], []
    for hidden_RD, next_R in zip(hidden_TD[:-1].split(128), ids_T[1:].split(128), strict=True):
        logits_RV = runner.model.compute_logits(hidden_RD)
        logprobs.append(logits_RV.log_softmax(-1).gather(1, next_R.unsqueeze(1)).squeeze(1))
        best.append(logits_RV.argmax(-1))
    return torch.cat(logprobs), torch.cat(best)


def main() -> int:
    """Load all kinds, score, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=21, help="of each timed case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(args.model)
    runners = {
        name: load(checkpoint, torch.bfloat16, quantization=quantization) for name, quantization in KINDS.items()
    }
    texts = windows(checkpoint.path, args.window_tokens, args.windows)
    results: dict[str, dict[str, float]] = {name: {} for name in KINDS}
    scored = {name: [scores(runner, ids) for ids in texts] for name, runner in runners.items()}
    reference = torch.cat([best for _, best in scored["bfloat16"]])
    for name, windows_ in scored.items():
        logprobs = torch.cat([logprob for logprob, _ in windows_])
        results[name]["perplexity"] = round(math.exp(-logprobs.double().mean().item()), 4)
        agree = (torch.cat([best for _, best in windows_]) == reference).double().mean().item()
        results[name]["same_likeliest_token"] = round(agree, 4)
    for case, (rows, new_tokens, context) in CASES.items():
        batch = batch_of(rows, new_tokens, context, checkpoint.config.vocab_size)
        sides = tuple(lambda runner=runner: runner.execute(batch, None) for runner in runners.values())  # noqa: B023
        for name, times_ms in zip(runners, alternate(sides, args.runs), strict=True):
            results[name][f"{case}, ms"] = round(statistics.median(times_ms), 2)
    report = {
        "what": "weight-only quantization: perplexity and time",
        "model": Path(args.model).name,
        "scored_tokens": args.windows * (args.window_tokens - 1),
        "threads": args.threads,
        "torch": torch.__version__,
        **here(),
        "results": results,
    }
    print(json.dumps(report, indent=2))
    columns = list(results["bfloat16"])
    print("\n| weights | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, row in results.items():
        print(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
