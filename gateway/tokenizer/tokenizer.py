"""The tokenizer: text to token ids and back, for byte-level BPE vocabularies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import tokenizers

from stageline.errors import InvalidArgumentError


class Tokenizer:
    """Encodes and decodes; never adds tokens that the text does not have.

    special_ids: tokens left out of text unless asked for. special_tokens: the model's named ones (`eos_token`,
    `bos_token`, ... → text), which chat templates may use. eos_token_ids: ids that end a text.
    vocab_size: number of tokens of the tokenizer, added ones included (transformers' `len(tokenizer)`).
    num_ids: ids in [0, num_ids) can be decoded. The model's embedding may have more rows than the tokenizer has tokens
    (Qwen2 pads it to a round number); such ids stand for no text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        model_vocab_size: int = 0,
    ) -> None:
        """`backend` has a byte-level decoder. `model_vocab_size` is the number of rows of the model's embedding."""
        self._backend = backend
        self._bytes: dict[int, bytes] = {}  # of the tokens that were asked for
        self.chat_template = chat_template
        self.special_tokens = MappingProxyType(dict(special_tokens or {}))
        self.eos_token_ids = tuple(eos_token_ids)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocab)
        self.num_ids = max(max(vocab.values(), default=-1) + 1, model_vocab_size)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids; special tokens written in the text are recognized. Raises InvalidArgumentError for lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                "TEXT_NOT_UNICODE", f"the text holds a lone surrogate at character {error.start}; send valid Unicode",
                field="prompt", position=error.start,
            ) from None  # fmt: skip
        # `encode` would hold the GIL from beginning to end, whatever thread it is on; and it counts offsets, which nobody reads.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return tuple(encoding.ids)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD. Raises InvalidArgumentError for an id out of range."""
        pieces = [(i, self.token_bytes(i)) for i in token_ids]  # special ids are checked too
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        return b"".join(data for i, data in pieces if i not in skipped).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """The tokenizer in the form of tokenizer.json."""
        return str(self._backend.to_str())

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, special or not; none for ids that only the model's embedding has.

        Raises InvalidArgumentError for an id outside [0, num_ids).
        """
        if not 0 <= token_id < self.num_ids:
            raise InvalidArgumentError(
                "TOKEN_ID_OUT_OF_RANGE", f"token id {token_id} is out of range; ids are in [0, {self.num_ids})",
                field="token_ids", value=token_id, num_ids=self.num_ids,
            )  # fmt: skip
        data = self._bytes.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id)
            data = self._bytes[token_id] = b"" if token is None else bytes_of(token)
        return data


def bytes_of(token: str) -> bytes:
    """The bytes that a vocabulary entry, written in the byte alphabet, stands for.

    As the `tokenizers` library has it, for added tokens too: an entry with any character outside the alphabet is
    plain text.
    """
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (Radford et al., 2019): printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
