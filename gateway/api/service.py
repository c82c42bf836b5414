"""The one generate path behind every door: prompt → token ids → checked request → engine → deltas."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast

from gateway.access import Doorkeeper
from gateway.access import visit as visits
from gateway.api.aside import aside
from gateway.api.checks import check_token_ids
from gateway.api.collect import Answer, collect
from gateway.api.post import PostProcessor
from gateway.api.raw import ChatPrompt, Prompt, RawRequest, TextPrompt, TokenPrompt
from gateway.api.scoring import RawScore, Scored, check_counts, validate_score
from gateway.api.tool_choice import with_tool_choice
from gateway.api.validate import check_served, end_token_ids, validate
from gateway.genai_metrics import RequestTimes
from gateway.grammar import GrammarCompiler
from gateway.metrics import Metrics
from gateway.tokenizer import ChatTemplate, Detokenizer, StopMatcher, Tokenizer
from gateway.tracing import call as calls
from gateway.types import (
    ChoiceDelta,
    ContinuationScore,
    GenerateRequest,
    ModelInfo,
    PipelineStatus,
    ReplicaStatus,
    ScoreRequest,
)
from stageline.errors import FailedPreconditionError
from stageline.operations.v1.operations_service_pb2 import StreamStepsResponse

if TYPE_CHECKING:
    from gateway.tracing.spans import Tracing

logger = logging.getLogger("stageline.gateway.requests")


class EngineLike(Protocol):
    """What the doors need of the engine."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[ChoiceDelta]:
        """An async generator of deltas; closing it cancels the request."""
        ...

    def check_room(self) -> None:
        """Raises what `generate` would raise for any request now: a full queue, a gateway that stops."""
        ...

    def score(self, request: ScoreRequest) -> AsyncIterator[ContinuationScore]:
        """An async generator of scores, as each is done; closing it cancels the request."""
        ...

    def ready(self) -> bool:
        """Whether some pipeline can serve."""
        ...

    def pipelines(self) -> tuple[PipelineStatus, ...]:
        """All pipelines."""
        ...

    def spares(self) -> tuple[ReplicaStatus, ...]:
        """Replicas in no pipeline."""
        ...

    def watch_steps(self) -> AsyncIterator[StreamStepsResponse]:
        """An async generator of the steps that come back from now on."""
        ...

    @property
    def metrics(self) -> Metrics:
        """What Prometheus reads."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A request that passed its door. `created_s`: seconds since the epoch.

    Of `request.num_choices` generated choices `num_returned` come back: the most probable ones. `show_logprobs`: the
    client asked for them. `echo` is put before every choice's text. `parse_tools`: its text may hold tool calls. `operation` is that
    of RawRequest.
    """

    request: GenerateRequest
    created_s: int
    operation: str
    num_returned: int = 1
    show_logprobs: bool = True
    echo: str = ""
    parse_tools: bool = False


@dataclass(slots=True)
class _Seen:
    """What came of a request so far; `first_token_s` on the monotonic clock."""

    num_tokens: int = 0
    first_token_s: float | None = None


