"""InferenceService over a Frontend. Methods raise typed errors; `interceptor.TypedErrors` turns them into statuses."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from gateway.access import visit as visits
from gateway.api.aside import aside
from gateway.api.checks import fail
from gateway.api.grpc import convert, score
from gateway.api.service import Frontend
from gateway.api.validate import end_token_ids
from stageline.errors import InvalidArgumentError
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc
from stageline.inference.v1 import scoring_pb2


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """See inference_service.proto for what each method promises."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """A whole answer."""
        frontend = self._frontend
        accepted = await frontend.accept(convert.raw_request(request.generation, _deadline_s(context)))
        answer = await frontend.collect(accepted)
        response = pb.GenerateResponse(
            start=convert.start(accepted, frontend.model),
            usage=convert.usage(accepted, answer.completion_tokens, answer.cached_prompt_tokens),
        )
        for choice in answer.choices:
            convert.add_delta(response.choices, choice, frontend.tokenizer)
        return response

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        """One `start` as soon as the request is accepted, deltas, one `usage`."""
        frontend = self._frontend
        raw = convert.raw_request(request.generation, _deadline_s(context))
        if raw.best_of is not None and raw.best_of > (raw.num_choices or 1):
            fail(raw, "best_of", "BEST_OF_STREAMED", "over num_choices cannot be streamed; use Generate")
        accepted = await frontend.accept(raw)
        yield pb.StreamGenerateResponse(start=convert.start(accepted, frontend.model))
        completion_tokens, cached_tokens = 0, len(accepted.request.prompt_token_ids)
        async with aclosing(frontend.stream(accepted)) as deltas:
            async for delta in deltas:
                completion_tokens += len(delta.token_ids)
                cached_tokens = min(cached_tokens, delta.cached_prompt_tokens)
                response = pb.StreamGenerateResponse()
                convert.add_delta(response.choices, delta, frontend.tokenizer)
                yield response
        yield pb.StreamGenerateResponse(usage=convert.usage(accepted, completion_tokens, cached_tokens))

    async def Score(self, request: scoring_pb2.ScoreRequest, context: Any) -> scoring_pb2.ScoreResponse:
        """Log-probabilities of continuations."""
        frontend = self._frontend
        scored = await frontend.score(score.raw_score(request, _deadline_s(context)))
        return score.score_response(scored, request.num_logprobs, frontend.model, frontend.tokenizer)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Token ids of text or of a rendered conversation."""
        prompt = convert.prompt_of(request)
        if prompt is None:
            raise InvalidArgumentError("PROMPT_MISSING", "prompt is required: text or a conversation", field="prompt")
        token_ids, text = await self._frontend.encode(prompt)
        token_bytes = self._frontend.tokenizer.token_bytes

        def answer() -> pb.TokenizeResponse:
            pieces = map(token_bytes, token_ids) if request.return_token_bytes else ()
            return pb.TokenizeResponse(token_ids=token_ids, text=text, token_bytes=pieces)

        return await aside(answer, len(token_ids))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """Text of token ids."""
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await self._frontend.decode(tuple(request.token_ids), skip_special_tokens=skip, field="token_ids")
        return pb.DetokenizeResponse(text=text)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """The model, and for operators what serves it."""
        model, engine = self._frontend.model, self._frontend.engine
        visit = visits.current.get()
        operator = visit is None or visit.operator
        template, tokenizer = self._frontend.chat_template, self._frontend.tokenizer
        return pb.GetModelResponse(
            name=model.name,
            fingerprint=model.fingerprint,
            max_context_tokens=model.max_context_tokens,
            vocab_size=model.vocab_size,
            has_chat_template=template is not None,
            chat_template=tokenizer.chat_template or "",
            special_tokens=tokenizer.special_tokens,
            takes_tools=template is not None and template.takes_tools,
            pipelines=convert.pipelines(engine.pipelines()) if operator else (),
            spares=[convert.replica(status) for status in engine.spares()] if operator else (),
            eos_token_ids=end_token_ids(model),
        )


def _deadline_s(context: Any) -> float | None:
    """The call's deadline on the time.monotonic clock."""
    left_s = context.time_remaining()
    return None if left_s is None else time.monotonic() + left_s
