"""Replicas are chained into pipelines that cover every layer once, in order."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.pipelines.discovery import Registry, ReplicaRecord
from gateway.pipelines.form import chain


def replica(start: int, end: int, number: int = 0, *, layers: int = 8, fingerprint: str = "a") -> ReplicaRecord:
    return ReplicaRecord(
        address=f"host:{number}",
        incarnation=f"{start}-{end}-{number}",
        fingerprint=fingerprint,
        start_layer=start,
        end_layer=end,
        num_layers=layers,
    )


@st.composite
def memberships(draw: st.DrawFn) -> list[ReplicaRecord]:
    ranges = draw(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)).filter(lambda r: r[0] < r[1]), max_size=24))
    return [replica(start, end, i, fingerprint=draw(st.sampled_from("aab"))) for i, (start, end) in enumerate(ranges)]


@given(memberships())
def test_chains_cover_and_share_nothing(replicas: list[ReplicaRecord]) -> None:
    chains, spares = chain(replicas, "a")
    for found in chains:
        assert found[0].start_layer == 0
        assert found[-1].end_layer == 8
        assert all(a.end_layer == b.start_layer for a, b in pairwise(found))
    used = [record for found in chains for record in found]
    assert sorted(r.incarnation for r in [*used, *spares]) == sorted(
        r.incarnation for r in replicas if r.fingerprint == "a"
    )
    assert not chain(spares, "a")[0], "what is left over could have been chained"


@given(memberships(), st.randoms())
def test_the_order_of_the_members_does_not_matter(replicas: list[ReplicaRecord], rng: random.Random) -> None:
    shuffled = list(replicas)
    rng.shuffle(shuffled)
    assert chain(shuffled, "a") == chain(replicas, "a")


@given(st.lists(st.integers(1, 7), unique=True), st.integers(1, 4), st.randoms())
def test_equal_cuts_give_as_many_chains_as_there_are_copies(cuts: list[int], copies: int, rng: random.Random) -> None:
    bounds = [0, *sorted(cuts), 8]
    replicas = [replica(a, b, i) for i in range(copies) for a, b in pairwise(bounds)]
    lost = rng.choice(replicas)
    assert len(chain(replicas, "a")[0]) == copies
    assert len(chain([r for r in replicas if r != lost], "a")[0]) == copies - 1


def test_a_dead_end_is_left_for_another_way() -> None:
    chains, spares = chain([replica(0, 5), replica(0, 4), replica(4, 8), replica(5, 7)], "a")
    assert [[(r.start_layer, r.end_layer) for r in found] for found in chains] == [[(0, 4), (4, 8)]]
    assert [(r.start_layer, r.end_layer) for r in spares] == [(0, 5), (5, 7)]


def test_many_dead_ends_are_searched_once() -> None:
    replicas = [replica(i, j, layers=65) for i in range(64) for j in range(i + 1, 65)]
    assert chain(replicas, "a")[0] == ()  # exponential without memory: nothing ends at layer 65


def test_registry_unites_sources_and_reports_changes() -> None:
    registry, calls = Registry(), []
    registry.on_change = lambda: calls.append(len(registry.replicas()))
    registry.set_replicas("one", [replica(0, 4), replica(4, 8)])
    registry.set_replicas("two", [replica(4, 8), replica(0, 8)])
    registry.set_replicas("one", [])
    assert calls == [2, 3, 2]
