"""Chat templates: Jinja as transformers renders them, in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stageline.errors import CheckpointError, InvalidArgumentError

ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str) -> None:
        """Raises CheckpointError where the template does not compile."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                "CHAT_TEMPLATE_INVALID", f"the model's chat template does not compile: {error}"
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt. Raises InvalidArgumentError for no messages, an unknown role, or what the template refuses."""
        if not messages:
            raise InvalidArgumentError("MESSAGES_EMPTY", "messages must not be empty", field="messages")
        for index, message in enumerate(messages):
            if message.get("role") not in ROLES:
                raise InvalidArgumentError(
                    "ROLE_UNKNOWN", f"messages[{index}]: role {message.get('role')!r} is not one of {', '.join(ROLES)}",
                    field=f"messages[{index}].role",
                )  # fmt: skip
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, SecurityError, TypeError, OverflowError) as error:
            raise InvalidArgumentError(
                "CHAT_TEMPLATE_REFUSED", f"the model's chat template refused the messages: {error}", field="messages"
            ) from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
