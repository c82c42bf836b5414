"""vLLM on the CPU for benchmarks/compare.py: MODEL DTYPE PROMPT_TOKENS NEW_TOKENS; `decode STREAMS` or `prefill TOKENS` a line in,
tokens a second out."""

from __future__ import annotations

import os
import random
import sys
import time

os.environ.setdefault(
    "VLLM_CPU_KVCACHE_SPACE", "1"
)  # GiB; by itself it takes nearly all memory, which others here use too

from vllm import LLM, SamplingParams  # in its own environment


def main() -> None:
    """Serve until stdin ends."""
    folder, dtype = sys.argv[1:3]
    prompt_tokens, new_tokens = map(int, sys.argv[3:5])
    llm = LLM(model=folder, dtype=dtype, max_model_len=4096, enable_prefix_caching=False)
    rng = random.Random(0)
    print("@@ ready", flush=True)
    for line in sys.stdin:
        kind, size = line.split()
        streams, length = (int(size), prompt_tokens) if kind == "decode" else (1, int(size))
        prompts = [{"prompt_token_ids": [rng.randrange(100, 40_000) for _ in range(length)]} for _ in range(streams)]

        def seconds(count: int, prompts: list[dict[str, list[int]]] = prompts) -> float:
            params = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - began

        if kind == "prefill":
            print(f"@@ {length / seconds(1)}", flush=True)
            continue
        decode_s = seconds(new_tokens) - seconds(1)
        print(f"@@ {streams * (new_tokens - 1) / decode_s}", flush=True)


if __name__ == "__main__":
    main()
