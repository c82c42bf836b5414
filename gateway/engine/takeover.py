"""Where the sequences of a pipeline that was lost go on: on what takes its place, or on another pipeline. Pure.

Each goes where its next token comes sooner. Going is for good: it holds up whoever decodes there, and what takes the lost
pipeline's place is left with less to do. So it must be clearly quicker, and with a hot spare at hand most sequences stay.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, replace

from gateway.engine.drain import DOUBT, Pace, Remainder
from gateway.scheduler import Scheduler
from gateway.scheduler.filling import DECODE_SLOWDOWN

MIN_GAIN_S = 2.0  # so much sooner must the next token come elsewhere
RECENT = 0.5  # weight of the newest of each kind: they are few, and machines change
WAIT_PERIOD_S = 1.0  # how often that is asked again while sequences wait
MOST_ATTEMPTS = 2
"""Replicas that could not be made a pipeline so many times in a row are no replacement to wait for."""
PACED = DECODE_SLOWDOWN / (DECODE_SLOWDOWN - 1)
"""How many times as long tokens take to compute beside sequences that decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeoverTimes:
    """What it took so far, in seconds; None before the first time. `opening_s`: claiming, wiring and proving a pipeline.
    `binding_s`: from a loss until a spare had loaded the stage. `replacing_s`: from a loss until a new replica was there."""

    opening_s: float | None = None
    binding_s: float | None = None
    replacing_s: float | None = None

    def after(self, **seconds: float) -> TakeoverTimes:
        """One more of those named."""
        known = {name: getattr(self, name) for name in seconds}
        return replace(
            self,
            **{name: s if (old := known[name]) is None else old + RECENT * (s - old) for name, s in seconds.items()},
        )

    def ready_in_s(
        self, *, replaced: bool, loading: bool, lost_for_s: float, num_failed_attempts: int = 0
    ) -> float | None:
        """Until the lost pipeline stands again; None where nobody knows. `replaced`: its replicas are all there by now;
        `loading`: a spare loads what is missing."""
        if replaced:
            return (self.opening_s or 0.0) if num_failed_attempts < MOST_ATTEMPTS else None
        expected_s = self.binding_s if loading else self.replacing_s
        if expected_s is None or lost_for_s > DOUBT * expected_s:
            return None
        return max(0.0, expected_s - lost_for_s) + (self.opening_s or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A pipeline that stands. `room_tokens`: what its KV cache has free for sequences that are not there yet."""

    pace: Pace
    num_sequences: int
    room_tokens: int


def standing(scheduler: Scheduler | None, pace: Pace, num_sequences: int) -> Standing:
    """What a pipeline with this scheduler has for sequences of another one."""
    free = 0 if scheduler is None else scheduler.num_free_blocks - scheduler.num_running  # each grows by one soon
    size = 0 if scheduler is None else scheduler.block_size_tokens
    return Standing(pace=pace, num_sequences=num_sequences, room_tokens=free * size - pace.backlog_tokens)


def places(
    sequences: Sequence_[Remainder], *, ready_in_s: float | None, here: Pace, others: Sequence_[Standing]
) -> list[int | None]:
    """For each sequence of a lost pipeline the number of the other one where it is to go on, or None: it waits.

    The shortest are placed first, as they are computed. Where nobody knows when the lost pipeline stands again, all go.
    A suspect of killing stages waits where there is something to wait for: it would take the other pipeline down as well.
    One that has measured nothing, or only canaries, is taken to compute a token as quickly as the lost one did.
    """
    found: list[int | None] = [None] * len(sequences)
    if not others:
        return found
    here_tokens = 0
    given_tokens, given = [0] * len(others), [0] * len(others)

    def there_s(place: int, num_tokens: int) -> float | None:
        pace = others[place].pace
        known = [one for one in (pace.prefill_token_s, here.prefill_token_s) if one is not None]
        if not known:
            return None
        ahead = pace.backlog_tokens + given_tokens[place]
        return (ahead + num_tokens) * min(known) * (PACED if others[place].num_sequences else 1.0)

    def fits(place: int, num_tokens: int) -> bool:
        return given_tokens[place] + num_tokens <= others[place].room_tokens

    for index in sorted(range(len(sequences)), key=lambda at: (not sequences[at].begun, sequences[at].num_tokens)):
        one = sequences[index]
        best = min(
            range(len(others)),
            key=lambda at: (
                not fits(at, one.num_tokens), there_s(at, one.num_tokens) or 0.0, others[at].num_sequences + given[at],
            ),
        )  # fmt: skip
        if ready_in_s is not None:
            elsewhere_s = there_s(best, one.num_tokens)
            again_s = None if here.prefill_token_s is None else (here_tokens + one.num_tokens) * here.prefill_token_s
            quicker = (
                not one.suspected
                and fits(best, one.num_tokens)
                and elsewhere_s is not None
                and again_s is not None
                and max(DOUBT * elsewhere_s, MIN_GAIN_S + elsewhere_s) < ready_in_s + again_s
            )
            if not quicker:
                here_tokens += one.num_tokens
                continue
        found[index] = best
        given_tokens[best] += one.num_tokens
        given[best] += 1
    return found
