"""Everything the gateway needs of a model besides its weights: limits, defaults, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

from gateway.config import Config, ModelSection
from gateway.tokenizer import ChatTemplate, Tokenizer, load_tokenizer
from gateway.types import ModelInfo
from stageline.errors import ConfigError
from stages.checkpoint import open_checkpoint


def load_model(config: Config) -> tuple[ModelInfo, Tokenizer, ChatTemplate | None]:
    """Open the checkpoint's metadata and tokenizer. Raises CheckpointError or ConfigError; reads no weights."""
    checkpoint = open_checkpoint(config.model.path, revision=config.model.revision)
    tokenizer = load_tokenizer(checkpoint.path)
    longest = checkpoint.config.max_position_embeddings
    limit = config.model.max_context_tokens or longest
    if limit > longest:
        raise ConfigError(
            "CONTEXT_TOO_LONG",
            f"model.max_context_tokens is {limit}, the model goes to {longest}",
            field="model.max_context_tokens",
            value=limit,
            longest=longest,
        )
    defaults = dict(checkpoint.generation_config)
    more = defaults.get("eos_token_id")
    more = [] if more is None else more if isinstance(more, list) else [more]
    configured = configured_template(config.model)
    source = tokenizer.chat_template if configured is None else configured
    template = None if source is None else ChatTemplate(source, tokenizer.special_tokens)
    info = ModelInfo(
        name=config.model.name or Path(config.model.path).name,
        fingerprint=checkpoint.fingerprint,
        max_context_tokens=limit,
        vocab_size=checkpoint.config.vocab_size,
        eos_token_ids=tuple(dict.fromkeys([*checkpoint.config.eos_token_ids, *more])),
        generation_defaults=defaults,
    )
    return info, tokenizer, template


def configured_template(model: ModelSection) -> str | None:
    """The source of the chat template that takes the place of the model's. Raises ConfigError for a file that cannot be read."""
    if (file := model.chat_template_file) is None:
        return None
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "CHAT_TEMPLATE_UNREADABLE",
            f"model.chat_template_file cannot be read: {error}; expected a UTF-8 file with a Jinja template",
            field="model.chat_template_file",
            value=file,
        ) from None
