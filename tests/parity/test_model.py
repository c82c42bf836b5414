"""Greedy output in float32 equals transformers' token for token, however the layers are cut and the batch is made up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.stage_chain import Chain
from tests.tiny import save_tiny, tiny_model

SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "odd sizes": {
        "hidden_size": 42,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 77,
        "vocab_size": 331,
    },
    "sliding": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}
CUTS = ([0, 4], [0, 2, 4], [0, 1, 4], [0, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4])


def reference(model, prompt: Sequence[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
        eos_token_id=None, repetition_penalty=1.0, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def prompts(vocab_size: int, count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("shape", SHAPES)
def test_tiny_models_agree_for_every_cut(shape: str, tmp_path) -> None:
    model = tiny_model(**SHAPES[shape])
    folder = save_tiny(tmp_path / "model", model)
    texts = prompts(model.config.vocab_size, 5, 40)
    expected = [reference(model, prompt, 12) for prompt in texts]
    assert len({tuple(answer) for answer in expected}) > 1, "the model must not answer everything alike"
    for cuts in CUTS:
        chain = Chain(folder, cuts)
        assert chain.generate(texts, 12) == expected, f"together, cut at {cuts}"
        assert chain.generate(texts[:1], 12) == expected[:1], f"alone, cut at {cuts}"


def test_chunks_of_a_prompt_give_the_logits_of_the_whole(tmp_path) -> None:
    model = tiny_model()
    chain = Chain(save_tiny(tmp_path / "model", model), [0, 2, 4])
    prompt = prompts(384, 1, 60)[0] + prompts(384, 1, 60)[0]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    chain.step([(0, prompt[:7], 7)])
    chain.step([(0, prompt[7:8], 8), (1, prompt, len(prompt))])
    got = chain.step([(0, prompt[8:], len(prompt))])[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_split_does_not_change_a_bit(dtype, tmp_path) -> None:
    folder = save_tiny(tmp_path / "model")
    rows = [(i, prompt, len(prompt)) for i, prompt in enumerate(prompts(384, 6, 50))]
    whole = Chain(folder, [0, 4], dtype=dtype).step(rows)
    for cuts in CUTS[1:]:
        parts = Chain(folder, cuts, dtype=dtype).step(rows)
        assert all(torch.equal(whole[i], parts[i]) for i in whole), cuts


@pytest.mark.parametrize(("name", "cuts"), [("smollm2", [0, 7, 12, 30]), ("qwen-coder", [0, 9, 24])])
@pytest.mark.timeout(900)
def test_real_models_agree(name: str, cuts: list[int], model_folder) -> None:
    folder = model_folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = prompts(40_000, 4, 30)
    expected = [reference(model, prompt, 24) for prompt in texts]
    chain = Chain(folder, cuts)
    assert chain.generate(texts, 24) == expected
    assert chain.generate(texts[:1], 24) == expected[:1]
