"""Text to token ids and back: tokenizers from three kinds of files, chat templates, incremental decoding, stop strings."""

from gateway.tokenizer.chat_template import ChatTemplate, load_chat_template
from gateway.tokenizer.detokenizer import Detokenizer
from gateway.tokenizer.loading import load_tokenizer
from gateway.tokenizer.stops import StopMatcher
from gateway.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopMatcher", "Tokenizer", "load_chat_template", "load_tokenizer"]
