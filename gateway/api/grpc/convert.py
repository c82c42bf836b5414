"""Between the messages of inference.v1 and the gateway's own types."""

from __future__ import annotations

import time
from typing import Any

from gateway.api.service import Frontend
from gateway.api.validate import RawParams
from gateway.types import ChoiceDelta, FinishReason, GenerateRequest, ReplicaStatus, TokenLogprobs
from stageline.errors import FailedPreconditionError, InvalidArgumentError, UnimplementedError
from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb

_FINISH = {FinishReason.STOP: gen.FINISH_REASON_STOP, FinishReason.LENGTH: gen.FINISH_REASON_LENGTH}
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "seed",
)  # fmt: skip


def to_request(frontend: Frontend, message: gen.Generation, deadline_s: float | None) -> GenerateRequest:
    """Raises InvalidArgumentError, UnimplementedError, NotFoundError or FailedPreconditionError."""
    frontend.check_model(message.model)
    if message.output.HasField("num_prompt_logprobs"):
        raise UnimplementedError(
            "FIELD_NOT_SERVED", "num_prompt_logprobs is not served yet", field="num_prompt_logprobs"
        )
    if message.priority:
        raise UnimplementedError("FIELD_NOT_SERVED", "priority other than 0 is not served yet", field="priority")
    raw = RawParams(
        **_given(message.sampling, _SAMPLING),
        logit_bias=dict(message.sampling.logit_bias),
        max_tokens=message.stop.max_tokens if message.stop.HasField("max_tokens") else None,
        min_tokens=message.stop.min_tokens if message.stop.HasField("min_tokens") else None,
        stop_strings=list(message.stop.stop_strings),
        stop_token_ids=list(message.stop.stop_token_ids),
        ignore_eos=message.stop.ignore_eos,
        include_stop_string=message.stop.include_stop_string,
        num_logprobs=message.output.num_logprobs if message.output.HasField("num_logprobs") else None,
        skip_special_tokens=message.output.skip_special_tokens
        if message.output.HasField("skip_special_tokens")
        else True,
    )
    resume = None
    if message.HasField("resume"):
        if message.resume.model_fingerprint != frontend.model.fingerprint:
            raise FailedPreconditionError(
                "FINGERPRINT_DIFFERS",
                f"the answer began on {message.resume.model_fingerprint!r}, this server has {frontend.model.fingerprint!r}",
                fingerprint=frontend.model.fingerprint,
            )
        if message.num_choices > 1:
            raise InvalidArgumentError(
                "RESUME_ONE_CHOICE", "a resume continues one choice: leave num_choices unset", field="num_choices"
            )
        raw.seed = message.resume.seed
        resume = (list(message.resume.token_ids), message.resume.choice_index)
    return frontend.request(
        to_prompt(frontend, message),
        raw,
        num_choices=message.num_choices if message.HasField("num_choices") else 1,
        request_id=message.request_id,
        deadline_s=deadline_s,
        resume=resume,
    )


def to_prompt(frontend: Frontend, message: gen.Generation | pb.TokenizeRequest) -> str | list[int]:
    """Text or ids of a prompt; a conversation is rendered."""
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidArgumentError("PROMPT_EMPTY", "set text, token_ids or conversation", field="prompt")
    if kind == "conversation":
        turns = [{"role": turn.role, "content": turn.content} for turn in message.conversation.messages]
        return frontend.render(turns)
    return message.text if kind == "text" else list(message.token_ids.ids)  # type: ignore[union-attr]


def to_start(frontend: Frontend, request: GenerateRequest) -> gen.GenerationStart:
    """The first message of an answer."""
    return gen.GenerationStart(
        request_id=request.request_id,
        model=frontend.model.name,
        model_fingerprint=frontend.model.fingerprint,
        seed=request.sampling.seed,
        prompt_tokens=len(request.prompt_token_ids),
        created_s=int(time.time()),
    )


def to_delta(frontend: Frontend, delta: ChoiceDelta) -> gen.ChoiceDelta:
    """A delta as a message."""
    return gen.ChoiceDelta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[_logprobs(frontend, entry) for entry in delta.logprobs],
        finish_reason=_FINISH[delta.finish_reason] if delta.finish_reason else gen.FINISH_REASON_UNSPECIFIED,
        matched_stop=delta.matched_stop,
    )


def to_model(frontend: Frontend) -> pb.GetModelResponse:
    """The model and its pipelines."""
    pipelines = [
        pb.PipelineStatus(
            id=p.id,
            epoch=p.epoch,
            state=p.state,
            stages=[
                pb.StageStatus(index=index, layers=stage.layers, replicas=[_replica(stage)])
                for index, stage in enumerate(p.stages)
            ],
            num_blocks=p.num_blocks,
            num_free_blocks=p.num_free_blocks,
            num_running_sequences=p.num_running_sequences,
            num_waiting_sequences=p.num_waiting_sequences,
        )
        for p in frontend.engine.pipelines()
    ]
    return pb.GetModelResponse(
        name=frontend.model.name,
        fingerprint=frontend.model.fingerprint,
        max_context_tokens=frontend.model.max_context_tokens,
        vocab_size=frontend.model.vocab_size,
        has_chat_template=frontend.template is not None,
        pipelines=pipelines,
        spares=[_replica(replica) for replica in frontend.engine.spares()],
        eos_token_ids=frontend.model.eos_token_ids,
    )


def _given(message: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields that are set."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _replica(r: ReplicaStatus) -> pb.StageReplicaStatus:
    return pb.StageReplicaStatus(pid=r.pid, node=r.node, address=r.address, state=r.state, layers=r.layers)


def _logprobs(frontend: Frontend, entry: TokenLogprobs) -> gen.TokenLogprobs:
    def one(token_id: int, logprob: float) -> gen.TokenLogprob:
        return gen.TokenLogprob(token_id=token_id, logprob=logprob, token=frontend.tokenizer.token_bytes(token_id))

    return gen.TokenLogprobs(chosen=one(entry.token_id, entry.logprob), top=[one(*pair) for pair in entry.top])
