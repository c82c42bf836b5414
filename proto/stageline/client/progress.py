"""What of a stream has arrived, and the requests that continue it. Pure."""

from __future__ import annotations

from stageline.errors import InternalError
from stageline.inference.v1 import generation_pb2 as pb
from stageline.inference.v1 import inference_service_pb2 as service


class Progress:
    """The tokens received of each choice of one generation.

    A delta carries tokens and the text that they completed in one message, so a token received says exactly which text
    was: the server replays the resumed tokens and sends only what comes after.
    """

    def __init__(self, generation: pb.Generation) -> None:
        self._generation = pb.Generation()
        self._generation.CopyFrom(generation)  # the caller may change theirs meanwhile
        num_choices = generation.num_choices if generation.HasField("num_choices") else 1
        resumed = generation.resume if generation.HasField("resume") else None
        first = 0 if resumed is None else resumed.choice_index
        tokens = [] if resumed is None else list(resumed.token_ids)
        self._token_ids: dict[int, list[int]] = {first + i: list(tokens) for i in range(num_choices)}
        self._unfinished = set(self._token_ids)
        self._usage = pb.Usage()
        self.start: pb.GenerationStart | None = None

    @property
    def num_unfinished(self) -> int:
        """Choices without a finish reason."""
        return len(self._unfinished)

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return not self._unfinished

    def receive(self, message: service.StreamGenerateResponse) -> service.StreamGenerateResponse | None:
        """Count a message in; what the caller is to see of it, None for nothing: not the `start` of a resumed stream, and
        not the `usage` of any, for which `last` stands. Raises as `begin` and `take` do."""
        if message.HasField("usage"):
            self._usage.CopyFrom(message.usage)
            message.ClearField("usage")
        if message.HasField("start") and not self.begin(message.start):
            message.ClearField("start")
        for delta in message.choices:
            self.take(delta)
        return message if message.choices or message.HasField("start") else None

    def last(self) -> service.StreamGenerateResponse:
        """The message that ends an undisturbed stream."""
        return service.StreamGenerateResponse(usage=self.usage())

    def begin(self, start: pb.GenerationStart) -> bool:
        """Take a `start`; true for the first. Raises InternalError where a resumed one is of another prompt or seed."""
        if self.start is None:
            self.start = pb.GenerationStart()
            self.start.CopyFrom(start)  # the message goes to the caller
            return True
        for name in ("model_fingerprint", "seed", "prompt_tokens"):
            before, now = getattr(self.start, name), getattr(start, name)
            if before != now:
                raise InternalError(
                    "RESUME_MISMATCH",
                    f"{name} of the resumed stream is {now}, it was {before}; begin again",
                    field=name, value=now, expected=before,
                )  # fmt: skip
        return False

    def take(self, delta: pb.ChoiceDelta) -> None:
        """Count a delta in. Raises InternalError for one of a choice that is unknown or has ended."""
        if delta.index not in self._unfinished:
            raise InternalError(
                "UNEXPECTED_DELTA", f"choice {delta.index} is unknown or has ended", choice_index=delta.index
            )
        self._token_ids[delta.index].extend(delta.token_ids)
        if delta.finish_reason:
            self._unfinished.discard(delta.index)

    def requests(self) -> list[pb.Generation]:
        """What to ask for next: the generation itself before its `start`, then one resume for each unfinished choice."""
        if self.start is None:
            return [self._copy()]
        requests = []
        for index in sorted(self._unfinished):
            request = self._copy()
            request.ClearField("num_choices")  # a resume continues exactly one
            if self._token_ids[index] and request.HasField(
                "output"
            ):  # the first delta, with the prompt's scores, is here
                request.output.ClearField("num_prompt_logprobs")
            request.request_id = self.start.request_id
            request.resume.CopyFrom(
                pb.Resume(
                    token_ids=self._token_ids[index],
                    model_fingerprint=self.start.model_fingerprint,
                    seed=self.start.seed,
                    choice_index=index,
                )
            )
            requests.append(request)
        return requests

    def usage(self) -> pb.Usage:
        """As if undisturbed, whether or not a `usage` arrived. `cached_prompt_tokens` is what the last one said, 0 without:
        it tells of one gateway's cache, which no other gateway knows. Zeros before `start`."""
        return pb.Usage(
            prompt_tokens=0 if self.start is None else self.start.prompt_tokens,
            completion_tokens=sum(map(len, self._token_ids.values())),
            cached_prompt_tokens=self._usage.cached_prompt_tokens,
        )

    def _copy(self) -> pb.Generation:
        copy = pb.Generation()
        copy.CopyFrom(self._generation)
        return copy


def is_ranked(generation: pb.Generation) -> bool:
    """Whether the best of more choices than come back are asked for: they are known at the end only, no stream has them."""
    num_choices = generation.num_choices if generation.HasField("num_choices") else 1
    return generation.HasField("best_of") and generation.best_of > num_choices
