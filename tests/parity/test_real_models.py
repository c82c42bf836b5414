"""The two real checkpoints against transformers on the same weights: 20 prompts, 64 tokens, every number of stages.

float32 must agree token for token; where the two highest logits of the reference are closer than float32 can tell apart
over that many layers, a difference is named in the failure with its margin, never skipped. bfloat16 must stay within the
spread that transformers shows itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from real_prompts import PROMPTS
from transformers import AutoModelForCausalLM

from gateway.tokenizer import load_tokenizer
from tests.stage_chain import Chain

NUM_TOKENS = 64
CUTS = {
    "smollm2": ([0, 30], [0, 15, 30], [0, 7, 12, 30], [0, 3, 17, 29, 30]),
    "qwen-coder": ([0, 24], [0, 9, 24], [0, 8, 16, 24], [0, 1, 10, 22, 24]),
}
NAMES = tuple(CUTS)

pytestmark = pytest.mark.timeout(900)


@dataclass
class Reference:
    """What transformers says. `answers[i]` follows `prompts[i]`; both are token ids."""

    name: str
    folder: str
    model: torch.nn.Module
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module", params=NAMES)
def reference(request, model_folder) -> Reference:
    """Computed once a checkpoint: pytest runs all tests of one before those of the next."""
    folder = model_folder(request.param)
    tokenizer = load_tokenizer(folder)
    prompts = [list(tokenizer.encode(text)) for text in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Reference(request.param, str(folder), model, prompts, [greedy(model, prompt) for prompt in prompts])


@torch.inference_mode()
def greedy(model, prompt: Sequence[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    """`generate` without its processors: the model's own argmax, end tokens allowed."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
        eos_token_id=None, pad_token_id=0, repetition_penalty=1.0, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_float32_agrees_token_for_token_together(num_stages: int, reference: Reference) -> None:
    cuts = CUTS[reference.name][num_stages - 1]
    chain = Chain(reference.folder, cuts, num_blocks=512)
    explain(reference, continuous_batching(chain, reference.prompts, NUM_TOKENS), f"cut at {cuts}, together")


def test_float32_agrees_token_for_token_alone(reference: Reference) -> None:
    chain = Chain(reference.folder, CUTS[reference.name][1], num_blocks=512)
    alone = [chain.generate([prompt], NUM_TOKENS)[0] for prompt in reference.prompts]
    explain(reference, alone, "alone")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_split_does_not_change_a_bit(dtype: torch.dtype, reference: Reference) -> None:
    name = reference.name
    steps = [[(i, prompt[:-1], len(prompt) - 1) for i, prompt in enumerate(reference.prompts) if len(prompt) > 1]]
    steps.append([(i, prompt[-1:], len(prompt)) for i, prompt in enumerate(reference.prompts)])
    whole, *others = (Chain(reference.folder, cuts, dtype=dtype, num_blocks=512) for cuts in CUTS[name])
    expected = [whole.step(rows) for rows in steps]
    for cuts, chain in zip(CUTS[name][1:], others, strict=True):
        for rows, logits in zip(steps, expected, strict=True):
            got = chain.step(rows)
            assert all(torch.equal(got[i], logits[i]) for i in logits), f"{name} cut at {cuts}"


@torch.inference_mode()
def test_bfloat16_stays_within_the_spread_of_transformers(reference: Reference) -> None:
    """Distance to its own float32, at the last position of each prompt: ours at most 1.5 times that of transformers over
    the batch sizes 1, 8 and 16, in the mean over tokens and in the worst logit."""
    prompts = [prompt for prompt in reference.prompts if len(prompt) > 1][:16]
    exact = torch.stack([reference.model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    theirs = AutoModelForCausalLM.from_pretrained(reference.folder, dtype=torch.bfloat16).eval()
    spread = [distance(last_logits(theirs, prompts, size), exact) for size in (1, 8, 16)]
    rows = [(i, prompt, len(prompt)) for i, prompt in enumerate(prompts)]
    for cuts in (CUTS[reference.name][0], CUTS[reference.name][2]):
        ours = Chain(reference.folder, cuts, dtype=torch.bfloat16, num_blocks=512).step(rows)
        mean, worst = distance(torch.stack([ours[i] for i in range(len(prompts))]), exact)
        assert mean <= 1.5 * max(pair[0] for pair in spread), (mean, spread)
        assert worst <= 1.5 * max(pair[1] for pair in spread), (worst, spread)


def last_logits(model, prompts: Sequence[Sequence[int]], batch_size: int) -> torch.Tensor:
    """float32 [len(prompts), V] of the last positions, computed by transformers in left-padded batches."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(len(prompt) for prompt in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        parts.append(model(ids, attention_mask=mask, position_ids=positions).logits[:, -1].float())
    return torch.cat(parts)


def distance(logits_RV: torch.Tensor, exact_RV: torch.Tensor) -> tuple[float, float]:
    """Mean and largest absolute difference."""
    difference_RV = (logits_RV - exact_RV).abs()
    return float(difference_RV.mean()), float(difference_RV.max())


def continuous_batching(chain: Chain, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy answers, with a new sequence every other step and prompts cut into chunks: decodes and prefills mixed."""
    outputs: list[list[int]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    tick = 0
    while any(len(answer) < num_tokens for answer in outputs):
        rows = []
        for i, prompt in enumerate(prompts[: tick // 2 + 2]):
            whole = [*prompt, *outputs[i]]
            if len(outputs[i]) < num_tokens:
                fresh = whole[done[i] : done[i] + 5 + 9 * i]
                done[i] += len(fresh)
                rows.append((i, fresh, done[i]))
        complete = {i for i, _, context in rows if context == len(prompts[i]) + len(outputs[i])}
        for i, logits_V in chain.step(rows).items():
            if i in complete:
                outputs[i].append(int(logits_V.argmax()))
        tick += 1
    return outputs


@torch.inference_mode()
def explain(reference: Reference, got: Sequence[Sequence[int]], what: str) -> None:
    """Fails with prompt, place and the reference's margin between its two best logits where an answer differs."""
    faults = []
    for i, (answer, expected) in enumerate(zip(got, reference.answers, strict=True)):
        if list(answer) != expected:
            place = next(k for k, pair in enumerate(zip(answer, expected, strict=True)) if pair[0] != pair[1])
            ids = torch.tensor([[*reference.prompts[i], *expected[:place]]])
            best = reference.model(ids).logits[0, -1].topk(2)
            margin = float(best.values[0] - best.values[1])
            faults.append(
                f"prompt {i} token {place}: {answer[place]} instead of {expected[place]}, margin {margin:.2e}"
            )
    assert not faults, f"{what}: " + "; ".join(faults)
