"""What steps cost, learned from how long they took. Pure: durations come in as numbers."""

from __future__ import annotations

from dataclasses import dataclass

RECENT = 0.1  # weight of the newest decode step
OUTLIER = (
    1.5  # a decode step counts as at most so many times the average: one that was held up says nothing of its cost
)
MEMORY = 0.95  # what remains of older prefill chunks after a newer one
RECENT_CHUNK = 0.2  # weight of the newest chunk beside decodes
LEAST_S = 1e-9  # what seems to take less is not divided by
MOST_DEARER = 8.0  # a chunk that seems to cost more was held up by something else


@dataclass(frozen=True, slots=True)
class StepTiming:
    """One step that came back. `slowest_stage_s`: the longest that any stage computed on it. `overhead_s`: the part of its
    time from the scheduler to the scheduler in which no stage held it (hops and gateway)."""

    slowest_stage_s: float
    overhead_s: float


class StepCosts:
    """Seconds of the slowest stage, by what a step carried.

    Steps without prefill are averaged by number of rows (two significant bits beside the first), so that nothing is forgotten while other
    sizes run. What prefill adds is explained as tokens · (a + b · context), fitted by least squares over recent chunks: large
    chunks weigh more than small ones, attention grows with the context. A token of a small chunk beside decodes is dearer
    (kernels fill less, and the whole context is gathered for few queries): how much is learned from the last few.
    """

    def __init__(self) -> None:
        self.overhead_s: float | None = None
        self._decode_s: dict[int, float] = {}
        self._dearer = 1.0  # what recent chunks beside decodes cost, over what the fit says
        # Sums for the normal equations of seconds = a·tokens + b·pairs.
        self._tokens_tokens = self._tokens_pairs = self._pairs_pairs = self._tokens_s = self._pairs_s = 0.0

    def observe(self, timing: StepTiming, *, num_decodes: int, prefill_tokens: int, prefill_pairs: int) -> None:
        """Learn from one step; `prefill_pairs` is the sum over prefill rows of tokens · mean context."""
        old = self.overhead_s
        self.overhead_s = timing.overhead_s if old is None else old + RECENT * (timing.overhead_s - old)
        if prefill_tokens == 0:
            size = _size(num_decodes)
            known = self._decode_s.get(size, timing.slowest_stage_s)
            self._decode_s[size] = known + RECENT * (min(timing.slowest_stage_s, OUTLIER * known) - known)
            return
        seconds = max(0.0, timing.slowest_stage_s - (self.decode_s(num_decodes) or 0.0 if num_decodes else 0.0))
        if num_decodes and self._tokens_tokens:
            self._learn_dearer(seconds, prefill_tokens, prefill_pairs)
        self._tokens_tokens = MEMORY * self._tokens_tokens + prefill_tokens**2
        self._tokens_pairs = MEMORY * self._tokens_pairs + prefill_tokens * prefill_pairs
        self._pairs_pairs = MEMORY * self._pairs_pairs + prefill_pairs**2
        self._tokens_s = MEMORY * self._tokens_s + prefill_tokens * seconds
        self._pairs_s = MEMORY * self._pairs_s + prefill_pairs * seconds

    def _learn_dearer(self, seconds: float, tokens: int, pairs: int) -> None:
        base, slope = self._fit()
        alone_s = base * tokens + slope * pairs
        if alone_s > 0:
            times = min(MOST_DEARER, max(1 / MOST_DEARER, seconds / alone_s))
            self._dearer += RECENT_CHUNK * (times - self._dearer)

    def decode_s(self, num_rows: int) -> float | None:
        """A step of so many decode rows; None before any was measured."""
        if not self._decode_s:
            return None
        nearest = min(self._decode_s, key=lambda known: abs(known - num_rows))
        return self._decode_s[nearest]

    @property
    def fixed_s(self) -> float | None:
        """What a step costs however few rows it has; None before it was measured, and where no clock can measure it."""
        return _measured(min(self._decode_s.values(), default=0.0))

    def prefill_token_s(self, context_tokens: int) -> float | None:
        """One more prefill token at this context; None before any was measured, and where no clock can measure it."""
        if not self._tokens_tokens:
            return None
        base, slope = self._fit()
        return _measured(base + slope * context_tokens)

    @property
    def row_s(self) -> float | None:
        """What a decode row more costs: the slope of the line through the averages; None until it is known to be more than 0."""
        if len(self._decode_s) < 2:
            return None
        mean_rows = sum(self._decode_s) / len(self._decode_s)
        mean_s = sum(self._decode_s.values()) / len(self._decode_s)
        above = sum((rows - mean_rows) * (seconds - mean_s) for rows, seconds in self._decode_s.items())
        slope = above / sum((rows - mean_rows) ** 2 for rows in self._decode_s)
        return _measured(slope)

    def most_decodes(self, *, beside: int, slowdown: float) -> int | None:
        """Decode rows that make a step of `beside` others `slowdown` times as long; None while nothing says so."""
        alone_s, row_s = self.decode_s(max(1, beside)), self.row_s
        return None if alone_s is None or row_s is None else int((slowdown - 1) * alone_s / row_s)

    def most_prefill_tokens(
        self, *, num_decodes: int, slowdown: float, context_tokens: int, more_decodes: int = 0
    ) -> int | None:
        """Prefill tokens at this context that, with `more_decodes` rows, make a step of `num_decodes` rows `slowdown` times as long."""
        alone_s, token_s = self.decode_s(max(1, num_decodes)), self.prefill_token_s(context_tokens)
        if alone_s is None or token_s is None:
            return None
        spare_s = (slowdown - 1) * alone_s - more_decodes * (self.row_s or 0.0)
        return max(0, int(spare_s / (token_s * self._dearer)))

    def _fit(self) -> tuple[float, float]:
        """(a, b), neither negative: where one would be, the other explains all."""
        xx, xy, yy, xs, ys = (
            self._tokens_tokens, self._tokens_pairs, self._pairs_pairs, self._tokens_s, self._pairs_s,
        )  # fmt: skip
        determinant = xx * yy - xy * xy
        if determinant > 1e-6 * xx * yy:  # else all chunks had about the same context: the two cannot be told apart
            base, slope = (xs * yy - ys * xy) / determinant, (ys * xx - xs * xy) / determinant
            if base >= 0 and slope >= 0:
                return base, slope
            if base < 0:
                return 0.0, ys / yy
        return xs / xx, 0.0


def _measured(seconds: float) -> float | None:
    return seconds if seconds > LEAST_S else None


def _size(num_rows: int) -> int:
    """The number with all but its three leading bits cleared."""
    shift = max(0, num_rows.bit_length() - 3)
    return num_rows >> shift << shift
