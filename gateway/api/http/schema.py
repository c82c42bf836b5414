"""What request bodies of the OpenAI API share, with the extra sampling fields that vLLM users send. Types, no rules.

A parameter is served, or known and refused by name unless it asks for nothing (its no-op value), or unknown and refused.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from gateway.api.http.body import Body, NoOps
from gateway.api.http.structured import StructuredFields
from gateway.api.raw import Prompt, RawRequest
from gateway.api.validate import (
    MAX_CACHE_SALT_BYTES,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from gateway.types import MAX_PRIORITY
from stageline.errors import InvalidArgumentError

NAMES = {"num_choices": "n", "stop_strings": "stop", "request_id": "x-request-id"}  # ours → the client's
NO_OPS: NoOps = {
    "add_special_tokens": (False, True),  # these tokenizers have none to add
    "bad_words": ([],),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "metadata": ({},),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


def says(**bounds: Any) -> Any:
    """Bounds for the OpenAPI document; gateway.api.validate checks them, for both doors, with our own words."""
    return Field(json_schema_extra=bounds)


class StreamOptions(Body):
    """What a stream carries besides choices."""

    no_ops: ClassVar[NoOps] = {"include_obfuscation": (False,)}
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body, StructuredFields):
    """What both endpoints take."""

    model: str | None = None
    temperature: Annotated[float | None, says(minimum=0)] = None
    top_p: Annotated[float | None, says(exclusiveMinimum=0, maximum=1)] = None
    top_k: Annotated[int | None, says(minimum=-1, maximum=2**31 - 1)] = None
    min_p: Annotated[float | None, says(minimum=0, maximum=1)] = None
    repetition_penalty: Annotated[float | None, says(exclusiveMinimum=0)] = None
    frequency_penalty: Annotated[float | None, says(minimum=-2, maximum=2)] = None
    presence_penalty: Annotated[float | None, says(minimum=-2, maximum=2)] = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], float] | None, says(maxProperties=MAX_LOGIT_BIAS)
    ] = None
    seed: Annotated[int | None, says(minimum=0, maximum=MAX_SEED)] = None
    n: Annotated[int | None, says(minimum=1, maximum=MAX_CHOICES)] = None
    max_tokens: Annotated[int | None, says(minimum=0)] = None  # 0 where the prompt is what is asked about
    min_tokens: Annotated[int | None, says(minimum=0)] = None
    stop: Annotated[str | list[str] | None, says(maxItems=MAX_STOP_STRINGS)] = None
    stop_token_ids: Annotated[list[int] | None, says(maxItems=MAX_STOP_TOKEN_IDS)] = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int | None, says(minimum=-MAX_PRIORITY, maximum=MAX_PRIORITY)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: Annotated[str | None, says(minLength=1, maxLength=MAX_CACHE_SALT_BYTES)] = None
    prompt_logprobs: Annotated[int | None, says(minimum=0, maximum=MAX_LOGPROBS)] = None

    def check(self) -> None:
        """Raises InvalidArgumentError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise InvalidArgumentError(
                "STREAM_OPTIONS_WITHOUT_STREAM", "stream_options needs stream: true", field="stream_options"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidArgumentError(
                "PROMPT_LOGPROBS_STREAMED",
                "prompt_logprobs cannot be streamed; send stream: false (/v1/completions streams them with echo and logprobs)",
                field="prompt_logprobs",
            )

    def usage_chunks(self) -> tuple[bool, bool]:
        """Whether the stream ends with a chunk of usage, and whether every chunk before it counts too."""
        options = self.stream_options or StreamOptions()
        return bool(options.include_usage), bool(options.include_usage and options.continuous_usage_stats)

    def make_raw(self, prompt: Prompt, request_id: str, deadline_s: float | None, **fields: Any) -> RawRequest:
        """The fields of this class, and `fields` of the endpoint's own."""
        return RawRequest(
            prompt=prompt,
            model=self.model,
            request_id=request_id,
            deadline_s=deadline_s,
            num_choices=self.n,
            priority=-(self.priority or 0),  # vLLM's sign: the lower goes first
            constraint=self.constraint(),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's other spelling of "all"
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias={int(token_id): value for token_id, value in (self.logit_bias or {}).items()},
            min_tokens=self.min_tokens,
            stop_strings=[self.stop] if isinstance(self.stop, str) else self.stop or (),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
            include_stop_string=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            cache_salt=self.cache_salt,
            **fields,
        )
