"""What both doors do: prompt to ids, ids to a request, a request to deltas."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from gateway.api.validate import RawParams, check_num_choices, check_prompt, sampling_params
from gateway.tokenizer import ChatTemplate, Tokenizer
from gateway.types import ChoiceDelta, GenerateRequest, ModelInfo, PipelineStatus, ReplicaStatus
from stageline.errors import InvalidArgumentError, NotFoundError

MAX_REQUEST_ID_CHARS = 128


class EngineLike(Protocol):
    """What the doors need of the engine."""

    def ready(self) -> bool:
        """Whether requests are served now."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[ChoiceDelta, None]:
        """Deltas of all choices; closing it cancels."""

    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """For status."""

    def spares(self) -> tuple[ReplicaStatus, ...]:
        """For status."""


class Frontend:
    """One model behind both doors."""

    def __init__(
        self, engine: EngineLike, tokenizer: Tokenizer, template: ChatTemplate | None, model: ModelInfo
    ) -> None:
        self.engine, self.tokenizer, self.template, self.model = engine, tokenizer, template, model

    def check_model(self, name: str | None) -> None:
        """Raise NotFoundError for another model than the one served."""
        if name and name != self.model.name:
            raise NotFoundError(
                "MODEL_NOT_FOUND", f"model {name!r} is not served here; this server has {self.model.name!r}",
                field="model", model=name,
            )  # fmt: skip

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of a conversation. Raises InvalidArgumentError where the model has no chat template."""
        if self.template is None:
            raise InvalidArgumentError(
                "NO_CHAT_TEMPLATE",
                "this model has no chat template (it is a base model): send a plain prompt, or serve an Instruct model",
                field="messages",
            )
        return self.template.render(messages)

    def request(
        self,
        prompt: str | Sequence[int],
        raw: RawParams,
        *,
        num_choices: int = 1,
        request_id: str = "",
        deadline_s: float | None = None,
        default_max_tokens: int | None = None,
        resume: tuple[Sequence[int], int] | None = None,
    ) -> GenerateRequest:
        """A checked request. `resume` is (tokens the client already has, choice index). Raises InvalidArgumentError."""
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        check_prompt(token_ids, self.model)
        if len(request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidArgumentError(
                "REQUEST_ID_TOO_LONG", f"request_id may have {MAX_REQUEST_ID_CHARS} characters, got {len(request_id)}",
                field="request_id",
            )  # fmt: skip
        sampling = sampling_params(raw, self.model, prompt_tokens=len(token_ids), default_max_tokens=default_max_tokens)
        resumed, first_choice = resume or ((), 0)
        if resumed:
            check_prompt(resumed, self.model)
        return GenerateRequest(
            request_id=request_id or f"req-{uuid.uuid4().hex}",
            prompt_token_ids=token_ids,
            sampling=sampling,
            num_choices=check_num_choices(num_choices),
            first_choice=first_choice,
            resume_token_ids=tuple(resumed),
            deadline_s=deadline_s,
        )