class Frontend:
    """Everything a door calls. Lives on the engine's event loop."""

    def __init__(
        self,
        engine: EngineLike,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        model: ModelInfo,
        doorkeeper: Doorkeeper | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Without a `doorkeeper` everybody is one tenant, without `tracing` there are no traces."""
        self.tracing = tracing
        self.doorkeeper = doorkeeper or Doorkeeper()
        self.engine, self.tokenizer, self.chat_template, self.model = engine, tokenizer, chat_template, model
        self.started_s = int(time.time())
        self._grammars = GrammarCompiler(tokenizer, model.vocab_size, end_token_ids(model))

    async def accept(self, raw: RawRequest) -> Accepted:
        """Check, tokenize, put the tenant's name on it, compile the grammar. Raises what `engine.check_room`, `check_served`,
        `with_tool_choice`, `encode`, `validate`, `Visit.admit` and `GrammarCompiler.compile` raise."""
        check_served(raw, self.model)
        self.engine.check_room()  # a request that will be refused costs no more than this
        assert raw.prompt is not None
        raw, parse_tools = with_tool_choice(
            raw, takes_tools=bool(self.chat_template and self.chat_template.takes_tools)
        )
        assert raw.prompt is not None
        token_ids, text = await self.encode(raw.prompt)
        ranked = raw.best_of is not None and raw.best_of > (raw.num_choices or 1)
        show_logprobs = raw.num_logprobs is not None
        request = validate(replace(raw, num_logprobs=0) if ranked and not show_logprobs else raw, token_ids, self.model)
        if (visit := visits.current.get()) is not None:
            request = visit.admit(request)
            if visit.prompts is not None:
                visit.prompts.append(text or self.tokenizer.decode(token_ids, skip_special_tokens=False))
        if raw.constraint is not None:
            request = replace(request, grammar=await self._grammars.compile(raw.constraint))
        if (call := calls.current.get()) is not None:
            request = replace(request, work=call.accepted(request, self.model))
        return Accepted(
            request=request,
            created_s=int(time.time()),
            operation=raw.operation,
            num_returned=(raw.num_choices or 1) if ranked else request.num_choices,
            show_logprobs=show_logprobs,
            # Beside offsets of tokens, the prompt is echoed as the model sees it, which normalization may have changed.
            echo=(
                (text if raw.num_prompt_logprobs is None else "")
                or self.tokenizer.decode(token_ids, skip_special_tokens=False)
            )
            if raw.echo
            else "",
            parse_tools=parse_tools,
        )

    async def encode(self, prompt: Prompt) -> tuple[tuple[int, ...], str]:
        """Token ids and the text they came from ("" for a prompt of ids).

        Raises FailedPreconditionError without a chat template, and InvalidArgumentError for text that is not Unicode,
        an unknown role, or messages that the template refuses.
        """
        if isinstance(prompt, ChatPrompt):
            text = self._render(prompt)
        elif isinstance(prompt, TextPrompt):
            text = prompt.text
        else:
            return tuple(prompt.token_ids), ""
        return await aside(lambda: self.tokenizer.encode(text), len(text)), text

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, field: str) -> str:
        """Text of token ids. Raises InvalidArgumentError that names `field` for an id out of range."""

        def decode() -> str:
            check_token_ids(token_ids, self.model.vocab_size, field)
            return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return await aside(decode, len(token_ids))

    async def stream(self, accepted: Accepted) -> AsyncGenerator[ChoiceDelta]:
        """Deltas as they come. Close it (aclosing) to cancel the request."""
        # The engine returns an async generator; the protocol of two parts says only what both need.
        deltas = cast("AsyncGenerator[ChoiceDelta]", self.engine.generate(accepted.request))
        request = accepted.request
        post = PostProcessor(
            echo=accepted.echo,
            parse_tools=accepted.parse_tools,
            scored_by=None if request.num_prompt_logprobs is None else request.first_choice,
        )
        if request.resume_token_ids:
            post.resume(request.first_choice, self._text_so_far(request))
        visit, call = visits.current.get(), calls.current.get()
        seen, ends, num_prompt = _Seen(), dict[int, ChoiceDelta](), len(request.prompt_token_ids)
        with self._followed(
            request, accepted.operation, num_prompt, seen,
            lambda: f"{num_prompt} prompt tokens, {seen.num_tokens} generated",
        ):  # fmt: skip
            try:
                async with aclosing(deltas):
                    async for delta in deltas:
                        if seen.first_token_s is None and delta.token_ids:
                            seen.first_token_s = time.monotonic()
                        seen.num_tokens += len(delta.token_ids)
                        if visit is not None:
                            visit.charge(len(delta.token_ids))
                        if delta.finish_reason is not None:
                            ends[delta.index] = delta
                        for one in post.apply(delta):
                            yield one
            finally:
                if call is not None:
                    call.generated(
                        seen.num_tokens,
                        min((end.cached_prompt_tokens for end in ends.values()), default=0),
                        [end.finish_reason for end in ends.values() if end.finish_reason is not None],
                    )

    async def collect(self, accepted: Accepted) -> Answer:
        """The whole answer."""
        async with aclosing(self.stream(accepted)) as deltas:
            return await collect(deltas, accepted.num_returned, show_logprobs=accepted.show_logprobs)

    async def score(self, raw: RawScore) -> Scored:
        """Scores of all continuations; cancelling it cancels the request.

        Raises what `check_served`, `check_counts`, `encode`, `validate_score` and the engine raise.
        """
        check_served(raw.generation(), self.model)
        check_counts(raw)
        assert raw.context is not None
        context, _ = await self.encode(raw.context)
        continuations = await self._encode_all([one for one in raw.continuations if one is not None])
        request = validate_score(raw, context, continuations, self.model)
        if (visit := visits.current.get()) is not None:
            request = visit.admit_score(request)
        if (call := calls.current.get()) is not None:
            request = replace(request, work=call.accepted(request, self.model))
        scores = cast("AsyncGenerator[ContinuationScore]", self.engine.score(request))
        found: dict[int, ContinuationScore] = {}
        num_scored = sum(map(len, continuations))
        with self._followed(
            request, "score", len(context) + num_scored, _Seen(),
            lambda: f"{len(context)} context tokens, {len(found)} of {len(continuations)} continuations scored",
        ):  # fmt: skip
            async with aclosing(scores):
                async for score in scores:
                    found[score.index] = score
        return Scored(
            request=request,
            scores=[found[place] for place in range(len(continuations))],
            num_cached_tokens=min(score.cached_context_tokens for score in found.values()),
        )

    @contextmanager
    def _followed(
        self, request: GenerateRequest | ScoreRequest, operation: str, num_input: int, seen: _Seen,
        counts: Callable[[], str],
    ) -> Iterator[None]:  # fmt: skip
        """Around a request's work: its spans, its metrics, and a line in the log about how it ended, with its counts of then."""
        call = calls.current.get()  # now: a generator may be closed in another context
        started_s, outcome, error_type = time.monotonic(), "cancelled", "CANCELLED"
        try:
            yield
            outcome, error_type = "done", ""
        except Exception as error:
            outcome = error_type = getattr(error, "reason", type(error).__name__)
            raise
        finally:
            ended_s = time.monotonic()
            logger.info(
                "request %s: %s, %s in %.3f s", request.request_id, outcome, counts(), ended_s - started_s,
                extra={"request_id": request.request_id},
            )  # fmt: skip
            self.engine.metrics.genai.ended(
                RequestTimes(
                    operation=operation,
                    num_input_tokens=num_input,
                    num_output_tokens=seen.num_tokens,
                    first_token_s=None if seen.first_token_s is None else seen.first_token_s - started_s,
                    duration_s=ended_s - started_s,
                    error=error_type,
                )
            )
            if call is not None and request.work is not None:
                call.worked(request.work, started_s, ended_s)

    async def _encode_all(self, prompts: Sequence[TextPrompt | TokenPrompt]) -> tuple[tuple[int, ...], ...]:
        """Token ids of many texts, each by itself."""

        def encode() -> tuple[tuple[int, ...], ...]:
            return tuple(
                self.tokenizer.encode(one.text) if isinstance(one, TextPrompt) else tuple(one.token_ids)
                for one in prompts
            )

        num_chars = sum(len(one.text) for one in prompts if isinstance(one, TextPrompt))
        return await aside(encode, num_chars)

    def _text_so_far(self, request: GenerateRequest) -> str:
        """What the client has of a resumed choice: what its tokens released, without what a stop string held back."""
        params = request.sampling
        detokenizer = Detokenizer(self.tokenizer, params.skip_special_tokens)
        matcher = StopMatcher(params.stop_strings, params.include_stop_string)
        # A stop string that is complete in it came before min_tokens, or the choice has ended and says no more.
        return "".join(matcher.append(detokenizer.append(i), may_stop=False)[0] for i in request.resume_token_ids)

    def _render(self, prompt: ChatPrompt) -> str:
        if self.chat_template is None:
            raise FailedPreconditionError(
                "NO_CHAT_TEMPLATE",
                f"model {self.model.name!r} has no chat template; send the prompt as text or token ids",
                field="messages", model=self.model.name,
            )  # fmt: skip
        return self.chat_template.render(
            prompt.messages,
            tools=prompt.tools or None,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
        )
