"""The compiled functions against what they take the place of."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode_attention import plain_softmax

from stages.attention.compiled import CompiledAttention
from stages.attention.self_check import batch_context
from stages.compiled import functions as compiled
from stages.config import ModelConfig
from stages.kv_cache import KVCache
from stages.layers.ops import RMSNorm, RotaryEmbedding, rotate_
from stages.partition import LayerRange
from tests.parity.test_model import reference
from tests.stage_chain import Chain
from tests.tiny import save_tiny, tiny_model

CPU = torch.device("cpu")
HEAD_DIM = 16


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 257])
def test_norm(functions, threads, num_tokens: int) -> None:
    ours, dtype = functions
    torch.manual_seed(num_tokens)
    weight, x_TD = torch.randn(96).to(dtype), (7 * torch.randn(num_tokens, 96)).to(dtype)
    norms = [RMSNorm(96, 1e-6, dtype=dtype, device=CPU, functions=which) for which in (ours, None)]
    for norm in norms:
        norm.weight.data.copy_(weight)
    got, expected = (norm(x_TD) for norm in norms)
    torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("num_tokens", [1, 5, 130])
def test_rotation_has_the_same_bits_and_everything_is_stored(functions, threads, num_tokens: int) -> None:
    ours, dtype = functions
    num_heads, num_kv_heads = 6, 2
    torch.manual_seed(num_tokens)
    caches = [
        KVCache(_config(num_heads, num_kv_heads), LayerRange(0, 1), num_blocks=40, block_size_tokens=4, dtype=dtype, device=CPU)
        for _ in range(2)
    ]  # fmt: skip
    heads_TAH = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM).to(dtype)
    slots_T, positions_T = torch.randperm(160)[:num_tokens], torch.randint(5000, (num_tokens,))
    angles = RotaryEmbedding(HEAD_DIM, 10_000.0, device=CPU).angles(positions_T, dtype)
    got, expected = heads_TAH.clone(), heads_TAH.clone()
    ours.run(ours.rotate_call(got, num_heads, angles, slots_T, *caches[0].layer(0)))
    rotate_(expected.narrow(1, 0, num_heads + num_kv_heads), *angles)
    caches[1].write(0, slots_T, *expected.split((num_heads, num_kv_heads, num_kv_heads), 1)[1:])
    assert torch.equal(got, expected)
    for mine, theirs in zip(caches[0].layer(0), caches[1].layer(0), strict=True):
        assert torch.equal(mine, theirs)


@settings(max_examples=60)
@given(data=st.data())
def test_attention_agrees_with_a_plain_softmax(data: st.DataObject, functions) -> None:
    ours, dtype = functions
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    prefill = data.draw(st.lists(st.tuples(st.integers(0, 60), st.integers(2, 40)), max_size=1))
    rows = [(length, 1) for length in lengths] + [(before + queries, queries) for before, queries in prefill]
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 7), (2, 7), (3, 2)]))
    window = data.draw(st.sampled_from([None, 1, 8, 37, 1000]))
    block = data.draw(st.sampled_from([4, 16, 256]))
    context, num_blocks = batch_context(tuple(rows), block, CPU)
    torch.manual_seed(len(rows))
    keys, values = (torch.randn(num_blocks + 1, block, kv_heads, HEAD_DIM).to(dtype) for _ in range(2))
    # Queries as the model has them: part of a wider tensor.
    qkv = torch.randn(sum(n for _, n in rows), kv_heads * (group + 2), HEAD_DIM).to(dtype)
    q_TNH = qkv.narrow(1, 0, kv_heads * group)
    got = CompiledAttention(ours).forward(q_TNH, keys, values, context, window)
    expected = plain_softmax(q_TNH, keys, values, context, window)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_threads_share_out_the_same_bits(functions, on_threads, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, dtype = functions
    context, num_blocks = batch_context(tuple((10 + 53 * i, 1) for i in range(24)), 16, CPU)
    torch.manual_seed(0)
    keys, values = (torch.randn(num_blocks, 16, 2, HEAD_DIM).to(dtype) for _ in range(2))
    q_TNH = torch.randn(24, 8, HEAD_DIM).to(dtype)
    alone = ours.attend(q_TNH, keys, values, context, None)
    monkeypatch.setattr(compiled, "PARALLEL_ELEMENTS", 1)
    with on_threads(4):
        for _ in range(50):
            assert torch.equal(ours.attend(q_TNH, keys, values, context, None), alone)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_in_its_row(functions, poison: float) -> None:
    ours, dtype = functions
    context, num_blocks = batch_context(((40, 1), (90, 1), (17, 1)), 16, CPU)
    torch.manual_seed(0)
    keys, values = (torch.randn(num_blocks, 16, 2, HEAD_DIM).to(dtype) for _ in range(2))
    q_TNH = torch.randn(3, 8, HEAD_DIM).to(dtype)
    clean = ours.attend(q_TNH, keys, values, context, None)
    keys[int(context.block_tables_RM[1, 2]), 3] = poison
    got = ours.attend(q_TNH, keys, values, context, None)
    assert got[1].isnan().any()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    x_TD = torch.randn(3, 96).to(dtype)
    x_TD[1, 5] = poison
    norm = RMSNorm(96, 1e-6, dtype=dtype, device=CPU, functions=ours)
    norm.weight.data.fill_(1)
    assert norm(x_TD).isnan().any(1).tolist() == [False, True, False]


def test_a_model_says_what_transformers_says(tmp_path, for_all_sizes) -> None:
    model = tiny_model()
    chain = Chain(save_tiny(tmp_path, model), [0, 1, 4])
    assert "compiled agrees with the oracle" in chain.stages[0].report()
    prompts = [[5, 77, 300, 12, 9, 9, 41], [1], list(range(1, 90))]
    assert chain.generate(prompts, 20) == [reference(model, prompt, 20) for prompt in prompts]


@pytest.mark.parametrize(
    "options", [{"quantization": "int8"}, {"dtype": torch.bfloat16}, {"packed_weights": False}], ids=str
)
def test_with_every_form_of_products_it_says_what_operators_say(tmp_path, for_all_sizes, options) -> None:
    folder = save_tiny(tmp_path)
    logits = []
    for wanted in (True, False):
        chain = Chain(folder, [0, 2, 4], compiled=wanted, **options)
        assert ("compiled agrees" in chain.stages[0].report()) == wanted
        chain.step([(0, list(range(1, 40)), 39), (1, [7, 8, 9], 3)])
        logits.append(torch.stack(list(chain.step([(0, [5], 40), (1, [6], 4)]).values())))
    torch.testing.assert_close(*logits, rtol=0, atol=0.1 if options.get("dtype") == torch.bfloat16 else 2e-3)


def test_a_stage_without_numba_says_so_and_computes(tmp_path, for_all_sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stages.compiled.functions", None)
    model = tiny_model()
    chain = Chain(save_tiny(tmp_path, model), [0, 4])
    assert "portable; compiled functions are not used" in chain.stages[0].report()
    assert chain.generate([[5, 77, 300]], 8) == [reference(model, [5, 77, 300], 8)]


def _config(num_heads: int, num_kv_heads: int) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "qwen2", "vocab_size": 384, "hidden_size": num_heads * HEAD_DIM, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads,
        }
    )  # fmt: skip
