"""One call at a door, from who it is until its end: what it may do, and what it used."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from gateway.access.keys import Tenant
from gateway.access.limits import Bucket
from gateway.types import GenerateRequest, ScoreRequest
from stageline.errors import InvalidArgumentError, PermissionDeniedError, ResourceExhaustedError, StagelineError

BUSY_RETRY_S = 1.0  # when one of a tenant's sequences ends is not known


@dataclass(slots=True)
class Account:
    """What a tenant uses, over all its calls; outlives changes of its limits."""

    tenant: str
    policy: Tenant
    requests: Bucket
    tokens: Bucket
    num_sequences: int = 0

    @classmethod
    def opened(cls, tenant: str, policy: Tenant) -> Account:
        """With nothing used yet."""
        now_s = time.monotonic()
        requests = Bucket.full(policy.requests_per_minute, now_s)
        return cls(tenant, policy, requests, Bucket.full(policy.tokens_per_minute, now_s))

    def change(self, policy: Tenant) -> None:
        """Other limits from now on."""
        now_s = time.monotonic()
        self.requests.limit(policy.requests_per_minute, now_s)
        self.tokens.limit(policy.tokens_per_minute, now_s)
        self.policy = policy


@dataclass(slots=True, eq=False)
class Visit:
    """A call of one tenant. `prompts` keeps texts for the audit log, where it wants them. `error`: what ended it."""

    account: Account
    key_id: str = ""
    prompts: list[str] | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    error: StagelineError | None = None
    _num_sequences: int = field(default=0, init=False)

    @property
    def operator(self) -> bool:
        """Whether it may see what serves it."""
        return self.account.policy.operator

    def enter(self) -> None:
        """Count the call. Raises ResourceExhaustedError where the tenant made too many."""
        account, now_s = self.account, time.monotonic()
        wait_s = account.requests.wait_s(1, now_s)
        if wait_s > 0:
            limit = account.policy.requests_per_minute
            raise ResourceExhaustedError(
                "REQUESTS_PER_MINUTE",
                f"tenant {account.tenant!r} may make {limit} requests a minute; ask again in {wait_s:.1f} s",
                retry_after_s=wait_s, tenant=account.tenant, limit=limit,
            )  # fmt: skip
        account.requests.take(1, now_s)

    def admit(self, request: GenerateRequest) -> GenerateRequest:
        """The tenant's own request: with its name on it, within what it may do. What it takes is held until `leave`.

        Raises PermissionDeniedError (priority), InvalidArgumentError (more sequences than it may ever have) and
        ResourceExhaustedError. Of several prompts in one call the first decides whether there are tokens: a call that is
        refused half way would be paid for again and again.
        """
        self._admit(request.priority, request.num_choices, len(request.prompt_token_ids))
        return replace(request, tenant=self.account.tenant)

    def admit_score(self, request: ScoreRequest) -> ScoreRequest:
        """As `admit`. However many continuations are scored side by side, the call counts as one sequence."""
        num_tokens = len(request.context_token_ids) + sum(map(len, request.continuations))
        self._admit(request.priority, 1, num_tokens)
        return replace(request, tenant=self.account.tenant)

    def _admit(self, priority: int, num_sequences: int, num_tokens: int) -> None:
        account, policy = self.account, self.account.policy
        if priority > policy.max_priority:
            raise PermissionDeniedError(
                "PRIORITY_NOT_ALLOWED",
                f"tenant {account.tenant!r} may not go before others with priority {priority}: at most "
                f"{policy.max_priority} (higher goes first; over HTTP the sign is the other way, as in vLLM)",
                field="priority", value=priority, limit=policy.max_priority, tenant=account.tenant,
            )  # fmt: skip
        self._hold(num_sequences)
        now_s = time.monotonic()
        wait_s = 0.0 if self.num_prompt_tokens else account.tokens.wait_s(num_tokens, now_s)
        if wait_s > 0:
            limit = policy.tokens_per_minute
            raise ResourceExhaustedError(
                "TOKENS_PER_MINUTE",
                f"tenant {account.tenant!r} may use {limit} tokens a minute; ask again in {wait_s:.1f} s",
                retry_after_s=wait_s, tenant=account.tenant, limit=limit,
            )  # fmt: skip
        account.tokens.take(num_tokens, now_s)
        self.num_prompt_tokens += num_tokens

    def charge(self, num_tokens: int) -> None:
        """Tokens were generated; the next request waits until they are paid for."""
        self.num_completion_tokens += num_tokens
        self.account.tokens.take(num_tokens, time.monotonic())

    def leave(self) -> None:
        """The call has ended, however it did."""
        self.account.num_sequences -= self._num_sequences
        self._num_sequences = 0

    def _hold(self, count: int) -> None:
        account, limit = self.account, self.account.policy.concurrent_sequences
        if limit is not None and self._num_sequences + count > limit:
            raise InvalidArgumentError(
                "CONCURRENT_SEQUENCES_OUT_OF_RANGE",
                f"the request asks for {self._num_sequences + count} sequences (prompts times choices); tenant "
                f"{account.tenant!r} may have {limit} at a time: send less in one request",
                tenant=account.tenant, limit=limit,
            )  # fmt: skip
        if limit is not None and account.num_sequences + count > limit:
            raise ResourceExhaustedError(
                "CONCURRENT_SEQUENCES",
                f"tenant {account.tenant!r} has {account.num_sequences} sequences of at most {limit} under way; ask again "
                "when one has ended",
                retry_after_s=BUSY_RETRY_S, tenant=account.tenant, limit=limit,
            )  # fmt: skip
        account.num_sequences += count
        self._num_sequences += count


current: ContextVar[Visit | None] = ContextVar("visit", default=None)


def tenant() -> str:
    """Whose call this is; empty where everybody is one tenant."""
    visit = current.get()
    return visit.account.tenant if visit is not None else ""
