"""What 8-bit hidden states between stages do to the logits, with real weights and all stages in this process.

`python -m benchmarks.hidden_dtype --model FOLDER`. The texts are those of `benchmarks.quantization`. At every position the
logits are compared with those of the same stages whose hidden states travel as computed: differences over the whole
vocabulary, the divergence of the distributions (Kullback-Leibler, in nats) and whether the likeliest token is the same.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels import BLOCK_TOKENS, NUM_BLOCKS, batch_of, load
from benchmarks.quantization import CPU, windows
from benchmarks.report import here
from stages.attention import AttentionContext
from stages.checkpoint import open_checkpoint
from stages.hidden_states import HiddenStateCodec
from stages.kv_cache import KVCache
from stages.partition import LayerRange
from stages.runner import StageRunner
from stages.spec import HIDDEN_DTYPES

QUARTERS = 4  # the model is loaded as four stages; for two, nothing is reduced at the first and third cut


def load_stages(folder: str) -> list[StageRunner]:
    """The model in bfloat16 as stages of equally many layers."""
    checkpoint = open_checkpoint(folder)
    cuts = [round(checkpoint.config.num_layers * i / QUARTERS) for i in range(QUARTERS + 1)]
    return [load(checkpoint, torch.bfloat16, LayerRange(*ends)) for ends in itertools.pairwise(cuts)]


@torch.inference_mode()
def logits(runners: list[StageRunner], ids: list[int], hidden_dtype: str | None, num_stages: int) -> Tensor:
    """float32 [T, V] of one prefill."""
    batch = batch_of(1, len(ids), len(ids), runners[0].config.vocab_size)
    arrays = runners[0].transfers.to_device(batch.attention_arrays)
    context, value = AttentionContext.from_batch(batch, arrays), torch.tensor(ids)
    codec = HiddenStateCodec(runners[0].dtype, runners[0].config.hidden_size, hidden_dtype)
    for index, runner in enumerate(runners):
        cache = KVCache(
            runner.config, runner.layers, num_blocks=NUM_BLOCKS, block_size_tokens=BLOCK_TOKENS, dtype=runner.dtype,
            device=CPU,
        )  # fmt: skip
        if index and index % (QUARTERS // num_stages) == 0:
            value = codec.decode(codec.encode(value), len(ids))
        value = runner.model(value, context, cache)
    return torch.cat([runners[-1].model.compute_logits(part) for part in value.split(128)])


def compare(reference_TV: Tensor, reduced_TV: Tensor) -> dict[str, float]:
    """Figures over all positions."""
    difference_TV = (reduced_TV - reference_TV).abs()
    divergence_T = torch.nn.functional.kl_div(
        reduced_TV.log_softmax(-1), reference_TV.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    return {
        "max_logit_difference": round(difference_TV.max().item(), 4),
        "mean_logit_difference": round(difference_TV.mean().item(), 4),
        "mean_divergence_nats": round(divergence_T.mean().item(), 5),
        "max_divergence_nats": round(divergence_T.max().item(), 5),
        "same_likeliest_token": round((reduced_TV.argmax(-1) == reference_TV.argmax(-1)).double().mean().item(), 4),
    }


def main() -> int:
    """Load, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window-tokens", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runners = load_stages(args.model)
    texts = windows(Path(args.model), args.window_tokens, args.windows)
    reference_TV = torch.cat([logits(runners, ids, None, QUARTERS) for ids in texts])
    results = {
        f"{hidden_dtype}, {num_stages} stages": compare(
            reference_TV, torch.cat([logits(runners, ids, hidden_dtype, num_stages) for ids in texts])
        )
        for hidden_dtype in HIDDEN_DTYPES
        for num_stages in (2, 4)
    }
    report = {
        "what": "8-bit hidden states: logits against those of bfloat16 hidden states",
        "model": Path(args.model).name,
        "positions": args.windows * args.window_tokens,
        "torch": torch.__version__,
        **here(),
        "results": results,
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
