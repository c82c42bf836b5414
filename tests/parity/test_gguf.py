"""A .gguf file end to end: weights and tokens as transformers reads them with `gguf_file=`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from real_prompts import PROMPTS
from test_real_models import greedy
from transformers import AutoModelForCausalLM

from gateway.tokenizer import load_tokenizer
from tests.stage_chain import Chain

NUM_TOKENS = 48


@pytest.mark.timeout(600)
def test_greedy_answers_are_those_of_transformers() -> None:
    named = os.environ.get("STAGELINE_TEST_GGUF")
    if not named:
        pytest.skip("STAGELINE_TEST_GGUF names no file: there is no GGUF model to test with")
    path = Path(named)
    tokenizer = load_tokenizer(path)
    prompts = [list(tokenizer.encode(text)) for text in PROMPTS[:6]]
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    del model
    assert Chain(path, [0, 13, 30]).generate(prompts, NUM_TOKENS) == expected
