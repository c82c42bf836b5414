"""What request bodies of the OpenAI API share, with the extra sampling fields that vLLM users send. Types, no rules.

A parameter is served, or known and refused by name unless it asks for nothing (its no-op value), or unknown and refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway.api.raw import Prompt, RawRequest
from stageline.errors import InvalidArgumentError, UnimplementedError

NoOps = Mapping[str, tuple[Any, ...]]  # parameter that is not served → values that ask for nothing, beside null

NO_OPS: NoOps = {
    "add_special_tokens": (False,),
    "bad_words": ([],),
    "cache_salt": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "metadata": ({},),
    "priority": (0,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


class Body(BaseModel):
    """A JSON object without surprises: no coercion, no unknown fields; null is "not given"."""

    model_config = ConfigDict(extra="forbid", strict=True)
    no_ops: ClassVar[NoOps] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in cls.no_ops.keys() & data.keys():
            value = data[name]
            if value is not None and not any(_same(value, idle) for idle in cls.no_ops[name]):
                raise UnimplementedError("PARAMETER_NOT_SERVED", f"{name} is not served yet; leave it out", field=name)
        return {name: value for name, value in data.items() if name not in cls.no_ops}


class StreamOptions(Body):
    """What a stream carries besides choices."""

    no_ops: ClassVar[NoOps] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
    include_usage: bool | None = None


class GenerationBody(Body):
    """What both endpoints take."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], float] | None = None
    seed: int | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def check(self) -> None:
        """Raises InvalidArgumentError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise InvalidArgumentError(
                "STREAM_OPTIONS_WITHOUT_STREAM", "stream_options needs stream: true", field="stream_options"
            )

    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def make_raw(self, prompt: Prompt, request_id: str, deadline_s: float | None, **fields: Any) -> RawRequest:
        """The fields of this class, and `fields` of the endpoint's own."""
        return RawRequest(
            prompt=prompt,
            model=self.model,
            request_id=request_id,
            deadline_s=deadline_s,
            num_choices=self.n,
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
            **fields,
        )


def _same(value: object, idle: object) -> bool:
    # In Python 0 == False and 1 == True; in JSON a number is no boolean.
    return value == idle and isinstance(value, bool) == isinstance(idle, bool)
