"""Who owns a stage replica, and which stage it holds: a pure state machine. Time is passed in, in seconds of a monotonic
clock.

A bindable replica begins unbound and takes any stage: `bind` owns it under a new epoch while the stage loads, `loaded` or
`load_failed` end that. If its owner is gone meanwhile it goes on loading and is then a spare like any other.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from stageline.errors import FailedPreconditionError, InvalidArgumentError


class State(enum.Enum):
    """What a replica tells about itself. DRAINING covers the others: an owner may still be served while it drains."""

    UNBOUND = "unbound"
    LOADING = "loading"
    SPARE = "spare"
    CLAIMED = "claimed"
    CONNECTED = "connected"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Bind:
    """A call that was granted: the same call again changes nothing while its epoch lasts."""

    owner_id: str
    seen_epoch: int
    start_layer: int
    end_layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """Everything that decides whether a call may go on. Every transition returns a new value."""

    incarnation: str
    epoch: int = 0
    owner_id: str = ""
    connected: bool = False
    draining: bool = False
    failure: str = ""
    lease_s: float = 0.0
    lease_ends_s: float = -math.inf
    bindable: bool = False
    bound: bool = True
    """Whether a stage is loaded."""
    layers: tuple[int, int] = (0, 0)
    """Those of the stage, also while it loads."""
    loading: bool = False
    bind_granted: Bind | None = None  # what began the current epoch, if a bind did

    @property
    def state(self) -> State:
        """The one word of it."""
        if self.draining or self.failure:
            return State.DRAINING
        if not self.bound:
            return State.LOADING if self.loading else State.UNBOUND
        if not self.owner_id:
            return State.SPARE
        return State.CONNECTED if self.connected else State.CLAIMED

    def claim(
        self, *, owner_id: str, incarnation: str, min_epoch: int, lease_s: float, now_s: float,
        layers: tuple[int, int] | None = None,
    ) -> Claims:  # fmt: skip
        """Grant a new epoch to a new owner, to the same owner, or after the lease of another one ran out; of `layers`, if
        given, and of no other stage."""
        self._check_asker(owner_id, incarnation, lease_s)
        if min_epoch >= 1 << 63:  # the gateway asks for what a stage granted; leave room to count on
            raise InvalidArgumentError("EPOCH_OUT_OF_RANGE", f"min_epoch {min_epoch} is too high", field="min_epoch")
        self._check_free(owner_id, now_s)
        self.check_bound()
        if layers is not None and layers != self.layers:
            raise FailedPreconditionError(
                "STAGE_REBOUND", f"the replica was bound to layers {self.layers[0]}-{self.layers[1]} meanwhile",
                start_layer=self.layers[0], end_layer=self.layers[1],
            )  # fmt: skip
        return replace(
            self, connected=False, epoch=max(self.epoch + 1, min_epoch), owner_id=owner_id,
            lease_s=lease_s, lease_ends_s=now_s + lease_s, bind_granted=None,
        )  # fmt: skip

    def bind(self, asked: Bind, *, incarnation: str, lease_s: float, now_s: float) -> Claims:
        """Begin to load a stage for an owner, under a new epoch; returns self where this very call was granted already.

        `asked.seen_epoch` must be the current epoch, so that of all who saw a free replica one binds it, and no call that
        was delayed binds it again.
        """
        self._check_asker(asked.owner_id, incarnation, lease_s)
        if not self.bindable:
            raise FailedPreconditionError("STAGE_NOT_BINDABLE", "the replica holds one stage for as long as it runs")
        if asked == self.bind_granted and self.owner_id == asked.owner_id and not self.expired(now_s):
            return self
        self._check_free(asked.owner_id, now_s)
        if self.loading:
            raise FailedPreconditionError("STAGE_LOADING", "the replica is loading a stage, which cannot be given up")
        if asked.seen_epoch != self.epoch:
            raise self.stale(asked.seen_epoch)
        if self.connected and not self.expired(now_s):
            raise FailedPreconditionError("STAGE_CONNECTED", "the stage is wired into a pipeline; release it first")
        return replace(
            self, connected=False, epoch=self.epoch + 1, owner_id=asked.owner_id, lease_s=lease_s,
            lease_ends_s=now_s + lease_s, bound=False, loading=True, bind_granted=asked,
            layers=(asked.start_layer, asked.end_layer),
        )  # fmt: skip

    def loaded(self) -> Claims:
        """The stage of the last `bind` can be claimed, by its owner first while the lease runs."""
        return replace(self, bound=True, loading=False)

    def load_failed(self) -> Claims:
        """It could not be loaded: the replica is unbound and nobody's."""
        return replace(self._free(), bound=False, loading=False, layers=(0, 0))

    def connect(self, *, epoch: int, now_s: float) -> Claims:
        """The owner has wired the stage."""
        self.check(epoch=epoch, now_s=now_s)
        self.check_bound()
        return replace(self, connected=True)

    def renew(self, *, epoch: int, incarnation: str, now_s: float) -> Claims:
        """Extend the lease; fails for an owner that was fenced."""
        self.check(epoch=epoch, now_s=now_s, incarnation=incarnation)
        return replace(self, lease_ends_s=now_s + self.lease_s)

    def release(self, *, epoch: int, incarnation: str, now_s: float) -> Claims:
        """The owner gives the stage back; the next epoch begins, so that its frames are stale."""
        self.check(epoch=epoch, now_s=now_s, incarnation=incarnation)
        return self._free()

    def drain(self) -> Claims:
        """Take no new claim; the current one goes on."""
        return replace(self, draining=True)

    def fail(self, why: str) -> Claims:
        """The stage cannot compute any more: no claim is current or will be granted."""
        return replace(self._free(), failure=why)

    def expire(self, now_s: float) -> Claims:
        """Free a stage whose owner let its lease run out; a higher epoch fences that owner for good."""
        return self._free() if self.owner_id and self.expired(now_s) else self

    def expired(self, now_s: float) -> bool:
        """Whether the lease has run out."""
        return now_s >= self.lease_ends_s

    def check(self, *, epoch: int, now_s: float, incarnation: str | None = None) -> None:
        """Raise STALE_EPOCH unless `epoch` is current and its lease runs."""
        if incarnation is not None:
            self._check_incarnation(incarnation)
        if epoch != self.epoch or not self.owner_id or self.expired(now_s):
            raise self.stale(epoch)

    def check_bound(self) -> None:
        """Raise STAGE_LOADING or STAGE_UNBOUND where there is no stage."""
        if self.loading:
            raise FailedPreconditionError("STAGE_LOADING", "the stage that the replica was bound to is still loading")
        if not self.bound:
            raise FailedPreconditionError("STAGE_UNBOUND", "the replica holds no stage; bind it to one first")

    def stale(self, epoch: int) -> FailedPreconditionError:
        """What an owner hears whose epoch is over."""
        return FailedPreconditionError(
            "STALE_EPOCH", f"epoch {epoch} is not current: the stage is in epoch {self.epoch}; claim it again",
            epoch=epoch, current_epoch=self.epoch,
        )  # fmt: skip

    def _free(self) -> Claims:
        return replace(
            self, connected=False, owner_id="", lease_ends_s=-math.inf, epoch=self.epoch + 1, bind_granted=None
        )

    def _check_asker(self, owner_id: str, incarnation: str, lease_s: float) -> None:
        self._check_incarnation(incarnation)
        if not owner_id:
            raise InvalidArgumentError("OWNER_MISSING", "owner_id must not be empty", field="owner_id")
        if not (0 < lease_s < math.inf):
            raise InvalidArgumentError("LEASE_NOT_POSITIVE", f"lease_s must be over 0, got {lease_s}", field="lease_s")

    def _check_free(self, owner_id: str, now_s: float) -> None:
        """Raise unless `owner_id` could own the replica now."""
        if self.failure:
            raise FailedPreconditionError("STAGE_FAILED", f"the stage cannot compute any more: {self.failure}")
        if self.draining:
            raise FailedPreconditionError("STAGE_DRAINING", "the stage is draining and takes no new claim")
        if self.owner_id and self.owner_id != owner_id and not self.expired(now_s):
            raise FailedPreconditionError(
                "STAGE_CLAIMED", f"the stage is owned by {self.owner_id} for {self.lease_ends_s - now_s:.1f} s more",
                owner_id=self.owner_id, epoch=self.epoch,
            )  # fmt: skip

    def _check_incarnation(self, incarnation: str) -> None:
        if incarnation != self.incarnation:
            raise FailedPreconditionError(
                "WRONG_INCARNATION", f"incarnation {incarnation!r} is gone; this process is {self.incarnation!r}",
                incarnation=incarnation, current_incarnation=self.incarnation,
            )  # fmt: skip
