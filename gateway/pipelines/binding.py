"""Which spare is bound to which stage that was lost: pure functions. binder.py has the calls.

A bindable replica holds no stage, or one it was bound to before; it takes any stage while nobody owns it. Binding costs a
load of weights, so what holds the stage already comes first.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from gateway.pipelines.discovery import ReplicaRecord
from gateway.pipelines.form import chain
from stages.partition import LayerRange


@dataclass(frozen=True, slots=True)
class Binding:
    """A replica and the stage it is to load."""

    replica: ReplicaRecord
    layers: LayerRange


def choose_bindings(
    cut: Sequence[LayerRange],
    replicas: Iterable[ReplicaRecord],
    *,
    fingerprint: str,
    owner_id: str,
    loading: Iterable[LayerRange] = (),
    passed_over: Set[str] = frozenset(),
) -> tuple[Binding, ...]:
    """What to bind so that `replicas` make a pipeline of `cut`; none where they make one already, of whatever cut.

    `replicas` are those that live and that no other pipeline of this gateway uses; `loading` are stages that spares are
    loading for this pipeline; `passed_over` are the incarnations of spares that are not to be bound now. Where several
    stages are missing and spares are few, the largest come first: they take longest to come back by themselves.

    Two gateways that choose at one time go by different orders among equal spares, which spares them a refusal; that
    only one of them binds a replica is the replica's decision (`Claims.bind`).
    """
    mine = [one for one in replicas if one.fingerprint == fingerprint]
    if chain(mine, fingerprint)[0]:
        return ()
    kept = _holders(cut, mine)
    missing = Counter(layers for layers in cut if layers not in kept)
    missing -= Counter(loading)
    free = [
        one
        for one in mine
        if one.bindable and not one.loading and one not in kept.values() and one.incarnation not in passed_over
    ]
    free.sort(key=lambda one: (one.bound, -one.memory_bytes, _order(owner_id, one.incarnation)))
    largest_first = sorted(missing, key=lambda layers: (-len(layers), layers))
    return tuple(Binding(replica, layers) for layers, replica in zip(largest_first, free, strict=False))


def _holders(cut: Sequence[LayerRange], replicas: Sequence[ReplicaRecord]) -> dict[LayerRange, ReplicaRecord]:
    """Who holds each stage that somebody holds; of several one that takes no other stage, so that the others can."""
    steady_first = sorted(replicas, key=lambda one: (one.bindable, one.incarnation))
    holders: dict[LayerRange, ReplicaRecord] = {}
    for one in steady_first:
        if one.bound and one.layers in cut:
            holders.setdefault(one.layers, one)
    return holders


def _order(owner_id: str, incarnation: str) -> bytes:
    return hashlib.sha256(f"{owner_id}/{incarnation}".encode()).digest()
