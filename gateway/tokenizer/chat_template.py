"""Chat templates: messages to prompt text, as transformers renders them, in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import meta

from gateway.tokenizer.sandbox import BUDGET, MAX_CHARS, Budget, ChatEnvironment
from gateway.tokenizer.tokenizer import Tokenizer
from stageline.errors import CheckpointError, InvalidArgumentError

ROLES = ("system", "user", "assistant", "tool")
# Marks where an open last message ends. The trailing space tells whether the template strips the message.
_END_MARK = "\ue000end of the open message\ue000 "


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The tokenizer's chat template. Raises InvalidArgumentError (NO_CHAT_TEMPLATE) where it has none."""
    if tokenizer.chat_template is None:
        raise InvalidArgumentError(
            "NO_CHAT_TEMPLATE",
            "this model has no chat template (it is a base model): send a plain prompt, or serve an Instruct model",
            field="messages",
        )
    return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)


class ChatTemplate:
    """A compiled template. `takes_tools`: whether it writes tools into the prompt at all."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """`special_tokens` (`eos_token` → text, ...) are variables of the template.

        Raises CheckpointError where the template does not compile.
        """
        self._special_tokens = dict(special_tokens or {})
        try:
            environment = ChatEnvironment()
            self._template = environment.from_string(source)
            self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:  # whatever a damaged template does to the compiler
            raise CheckpointError(
                "CHAT_TEMPLATE_INVALID", f"the model's chat template does not compile: {error}"
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt.

        `add_generation_prompt` opens the assistant's turn after the messages. `continue_final_message` leaves the last
        message open instead, for the model to go on with. Values are what JSON has.

        Raises InvalidArgumentError: MESSAGES_EMPTY, ROLE_UNKNOWN, NOTHING_TO_CONTINUE (the last message has no text),
        CHAT_TEMPLATE_REFUSED (the template raised, or exceeds its bounds).
        """
        plain = _checked(messages)
        if continue_final_message:
            if not isinstance(plain[-1].get("content"), str):
                raise InvalidArgumentError(
                    "NOTHING_TO_CONTINUE", "the last message has no text to continue; give its content as a string",
                    field=f"messages[{len(plain) - 1}].content",
                )  # fmt: skip
            plain[-1]["content"] += _END_MARK
        text = self._run({
            **self._special_tokens,
            "messages": plain,
            "tools": None if tools is None else _plain(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        })  # fmt: skip
        return _cut_at_mark(text) if continue_final_message else text

    def _run(self, variables: dict[str, Any]) -> str:
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate({**variables, BUDGET: Budget()}):
                num_chars += len(piece)
                if num_chars > MAX_CHARS:
                    raise _refused(f"it writes more than {MAX_CHARS} characters")
                pieces.append(piece)
        except InvalidArgumentError:
            raise
        except Exception as error:  # a template can raise anything: None + str, 1 / 0, endless recursion
            raise _refused(str(error) or type(error).__name__) from None
        return "".join(pieces)


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not messages:
        raise InvalidArgumentError("MESSAGES_EMPTY", "messages must not be empty", field="messages")
    for index, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise InvalidArgumentError(
                "ROLE_UNKNOWN", f"messages[{index}]: role {message.get('role')!r:.80} is not one of {', '.join(ROLES)}",
                field=f"messages[{index}].role",
            )  # fmt: skip
    return [_plain(message) for message in messages]


def _plain(value: Any) -> Any:
    """A deep copy made of JSON's own types: templates see no other objects, and cannot change the caller's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise _refused(f"a {type(value).__name__} is not a JSON value")


def _cut_at_mark(text: str) -> str:
    """The text up to the end of the open message, without the spaces there if the template strips messages."""
    place = text.rfind(_END_MARK.strip())
    if place < 0:
        raise _refused("it leaves the last message out or changes it, so that it cannot be continued")
    return text[:place] if text.startswith(_END_MARK, place) else text[:place].rstrip()


def _refused(fault: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "CHAT_TEMPLATE_REFUSED", f"the model's chat template refused the messages: {fault:.500}", field="messages"
    )
