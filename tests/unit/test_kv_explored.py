"""The KV rules, every interleaving of small cases: schedule, execute on each stage, return, cancel, fail, a new epoch.

The scheduler is the production one; stages remember what every slot holds and check what they read, so a block that is used
again while a step that touches it is out shows as a wrong slot, whichever of the two stages is late. After every event
the scheduler's own invariants hold, and from every state all sequences end once nothing else happens, with all blocks back.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from simulated_stage import Stage, contents, next_token

from gateway.scheduler import BlockPool, MicroBatch, Scheduler, SchedulerLimits, Sequence, check_integrity

BLOCK_SIZE = 2


@dataclass
class World:
    """Two stages, the first of which may be ahead by all that is out."""

    scheduler: Scheduler
    stages: tuple[Stage, Stage]
    sequences: list[Sequence]
    num_cancels: int = 0
    num_epochs: int = 0
    num_failures: int = 0
    out: list[MicroBatch] = field(default_factory=list)
    executed: list[int] = field(default_factory=lambda: [0, 0])  # of `out`, by each stage

    def events(self) -> list[tuple[str, tuple[object, ...]]]:
        """What can happen next, by the name of a method and its arguments."""
        found: list[tuple[str, tuple[object, ...]]] = [("schedule", ())]
        found += [("execute", (0,))] if self.executed[0] < len(self.out) else []
        found += [("execute", (1,))] if self.executed[1] < self.executed[0] else []
        if self.executed[1]:
            found.append(("come_back", ()))
            found += [("fail", ())] if self.num_failures else []
        if self.num_cancels:
            found += [("cancel", (at,)) for at, sequence in enumerate(self.sequences) if not sequence.finished]
        if self.num_epochs:
            found.append(("new_epoch", ()))
        return found

    def schedule(self) -> None:
        if (step := self.scheduler.schedule()) is not None:
            self.out.append(step)

    def execute(self, place: int) -> None:
        self.stages[place].execute(self.out[self.executed[place]])
        self.executed[place] += 1

    def come_back(self) -> None:
        step = self._oldest()
        wanted = [row.sequence for row in step.rows if row.wants_output and not row.sequence.finished]
        self.scheduler.complete(
            step.step_id, {one.sequence_id: next_token(one.sequence_id, one.num_tokens) for one in wanted}
        )

    def fail(self) -> None:
        """The last stage could not execute it."""
        self.num_failures -= 1
        step = self._oldest()
        for stage in self.stages:
            stage.failed |= {row.sequence.sequence_id for row in step.rows}
        self.scheduler.fail(step.step_id)

    def cancel(self, at: int) -> None:
        self.num_cancels -= 1
        self.scheduler.cancel(self.sequences[at].sequence_id)

    def new_epoch(self) -> None:
        """A stage was replaced: nothing that was out is executed any more, both caches hold garbage."""
        self.num_epochs -= 1
        self.out, self.executed = [], [0, 0]
        num_blocks = self.scheduler.num_blocks
        self.stages = (Stage(num_blocks, BLOCK_SIZE), Stage(num_blocks, BLOCK_SIZE))
        self.scheduler.reset(num_blocks)

    def _oldest(self) -> MicroBatch:
        self.executed = [number - 1 for number in self.executed]
        return self.out.pop(0)

    def check(self) -> None:
        check_integrity(self.scheduler)
        for step, running in itertools.product(self.out, self.scheduler._running.values()):
            for row in step.rows:
                if row.sequence is not running:
                    for index, block in enumerate(row.block_table):
                        if block in running.block_table:
                            self._check_shared(row.sequence, running, block, index)

    def _check_shared(self, one: Sequence, other: Sequence, block: int, index: int) -> None:
        end = (index + 1) * BLOCK_SIZE
        assert other.block_table[index : index + 1].tolist() == [block], "a block is used again while a step touches it"
        assert other.num_shared_blocks > index or one.num_shared_blocks > index, "a block is used again, not shared"
        assert contents(one, end) == contents(other, end), "a shared block holds something else"

    def settle(self) -> None:
        """Nothing but the ordinary course: everything ends."""
        for _ in range(200):
            self.schedule()
            if not self.out:
                break
            for place in (0, 1):
                while self.executed[place] < len(self.out):
                    self.execute(place)
            self.come_back()
        assert all(sequence.finished for sequence in self.sequences), "a sequence does not end"
        assert self.scheduler.num_free_blocks == self.scheduler.num_blocks, "a block is lost"


def world(prompts: tuple[tuple[int, ...], ...], num_blocks: int, max_tokens: int, **budgets: int) -> World:
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size_tokens=BLOCK_SIZE, max_in_flight=2, num_stages=2,
        limits=SchedulerLimits(max_step_tokens=3, max_step_sequences=2, min_prefill_tokens=2, max_request_kv_fraction=1.0),
    )  # fmt: skip
    sequences = [
        Sequence(sequence_id=number, prompt_token_ids=prompt, max_total_tokens=len(prompt) + max_tokens)
        for number, prompt in enumerate(prompts, 1)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    return World(scheduler, (Stage(num_blocks, BLOCK_SIZE), Stage(num_blocks, BLOCK_SIZE)), sequences, **budgets)


def explore(start: World, max_states: int) -> int:
    """Visit every state; the number of them."""
    first = pickle.dumps(start)
    came_from: dict[bytes, tuple[bytes, str] | None] = {first: None}
    frontier = [first]
    while frontier:
        following: list[bytes] = []
        for state in frontier:
            name, args = "settle", ()
            try:
                pickle.loads(state).settle()
                for name, args in pickle.loads(state).events():
                    after = pickle.loads(state)
                    getattr(after, name)(*args)
                    after.check()
                    key = pickle.dumps(after)
                    if key not in came_from:
                        came_from[key] = state, f"{name} {args}"
                        following.append(key)
            except AssertionError as error:
                trace, at = [f"{name} {args}: {error}"], came_from[state]
                while at is not None:
                    trace.append(at[1])
                    at = came_from[at[0]]
                raise AssertionError("\n".join(reversed(trace))) from error
            if len(came_from) > max_states:
                raise RuntimeError(f"more than {max_states} states")
        frontier = following
    return len(came_from)


SMALL: dict[str, Callable[[], World]] = {
    "two cancels while blocks are short": lambda: world(((1, 2), (3, 4), (5, 6)), 3, 2, num_cancels=2),
    "a prefix that is shared, and a cancel": lambda: world(((1, 2, 3), (1, 2, 3), (1, 2, 4)), 5, 2, num_cancels=1),
    "a new epoch with steps out": lambda: world(((1, 2, 3), (1, 2, 3)), 4, 2, num_epochs=1, num_cancels=1),
    "a shared prefix, a failure, a cancel and a new epoch": lambda: world(
        ((1, 2, 3), (1, 2, 3), (1, 2, 4)), 4, 2, num_cancels=1, num_epochs=1, num_failures=1
    ),
    "a step that fails": lambda: world(((1, 2, 3), (1, 2, 3)), 4, 2, num_failures=1, num_cancels=1),
}


@pytest.mark.parametrize("case", SMALL)
def test_every_interleaving(case: str) -> None:
    assert explore(SMALL[case](), max_states=20_000) > 100


def _free_at_once(self: BlockPool, blocks: object, *, last_step: int = 0) -> None:
    FREE(self, blocks, last_step=0)  # type: ignore[arg-type]


def _free_a_step_early(self: BlockPool, step_id: int) -> None:
    RETURNED(self, step_id)
    for waited in sorted(self._resting):
        RETURNED(self, waited)


def _keep_the_cache(self: Scheduler, num_blocks: int) -> tuple[Sequence, ...]:
    known = dict(self._pool._block_by_key)
    lost = RESET(self, num_blocks)
    for key, block in known.items():  # as if what was cached had survived the stage
        self._pool._free.remove(block)
        self._pool._state[block] = 3
        self._pool._cached[block] = None
        self._pool._block_by_key[key], self._pool._key_by_block[block] = block, key
    return lost


FREE, RETURNED, RESET = BlockPool.free, BlockPool.step_returned, Scheduler.reset


@pytest.mark.parametrize(
    ("place", "name", "broken"),
    [
        (BlockPool, "free", _free_at_once),
        (BlockPool, "step_returned", _free_a_step_early),
        (Scheduler, "reset", _keep_the_cache),
    ],
    ids=["no quarantine", "a quarantine that ends early", "a prefix cache that survives its stage"],
)
def test_a_broken_rule_is_found_out(
    place: type, name: str, broken: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, broken)
    starts = [start() for start in SMALL.values()]
    with pytest.raises(AssertionError):
        [explore(start, max_states=20_000) for start in starts]
