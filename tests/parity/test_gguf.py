"""A .gguf file end to end: weights and tokens as transformers reads them with `gguf_file=`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest
import torch
from real_prompts import PROMPTS
from test_real_models import greedy
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from gateway.tokenizer import load_tokenizer
from tests.stage_chain import Chain
from tests.tiny import tiny_model

NUM_TOKENS = 48
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def read_by_transformers(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.mark.timeout(600)
def test_greedy_answers_are_those_of_transformers() -> None:
    named = os.environ.get("STAGELINE_TEST_GGUF")
    if not named:
        pytest.skip("STAGELINE_TEST_GGUF names no file: there is no GGUF model to test with")
    path = Path(named)
    tokenizer = load_tokenizer(path)
    prompts = [list(tokenizer.encode(text)) for text in PROMPTS[:6]]
    model = read_by_transformers(path)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    del model
    assert Chain(path, [0, 13, 30]).generate(prompts, NUM_TOKENS) == expected


@pytest.mark.parametrize("kind", [F32, Q8_0], ids=["F32", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("cuts", [[0, 2, 4], [0, 1, 4]], ids=str)
def test_qwen2_architecture(cuts: Sequence[int], tied: bool, kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    """Biases, grouped heads and both kinds of output head, from random weights written by the `gguf` package."""
    path = tmp_path / "model.gguf"
    write_qwen2(path, tiny_model(tie_word_embeddings=tied), kind)
    model = read_by_transformers(path)
    assert isinstance(model, Qwen2ForCausalLM)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(1, 384, (n,), generator=generator).tolist() for n in (1, 3, 16, 17, 40, 90)]
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) == len(prompts), "the model must not answer everything alike"
    chain = Chain(path, cuts)
    assert chain.generate(prompts, NUM_TOKENS) == expected
    assert chain.generate(prompts[-1:], NUM_TOKENS) == expected[-1:]


def write_qwen2(path: Path, model: Qwen2ForCausalLM, kind: gguf.GGMLQuantizationType) -> None:
    """The model as a converter writes it: matrices as `kind`, norms and biases as float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    # transformers takes the vocabulary's size from the token list.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        chosen = kind if tensor.ndim == 2 else F32
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
