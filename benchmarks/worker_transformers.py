"""transformers for benchmarks/compare.py: MODEL DTYPE PROMPT_TOKENS NEW_TOKENS; `decode STREAMS` or `prefill TOKENS` a line in, tokens a
second out."""

from __future__ import annotations

import random
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Serve until stdin ends."""
    folder, dtype = sys.argv[1:3]
    prompt_tokens, new_tokens = map(int, sys.argv[3:5])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    rng = random.Random(0)
    print("@@ ready", flush=True)
    for line in sys.stdin:
        kind, size = line.split()
        streams, length = (int(size), prompt_tokens) if kind == "decode" else (1, int(size))
        ids = torch.tensor([[rng.randrange(100, 40_000) for _ in range(length)] for _ in range(streams)])

        def seconds(count: int, ids: torch.Tensor = ids) -> float:
            began = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                    do_sample=False, eos_token_id=None, pad_token_id=0, repetition_penalty=1.0,
                )  # fmt: skip
            return time.perf_counter() - began

        if kind == "prefill":
            print(f"@@ {length / seconds(1)}", flush=True)
            continue
        decode_s = seconds(new_tokens) - seconds(1)
        print(f"@@ {streams * (new_tokens - 1) / decode_s}", flush=True)


if __name__ == "__main__":
    main()
