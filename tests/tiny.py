"""Tiny checkpoints with random weights, in the layout of the published Qwen2 folders, and their transformers twins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM

from gateway.tokenizer.byte_level_bpe import QWEN2_PATTERN

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "the quick brown fox jumps over the lazy dog. Once upon a time, 12 stages passed hidden states to each other! " * 4
)


def tiny_model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A random float32 model whose greedy choices are not all the same token."""
    values = {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "eos_token_id": 0, "initializer_range": 0.2, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**{**values, **changes})).eval()
    with torch.no_grad():  # transformers starts biases at zero: a lost bias would go unnoticed
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def save_tiny(folder: Path, model: Qwen2ForCausalLM | None = None, *, template: str | None = CHAT_TEMPLATE) -> Path:
    """Write config, several weight shards, vocab.json and merges.txt."""
    (model or tiny_model()).save_pretrained(folder, max_shard_size="200KB")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    bpe = json.loads(tokenizer.to_str())["model"]
    # As in Qwen2, special tokens come after the vocabulary.
    size = len(bpe["vocab"])
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in bpe["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {str(size + i): {"content": token, "special": True} for i, token in enumerate(SPECIAL)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [size], "do_sample": False}))
    return folder
