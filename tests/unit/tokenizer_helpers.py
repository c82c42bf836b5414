"""A small byte-level BPE tokenizer in Qwen2's file layout, trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Many scripts, code, emoji with joiners, combining marks that NFC composes, control characters, digits, whitespace.
TEXT = (
    "Hello wörld! it's I'LL we'Ve 12345 3.14 ½Ⅷ²  \n\n\t def f(x):\n        return x+1  # 你好，世界\r\n\r\n"
    "café cafe\u0301 A\u030a q\u0323\u0307 \ud55c\uae00 \u1112\u1161\u11ab العربية עברית हिन्दी नमस्ते ไทย ελληνικά Русский "
    "🎉👩‍👩‍👧🇩🇪👍🏽 \x00\x07\x1b[0m\x7f\u200b\ufeff\u00a0\u3000\u2028 ---===>>> a_b-c.d/e\\f   end   \n \n"
    "<|im_start|>user\nhi<|im_end|>\n <|endoftext|><|im_end|> <tool_call>{}</tool_call> <|im_start <|nothing|>"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = "<tool_call>"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train(num_tokens: int = 600) -> tuple[dict[str, int], list[str]]:
    """Vocabulary (all 256 bytes and merges) and merges `"left right"` learned from TEXT."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]


def write_folder(folder: Path, **config: Any) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json (with `config` on top); returns the folder."""
    vocab, merges = train()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    added = {
        str(len(vocab) + i): {
            "content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": text != ADDED,
        }
        for i, text in enumerate([*SPECIAL, ADDED])
    }  # fmt: skip
    full = {
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None, "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False, **config,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(full), encoding="utf-8")
    return folder


def write_gguf(path: Path, *, pre: str, model: str = "gpt2") -> Path:
    """A GGUF file with the same tokenizer as metadata, and no tensors; returns its path."""
    vocab, merges = train()
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *SPECIAL, ADDED])
    writer.add_token_types([1] * len(tokens) + [3] * len(SPECIAL) + [4])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) + 2)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
