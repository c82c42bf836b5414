"""An engine in memory, a byte-level tokenizer and both doors on loopback ports, for tests of the doors alone."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import uvicorn
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from gateway.access import Doorkeeper
from gateway.api.grpc.server import serve_grpc
from gateway.api.http.app import create_http_app
from gateway.api.service import Frontend
from gateway.metrics import Metrics
from gateway.tokenizer import ChatTemplate, Tokenizer, load_tokenizer
from gateway.types import (
    ChoiceDelta,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    PipelineStatus,
    ReplicaStatus,
    TokenLogprobs,
)
from stageline.errors import DeadlineExceededError, StagelineError

TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MODEL = ModelInfo(name="tiny", fingerprint="f00d", max_context_tokens=512, vocab_size=260, eos_token_ids=(257,))
STAGE = ReplicaStatus(pid=7, node="n0", address="127.0.0.1:1", state="connected", layers="0-2")


def byte_tokenizer() -> Tokenizer:
    """Ids 0-255 are the bytes (in the order of GPT-2's alphabet), 256 and 257 the chat tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    with tempfile.TemporaryDirectory() as folder:
        backend.save(str(Path(folder) / "tokenizer.json"))
        return load_tokenizer(Path(folder))


@dataclass
class FakeEngine:
    """Says `answer` again and again, a token at a time; notes every request and every one that was closed early."""

    tokenizer: Tokenizer
    answer: str = "hé llo"
    token_s: float = 0.0
    cached_prompt_tokens: tuple[int, ...] = (0, 0)  # by choice
    fail_after: int | None = None
    failure: Exception | None = None
    full: StagelineError | None = None
    finish_reason: FinishReason = FinishReason.LENGTH
    logprobs: tuple[float, ...] = (-0.5,)  # of every token, by choice
    is_ready: bool = True
    metrics: Metrics = field(default_factory=lambda: Metrics("tiny", lambda: ()))
    requests: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def ready(self) -> bool:
        return self.is_ready

    def pipelines(self) -> tuple[PipelineStatus, ...]:
        return (PipelineStatus(id="0", epoch=3, state="ready", stages=(STAGE, STAGE), num_blocks=9),)

    def check_room(self) -> None:
        if self.full is not None:
            raise self.full

    def spares(self) -> tuple[ReplicaStatus, ...]:
        return (STAGE,)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[ChoiceDelta]:
        self.requests.append(request)
        finished = False
        try:
            for place in range(len(request.resume_token_ids), request.sampling.max_tokens):
                await self._wait(request)
                if self.fail_after == place:
                    raise self.failure
                for choice in range(request.num_choices):
                    yield self._delta(request, choice, place)
            finished = True
        except Exception:
            finished = True
            raise
        finally:
            if not finished:
                self.cancelled.append(request.request_id)

    def _delta(self, request: GenerateRequest, choice: int, place: int) -> ChoiceDelta:
        ids = self.tokenizer.encode(self.answer)
        last = place + 1 == request.sampling.max_tokens
        # Text as a detokenizer gives it: a character comes with its last byte.
        done = [
            self.tokenizer.decode([ids[i % len(ids)] for i in range(n)]).rstrip("\ufffd") for n in (place, place + 1)
        ]
        count = request.sampling.num_logprobs
        top = tuple((token, -1.0 - token) for token in range(count or 0))
        token = ids[place % len(ids)]
        return ChoiceDelta(
            index=request.first_choice + choice,
            text=done[1][len(done[0]) :],
            token_ids=(token,),
            logprobs=() if count is None else (TokenLogprobs(token, self.logprobs[choice % len(self.logprobs)], top),),
            finish_reason=self.finish_reason if last else None,
            cached_prompt_tokens=self.cached_prompt_tokens[choice % len(self.cached_prompt_tokens)],
        )

    async def _wait(self, request: GenerateRequest) -> None:
        await asyncio.sleep(self.token_s)
        if request.deadline_s is not None and time.monotonic() > request.deadline_s:
            raise DeadlineExceededError("DEADLINE_EXCEEDED", "the request's deadline passed before it ended")


class Doors:
    """A Frontend over a FakeEngine with both doors open."""

    def __init__(
        self, *, template: str | None = TEMPLATE, model: ModelInfo = MODEL, doorkeeper: Doorkeeper | None = None
    ) -> None:
        self.tokenizer = byte_tokenizer()
        self.engine = FakeEngine(self.tokenizer)
        self.frontend = Frontend(
            self.engine, self.tokenizer, None if template is None else ChatTemplate(template), model, doorkeeper
        )
        self.http = self.grpc = ""

    def says(self, answer: str) -> int:
        """Let the engine say this and stop of itself; returns the max_tokens that makes it so."""
        self.engine.answer, self.engine.finish_reason = answer, FinishReason.STOP
        return len(self.tokenizer.encode(answer))

    async def until_cancelled(self, count: int = 1) -> None:
        """Fails unless the engine sees `count` closed requests soon."""
        await until(lambda: len(self.engine.cancelled) >= count)


async def until(condition: Callable[[], bool]) -> None:
    """Poll; raises TimeoutError after 5 s."""
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def open_doors(doors: Doors, **options) -> AsyncIterator[Doors]:
    """Serve on loopback ports until the block ends; `options` are serve_grpc's."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_http_app(lambda: doors.frontend, batches_getter=lambda: options.get("batches"))
    config = uvicorn.Config(app, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    grpc_server = await serve_grpc(doors.frontend, "127.0.0.1", 0, **options)
    doors.http = f"http://127.0.0.1:{listener.getsockname()[1]}"
    doors.grpc = f"127.0.0.1:{grpc_server.port}"
    try:
        yield doors
    finally:
        await grpc_server.stop(0)
        server.should_exit = True
        await task
        listener.close()


def failing(error: StagelineError | Exception, after: int):
    """A change to an engine: fail before token `after`."""

    def apply(engine: FakeEngine) -> None:
        engine.failure, engine.fail_after = error, after

    return apply
