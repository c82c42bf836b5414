"""What moves between the doors, the engine and the scheduler. Plain data, no effects."""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.grammar import CompiledGrammar
    from gateway.tracing.work import RequestWork

MAX_PRIORITY = 100
"""Of a request, either way."""


def to_float32(number: float) -> float:
    """The nearest float32; infinite beyond the largest, 0 below the smallest."""
    return ctypes.c_float(number).value


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen; already validated and completed from the model's defaults.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 keep every token. `seed` is always set: drawn at the
    door where the client gave none. `eos_token_ids` is empty with ignore_eos. The real numbers are float32 values, as
    they travel to the last stage: both sides of a cut see the same boundary.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    include_stop_string: bool = False
    num_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in (
            "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"
        ):  # fmt: skip
            object.__setattr__(self, name, to_float32(getattr(self, name)))

    def has_penalties(self) -> bool:
        """Whether the last stage must keep the sequence's history."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One request, after its door: tokenized, validated, with limits known.

    `resume_token_ids` were generated before for `first_choice` (num_choices is 1 then): they count as generated, are
    not sent again, and the answer goes on after them. `deadline_s` is on the `time.monotonic` clock. Tenants share the
    pipelines fairly; prefixes are shared in the cache only within one `tenant` and `cache_salt`. `grammar` is what every
    choice must follow.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int = 1
    first_choice: int = 0
    resume_token_ids: tuple[int, ...] = ()
    priority: int = 0
    deadline_s: float | None = None
    tenant: str = ""
    use_prefix_cache: bool = True
    cache_salt: str = ""
    grammar: CompiledGrammar | None = None
    num_prompt_logprobs: int | None = None
    """Score the prompt, with this many alternatives a token; `sampling.max_tokens` may then be 0. None: don't."""
    work: RequestWork | None = field(default=None, compare=False, repr=False)
    """Where the engine puts down what was done for the request; None: it is not traced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Score every continuation of one context, each by itself: none sees another. None of them is empty.

    `num_logprobs` alternatives come with each token. The other fields are as in GenerateRequest.
    """

    request_id: str
    context_token_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    num_logprobs: int = 0
    priority: int = 0
    deadline_s: float | None = None
    tenant: str = ""
    use_prefix_cache: bool = True
    cache_salt: str = ""
    work: RequestWork | None = field(default=None, compare=False, repr=False)


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities of one token, by the model's own distribution.

    `top` holds (token id, log-probability), descending, `num_logprobs` of them. `rank`: 1 + the number of tokens that are
    more probable; 0 for generated tokens, whose rank is not computed.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What is new of one tool call: `index` counts the calls of a choice; the first delta of a call has id and name.

    `arguments` is JSON text as the model wrote it, piece by piece.
    """

    index: int
    arguments: str
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    """What is new of one choice. The last delta of a choice has `finish_reason`.

    `text` may lag behind `token_ids`: half characters and possible beginnings of stop strings are held back.
    `cached_prompt_tokens`: tokens of the prompt that came from the prefix cache; the same in every delta of a choice.
    `prompt_logprobs`: where asked, in the first delta of the first choice: one entry for each token of the prompt but the
    first, which nothing comes before.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str = ""
    cached_prompt_tokens: int = 0
    tool_calls: tuple[ToolCallDelta, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuationScore:
    """Log-probabilities of every token of one continuation; `index` is its place in the ScoreRequest."""

    index: int
    logprobs: tuple[TokenLogprobs, ...]
    cached_context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One stage process, as `stageline status` shows it. `state`: unbound, loading, spare, claimed, connected, draining or lost."""

    pid: int
    node: str
    address: str
    state: str
    layers: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStatus:
    """One pipeline. `state`: forming, ready, stalled (no step comes back), recovering or
    draining. `stages[i]` is the replica of stage i. Preemptions
    and recoveries count since the pipeline was first formed."""

    id: str
    epoch: int
    state: str
    stages: tuple[ReplicaStatus, ...]
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_running_sequences: int = 0
    num_waiting_sequences: int = 0
    num_waiting_tokens: int = 0
    num_preemptions: int = 0
    num_recoveries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the doors need to know of the model served."""

    name: str
    fingerprint: str
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    generation_defaults: dict[str, object] = field(default_factory=dict)
