"""Chain replicas into pipelines: a pure function."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.pipelines.discovery import ReplicaRecord

Chain = tuple[ReplicaRecord, ...]


def chain(replicas: Iterable[ReplicaRecord], fingerprint: str) -> tuple[tuple[Chain, ...], tuple[ReplicaRecord, ...]]:
    """Chains that cover all layers in order, and the replicas left over (spares).

    Only replicas of `fingerprint` are chained. Of several replicas that could follow, the one with the longest range is
    taken first, then by incarnation, so that the same membership gives the same chains everywhere. With stages cut
    alike in all pipelines, as one configuration cuts them, there is no larger number of chains than this finds.
    """
    mine = [r for r in replicas if r.fingerprint == fingerprint]
    free = sorted(mine, key=lambda r: (r.start_layer, -r.end_layer, r.incarnation))
    chains: list[Chain] = []
    while (found := _cover(free, 0, set())) is not None:
        chains.append(found)
        free = [r for r in free if r not in found]
    return tuple(chains), tuple(free)


def _cover(free: list[ReplicaRecord], start: int, dead_ends: set[int]) -> Chain | None:
    """The first way to go on from layer `start` to the end of the model; depth is at most the number of layers.

    `dead_ends` are layers from which no way leads on, so that each layer is tried once.
    """
    for replica in free:
        if replica.start_layer != start or replica.end_layer <= start or replica.end_layer in dead_ends:
            continue
        if replica.end_layer == replica.num_layers:
            return (replica,)
        rest = _cover(free, replica.end_layer, dead_ends)
        if rest is not None:
            return (replica, *rest)
    dead_ends.add(start)
    return None
