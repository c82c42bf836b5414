"""Between protobuf messages and the gateway's own types. No rules here: those are in gateway.api.validate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from gateway.api import request_id
from gateway.api.grpc.conversation import chat_prompt
from gateway.api.raw import Prompt, RawRequest, RawResume, TextPrompt, TokenPrompt
from gateway.api.service import Accepted
from gateway.grammar import Constraint
from gateway.tokenizer import Tokenizer
from gateway.types import ChoiceDelta, FinishReason, ModelInfo, PipelineStatus, ReplicaStatus, TokenLogprobs
from stageline.errors import InvalidArgumentError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb

# Our field → the path a client of the protocol knows.
NAMES = {
    **{
        name: f"generation.{name}"
        for name in ("model", "prompt", "request_id", "num_choices", "priority", "best_of", "cache_salt")
    },
    **{name: f"generation.conversation.{name}" for name in ("tools", "tool_choice")},
    "echo": "generation.output.echo_prompt",
    **{f"resume.{name}": f"generation.resume.{name}" for name in RawResume.__dataclass_fields__},
    **{name: f"generation.sampling.{name}" for name in gen.SamplingParams.DESCRIPTOR.fields_by_name},
    **{name: f"generation.stop.{name}" for name in gen.StopConditions.DESCRIPTOR.fields_by_name},
    **{name: f"generation.output.{name}" for name in gen.OutputOptions.DESCRIPTOR.fields_by_name},
}
_FINISH = {
    FinishReason.STOP: gen.FINISH_REASON_STOP,
    FinishReason.LENGTH: gen.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: gen.FINISH_REASON_TOOL_CALLS,
}


def raw_request(generation: gen.Generation, deadline_s: float | None) -> RawRequest:
    """A Generation as it was sent; fields that were not set are None."""
    sampling, stop, output = generation.sampling, generation.stop, generation.output
    resume = generation.resume if generation.HasField("resume") else None
    return RawRequest(
        prompt=prompt_of(generation),
        model=generation.model or None,
        request_id=generation.request_id or request_id.current.get(),
        num_choices=_optional(generation, "num_choices"),
        priority=generation.priority,
        best_of=_optional(generation, "best_of"),
        constraint=constraint_of(generation.constraint) if generation.HasField("constraint") else None,
        echo=output.echo_prompt,
        deadline_s=deadline_s,
        resume=resume
        and RawResume(
            token_ids=tuple(resume.token_ids),
            model_fingerprint=resume.model_fingerprint,
            seed=resume.seed,
            choice_index=resume.choice_index,
        ),
        temperature=_optional(sampling, "temperature"),
        top_p=_optional(sampling, "top_p"),
        top_k=_optional(sampling, "top_k"),
        min_p=_optional(sampling, "min_p"),
        repetition_penalty=_optional(sampling, "repetition_penalty"),
        frequency_penalty=_optional(sampling, "frequency_penalty"),
        presence_penalty=_optional(sampling, "presence_penalty"),
        logit_bias=dict(sampling.logit_bias),
        seed=_optional(sampling, "seed"),
        max_tokens=_optional(stop, "max_tokens"),
        min_tokens=_optional(stop, "min_tokens"),
        stop_strings=tuple(stop.stop_strings),
        stop_token_ids=tuple(stop.stop_token_ids),
        ignore_eos=_optional(stop, "ignore_eos"),
        include_stop_string=_optional(stop, "include_stop_string"),
        num_logprobs=_optional(output, "num_logprobs"),
        num_prompt_logprobs=_optional(output, "num_prompt_logprobs"),
        skip_special_tokens=_optional(output, "skip_special_tokens"),
        cache_salt=generation.cache_salt or None,
        names=NAMES,
    )


def prompt_of(message: gen.Generation | pb.TokenizeRequest) -> Prompt | None:
    """The prompt of a message, None where none is set."""
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return TextPrompt(message.text)
    if kind == "conversation":
        path = "generation.conversation" if isinstance(message, gen.Generation) else "conversation"
        return chat_prompt(message.conversation, path)
    if kind == "token_ids":
        assert isinstance(message, gen.Generation)
        return TokenPrompt(tuple(message.token_ids.ids))
    return None


def constraint_of(message: gen.Constraint) -> Constraint:
    """Raises InvalidArgumentError where no form is set."""
    form = message.WhichOneof("form")
    field = f"generation.constraint.{form}"
    if form == "json_schema":
        return Constraint("json_schema", message.json_schema, field)
    if form == "json_object" and message.json_object:
        return Constraint.json_object(field)
    if form == "regex":
        return Constraint("regex", message.regex, field)
    if form == "grammar":
        return Constraint("grammar", message.grammar, field)
    if form == "choice":
        return Constraint.choice(list(message.choice.texts), field)
    raise InvalidArgumentError(
        "CONSTRAINT_MISSING",
        "generation.constraint needs a form; json_object must be true",
        field="generation.constraint",
    )


def start(accepted: Accepted, model: ModelInfo) -> gen.GenerationStart:
    """What identifies an answer."""
    return gen.GenerationStart(
        request_id=accepted.request.request_id,
        model=model.name,
        model_fingerprint=model.fingerprint,
        seed=accepted.request.sampling.seed,
        prompt_tokens=len(accepted.request.prompt_token_ids),
        created_s=accepted.created_s,
    )


def add_delta(
    choices: RepeatedCompositeFieldContainer[gen.ChoiceDelta], delta: ChoiceDelta, tokenizer: Tokenizer
) -> None:
    """Append a delta, with the bytes of the tokens beside their log-probabilities. Most have nothing but an index, a text and a
    token, and a server sends as many as tokens: what a delta does not have is not touched."""
    message = choices.add(index=delta.index, text=delta.text, token_ids=delta.token_ids)
    if delta.logprobs:
        message.logprobs.extend(token_logprobs(entry, tokenizer) for entry in delta.logprobs)
    if delta.prompt_logprobs:
        message.prompt_logprobs.extend(token_logprobs(entry, tokenizer) for entry in delta.prompt_logprobs)
    for call in delta.tool_calls:
        message.tool_calls.add(index=call.index, id=call.id, name=call.name, arguments=call.arguments)
    if delta.finish_reason is not None:
        message.finish_reason = _FINISH[delta.finish_reason]
        message.matched_stop = delta.matched_stop


def usage(accepted: Accepted, completion_tokens: int, cached_prompt_tokens: int) -> gen.Usage:
    """The count of an answer's tokens; those that a resume brought along were generated too. Of the prompt's, those count
    as cached that no choice had to compute."""
    return gen.Usage(
        prompt_tokens=len(accepted.request.prompt_token_ids),
        completion_tokens=completion_tokens + len(accepted.request.resume_token_ids),
        cached_prompt_tokens=cached_prompt_tokens,
    )


def pipelines(statuses: Iterable[PipelineStatus]) -> list[pb.PipelineStatus]:
    """For GetModel."""
    return [
        pb.PipelineStatus(
            id=status.id,
            epoch=status.epoch,
            state=status.state,
            stages=[
                pb.StageStatus(index=index, layers=stage.layers, replicas=[replica(stage)])
                for index, stage in enumerate(status.stages)
            ],
            num_blocks=status.num_blocks,
            num_free_blocks=status.num_free_blocks,
            num_running_sequences=status.num_running_sequences,
            num_waiting_sequences=status.num_waiting_sequences,
        )
        for status in statuses
    ]


def replica(status: ReplicaStatus) -> pb.StageReplicaStatus:
    """One process."""
    return pb.StageReplicaStatus(
        pid=status.pid, node=status.node, address=status.address, state=status.state, layers=status.layers
    )


def token_logprobs(entry: TokenLogprobs, tokenizer: Tokenizer) -> gen.TokenLogprobs:
    """One token, with the bytes of it and of its alternatives."""

    def one(token_id: int, logprob: float) -> gen.TokenLogprob:
        return gen.TokenLogprob(token_id=token_id, logprob=logprob, token=tokenizer.token_bytes(token_id))

    return gen.TokenLogprobs(
        chosen=one(entry.token_id, entry.logprob), top=[one(*pair) for pair in entry.top], rank=entry.rank
    )


def _optional(message: Any, field: str) -> Any:
    return getattr(message, field) if message.HasField(field) else None
