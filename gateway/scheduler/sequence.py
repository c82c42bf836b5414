"""A sequence: one choice of one request, as the scheduler sees it."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

from gateway.scheduler.prefix import next_key, root_key

PRIORITY_HEAD_START = 1024
"""Sequences that one level of priority may overtake. See `Sequence.rank` and `WaitingQueue`."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Prompt, generated tokens, and where its keys and values are.

    The caller sets the fields down to `resumed` and only reads the others. `output_token_ids` begins with the tokens of
    a resumed generation; the scheduler appends what `Scheduler.complete` brings. `max_total_tokens` bounds prompt and
    output together, in tokens. A higher `priority` goes first. A `Sequence` belongs to one scheduler for life: to go on
    elsewhere, make a new one whose `output_token_ids` holds what was generated.
    """

    sequence_id: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: list[int] = field(default_factory=list)
    choice_index: int = 0
    max_total_tokens: int
    priority: int = 0
    request_key: int | None = None
    """The same for all choices of one request and no other; None: a request of its own."""
    tenant: str = ""
    """Who pays: tenants share fairly, and none sees another's cached prefixes."""
    deadline_s: float | None = None
    """On the clock of `Ledger.expire`; None: whenever."""
    use_prefix_cache: bool = True
    """Whether its blocks may come from the prefix cache and stay there."""
    cache_salt: str = ""
    """Prefixes are shared only between sequences of equal salt."""
    score_from: int | None = None
    """The first token of the prompt whose log-probability is still wanted, at least 1; None: of none. `complete` moves it on,
    so that nothing is scored twice; what is wanted is computed, whatever the prefix cache holds."""
    forced_token_id: int | None = None
    """The token after the prompt, where it is known: scored, neither sampled nor computed, and the end of the sequence."""
    branch_start: int | None = None
    """Tokens before it are the context of the sequence's branches; those from it on are the current one's."""
    next_branches: tuple[tuple[int, ...], ...] = ()
    """Other continuations of the same context, at least two tokens each, the longest first and none longer than the current
    one: scored from their second token on, one after another in the same KV blocks."""
    first_ids: tuple[int, ...] = ()
    """Tokens that other continuations begin with: scored after the context together with the current branch's first."""
    deaths: dict[str, int] = field(default_factory=dict)
    """Deaths of stages that may have been executing a step of it, since its last token, by stage."""
    run_alone: bool = False
    """No other sequence is in flight with it: what happens to a stage then is its doing. Its next token ends that."""
    resumed: bool = False
    """It ran before, here or elsewhere, so it goes before those of its priority that never ran."""

    rebuild_tokens: int = 0
    """While it waits because its pipeline was lost or left: how many tokens are computed again; else 0."""
    arrival: int = -1
    """Number of the `Scheduler.add` call, from 0; -1 before it."""
    finished: bool = False
    """Finished or cancelled: no more rows are made, rows in flight are ignored when they return."""
    registered: bool = False
    """Whether a row of this epoch already told the last stage the history that penalties need."""
    num_computed_tokens: int = 0
    """Tokens, from position 0, whose keys and values are written and whose micro-batch has returned."""
    num_scheduled_tokens: int = 0
    """The same, with those of the micro-batches in flight."""
    decodes_since: int | None = None
    """How many sequences had arrived when its prefill was done: those from that number on came while it decoded."""
    first_run: bool = False
    """Whether it runs for the first time; what is computed again counts neither for nor against anybody."""
    num_cached_prompt_tokens: int = 0
    """Prompt tokens that came from the prefix cache when the sequence first ran."""
    in_flight_steps: deque[int] = field(default_factory=deque)
    """Micro-batches in flight that hold a row of this sequence, oldest first."""
    block_table: array[int] = field(default_factory=lambda: array("i"))
    """int32 KV block ids by position; empty unless the sequence is running."""
    num_shared_blocks: int = 0
    """Those of the block table that came from the prefix cache."""
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of its full blocks, as far as they were needed. See prefix.py."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_unscheduled_tokens(self) -> int:
        """Those of them that no micro-batch has had yet."""
        return self.num_tokens - self.num_scheduled_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Place among those that run, lower first: priority, then arrival. No two sequences have the same.

        One level of priority is worth `PRIORITY_HEAD_START` places. The order never changes while a sequence lives, and
        only finitely many sequences can ever stand before it.
        """
        return self.arrival - self.priority * PRIORITY_HEAD_START, self.arrival

    @property
    def is_background(self) -> bool:
        """Whether it gives way to all that are not: it may not make their steps much longer."""
        return self.priority < 0

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Token ids at positions [start, end) of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return tuple(self.output_token_ids[start - num_prompt : end - num_prompt])
        return self.prompt_token_ids[start:end] + tuple(self.output_token_ids[: max(0, end - num_prompt)])

    def targets(self, start: int, end: int) -> tuple[int, tuple[int, ...]]:
        """Of the tokens at [start, end), how many stand before the first whose next token is scored, and those next tokens."""
        if self.score_from is None or end < self.score_from:
            return 0, ()
        first = max(start, self.score_from - 1)
        targets = self.prompt_token_ids[first + 1 : end + 1]
        if self.forced_token_id is not None and end == len(self.prompt_token_ids):
            targets += (self.forced_token_id,)
        return (first - start, targets) if targets else (0, ())

    def alternatives(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens scored in place of the first target of [start, end): where that is the first token of the first branch."""
        at = self.branch_start
        return self.first_ids if at is not None and at == self.score_from and start < at <= end else ()

    @property
    def num_shareable_tokens(self) -> int:
        """Tokens whose keys and values may come from the prefix cache: not the last one, nor those that score others, nor
        branches."""
        bound = self.num_tokens - 1
        if self.score_from is not None:
            bound = min(bound, self.score_from - 1)
        return bound if self.branch_start is None else min(bound, self.branch_start)

    @property
    def is_branching(self) -> bool:
        """Whether its context is there, so that what comes is one branch after the other."""
        return self.branch_start is not None and self.num_scheduled_tokens >= self.branch_start

    def start_next_branch(self) -> None:
        """Go back to the end of the context; the next branch's first token is scored already. Not while in flight."""
        assert self.branch_start is not None
        (*computed, last), *others = self.next_branches
        self.prompt_token_ids = (*self.prompt_token_ids[: self.branch_start], *computed)
        self.forced_token_id, self.next_branches = last, tuple(others)
        self.score_from = self.branch_start + 1
        self.num_scheduled_tokens = self.num_computed_tokens = self.branch_start

    def keys(self, num_blocks: int, block_size_tokens: int) -> list[bytes]:
        """At least the keys of its first `num_blocks` blocks, all of them full."""
        keys = self.block_keys
        while len(keys) < num_blocks:
            start = len(keys) * block_size_tokens
            parent = keys[-1] if keys else root_key(self.tenant, self.cache_salt)
            keys.append(next_key(parent, self.tokens(start, start + block_size_tokens)))
        return keys

    def successor(self) -> Sequence:
        """The same sequence for another scheduler, which computes its tokens again."""
        return Sequence(
            sequence_id=self.sequence_id,
            prompt_token_ids=self.prompt_token_ids,
            output_token_ids=list(self.output_token_ids),
            choice_index=self.choice_index,
            max_total_tokens=self.max_total_tokens,
            priority=self.priority,
            request_key=self.request_key,
            tenant=self.tenant,
            deadline_s=self.deadline_s,
            score_from=self.score_from,
            forced_token_id=self.forced_token_id,
            branch_start=self.branch_start,
            next_branches=self.next_branches,
            first_ids=self.first_ids,
            use_prefix_cache=self.use_prefix_cache,
            cache_salt=self.cache_salt,
            deaths=dict(self.deaths),
            run_alone=self.run_alone,
            resumed=self.resumed,
            num_cached_prompt_tokens=self.num_cached_prompt_tokens,
        )

    def forget_cache(self) -> None:
        """Back to the state before the first row: every token is to be computed (again)."""
        self.registered = False
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.decodes_since = None
        self.in_flight_steps.clear()
        self.block_table = array("i")
        self.num_shared_blocks = 0
