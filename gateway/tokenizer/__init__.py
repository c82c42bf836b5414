"""Text to token ids and back: tokenizers from three kinds of files, chat templates, incremental decoding, stop strings."""

from gateway.tokenizer.chat_template import ChatTemplate
from gateway.tokenizer.detokenizer import Detokenizer
from gateway.tokenizer.stops import StopMatcher
from gateway.tokenizer.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "StopMatcher", "Tokenizer", "load_tokenizer"]
