"""What of a stream has arrived, and the requests that continue it. Pure."""

from __future__ import annotations

from stageline.errors import InternalError
from stageline.inference.v1 import generation_pb2 as pb


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
        self.start: pb.GenerationStart | None = None

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return not self._unfinished

    def begin(self, start: pb.GenerationStart) -> bool:
        """Take a `start`; true for the first. Raises InternalError where a resumed one is of another prompt or seed."""
        if self.start is None:
            self.start = start
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

    def usage(self, received: pb.Usage | None = None) -> pb.Usage:
        """As if undisturbed. Zeros before `start`; `received` is the server's own count, which knows of its cache but not of
        what came before a break."""
        usage = pb.Usage() if received is None else received
        prompt_tokens = 0 if self.start is None else self.start.prompt_tokens
        usage.prompt_tokens, usage.completion_tokens = prompt_tokens, sum(map(len, self._token_ids.values()))
        return usage

    def _copy(self) -> pb.Generation:
        copy = pb.Generation()
        copy.CopyFrom(self._generation)
        return copy
