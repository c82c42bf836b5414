"""The body of /v1/completions."""

from __future__ import annotations

from typing import Annotated, ClassVar

from gateway.api.checks import draw_seed
from gateway.api.http.body import NoOps
from gateway.api.http.schema import NAMES, NO_OPS, GenerationBody, says
from gateway.api.raw import Prompt, RawRequest, TextPrompt, TokenPrompt
from gateway.api.validate import MAX_CHOICES, MAX_LOGPROBS
from stageline.errors import InvalidArgumentError

MAX_PROMPTS = 128
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    no_ops: ClassVar[NoOps] = {**NO_OPS, "suffix": ("",)}
    prompt: Annotated[str | list[int] | list[str] | list[list[int]], says(minLength=1, minItems=1)]
    logprobs: Annotated[int | None, says(minimum=0, maximum=MAX_LOGPROBS)] = None
    echo: bool | None = None
    best_of: Annotated[int | None, says(minimum=1, maximum=MAX_CHOICES)] = None

    def check(self) -> None:
        """See GenerationBody."""
        super().check()
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise InvalidArgumentError(
                "BEST_OF_STREAMED", "best_of over n cannot be streamed: which choices are best is known at the end",
                field="best_of",
            )  # fmt: skip

    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to compute for each token of the prompt: what vLLM's parameter asks for, and OpenAI's echo."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in asked if number is not None), default=None)

    def raw_requests(self, request_id: str, deadline_s: float | None) -> list[RawRequest]:
        """One for each prompt. The one at place i uses `seed` + i, so that equal prompts get answers of their own.

        Raises InvalidArgumentError for no prompt or too many.
        """
        prompts = self._prompts()
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise InvalidArgumentError(
                "PROMPT_COUNT_OUT_OF_RANGE", f"prompt holds {len(prompts)} prompts, expected 1 to {MAX_PROMPTS}",
                field="prompt", count=len(prompts), limit=MAX_PROMPTS,
            )  # fmt: skip
        seed = draw_seed() if self.seed is None else self.seed
        return [
            self.make_raw(
                prompt,
                request_id if len(prompts) == 1 else f"{request_id}-{place}",
                deadline_s,
                operation="text_completion",
                seed=seed if seed < 0 else seed + place,
                max_tokens=self.max_tokens,
                default_max_tokens=COMPLETION_MAX_TOKENS,
                num_logprobs=self.logprobs,
                num_prompt_logprobs=self.num_prompt_logprobs(),
                best_of=self.best_of,
                echo=bool(self.echo),
                names={
                    **NAMES,
                    "num_logprobs": "logprobs",
                    "num_prompt_logprobs": "logprobs" if self.prompt_logprobs is None else "prompt_logprobs",
                },
            )
            for place, prompt in enumerate(prompts)
        ]

    def _prompts(self) -> list[Prompt]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [TextPrompt(prompt)]
        if prompt and isinstance(prompt[0], int):
            return [TokenPrompt(prompt)]
        return [TextPrompt(one) if isinstance(one, str) else TokenPrompt(one) for one in prompt]  # type: ignore[arg-type]
