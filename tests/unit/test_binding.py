"""Which spare takes which lost stage."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.pipelines.binding import choose_bindings
from gateway.pipelines.discovery import ReplicaRecord
from gateway.pipelines.form import chain
from stages.partition import LayerRange

NUM_LAYERS = 8
CUT = (LayerRange(0, 2), LayerRange(2, 3), LayerRange(3, 8))


def held(layers: LayerRange, name: str = "", **changes: object) -> ReplicaRecord:
    record = ReplicaRecord(
        address=name, incarnation=name or f"stage {layers}", fingerprint="a", num_layers=NUM_LAYERS,
        start_layer=layers.start_layer, end_layer=layers.end_layer,
    )  # fmt: skip
    return replace(record, **changes)  # type: ignore[arg-type]


def spare(name: str, **changes: object) -> ReplicaRecord:
    return held(LayerRange(0, 0), name, bindable=True, **changes)


def choose(replicas: list[ReplicaRecord], owner_id: str = "g", **options: object) -> dict[str, str]:
    found = choose_bindings(CUT, replicas, fingerprint="a", owner_id=owner_id, **options)  # type: ignore[arg-type]
    assert len({binding.layers for binding in found}) == len(found), "one stage twice"
    return {binding.replica.incarnation: str(binding.layers) for binding in found}


def without(*lost: int) -> list[ReplicaRecord]:
    return [held(layers) for place, layers in enumerate(CUT) if place not in lost]


def test_an_unbound_spare_takes_the_lost_stage() -> None:
    for place, layers in enumerate(CUT):
        assert choose([*without(place), spare("s")]) == {"s": str(layers)}


def test_a_spare_that_holds_the_stage_is_enough() -> None:
    assert choose([*without(1), held(CUT[1], "other"), spare("s")]) == {}
    assert choose([*without(1), held(CUT[1], "bound before", bindable=True), spare("s")]) == {}


def test_another_cut_that_covers_the_model_is_enough() -> None:
    assert choose([held(LayerRange(0, 8)), spare("s")]) == {}


def test_only_spares_of_the_model_that_are_free() -> None:
    unfit = [
        spare("other model", fingerprint="b"),
        spare("busy", loading=True),
        spare("refused"),
        held(LayerRange(0, 0), "not bindable"),
    ]
    assert choose([*without(0), *unfit], passed_over={"refused"}) == {}
    assert choose([*without(0), *unfit, spare("s")], passed_over={"refused"}) == {"s": "0-2"}


def test_what_is_loading_already_is_not_bound_again() -> None:
    spares = [spare("s"), spare("t")]
    assert choose([*without(1), *spares], loading=[CUT[1]]) == {}
    assert list(choose([*without(1, 2), *spares], loading=[CUT[1]]).values()) == ["3-8"]


def test_of_several_lost_stages_the_largest_comes_first() -> None:
    assert choose([*without(0, 1, 2), spare("s", memory_bytes=9), spare("t")]) == {"s": "3-8", "t": "0-2"}
    assert choose([*without(0, 1), spare("s")]) == {"s": "0-2"}


def test_unbound_spares_come_before_those_bound_to_other_stages_and_large_ones_before_small_ones() -> None:
    elsewhere = held(CUT[0], "elsewhere", bindable=True, memory_bytes=100)  # stage 0 has a replica of its own
    assert choose([*without(2), elsewhere, spare("small", memory_bytes=1), spare("large", memory_bytes=2)]) == {
        "large": "3-8"
    }
    assert choose([*without(2), elsewhere]) == {"elsewhere": "3-8"}


def test_a_spare_that_a_stage_of_the_pipeline_depends_on_stays() -> None:
    needed = held(CUT[0], "needed", bindable=True)
    assert choose([*without(0, 2), needed]) == {}
    twice = choose([*without(0, 2), needed, held(CUT[0], "second", bindable=True)])
    assert list(twice.values()) == ["3-8"], "one of the two is enough for the first stage"


def test_gateways_prefer_different_spares() -> None:
    spares = [spare(f"s{i}") for i in range(8)]
    assert len({next(iter(choose([*without(1), *spares], f"gateway {i}"))) for i in range(40)}) > 4


@st.composite
def situations(draw: st.DrawFn) -> tuple[tuple[LayerRange, ...], list[ReplicaRecord]]:
    bounds = [0, *sorted(draw(st.sets(st.integers(1, NUM_LAYERS - 1)))), NUM_LAYERS]
    cut = tuple(LayerRange(a, b) for a, b in pairwise(bounds))
    ranges = st.sampled_from([*cut, LayerRange(0, 0), LayerRange(1, 5)])
    shape = st.tuples(ranges, st.booleans(), st.booleans(), st.integers(0, 3), st.sampled_from("aab"))
    return cut, [
        held(layers, f"r{i}", bindable=bindable, loading=loading and not len(layers), memory_bytes=size, fingerprint=model)
        for i, (layers, bindable, loading, size, model) in enumerate(draw(st.lists(shape, max_size=12)))
    ]  # fmt: skip


@given(situations(), st.randoms())
def test_bindings_take_free_spares_and_leave_what_is_there(
    situation: tuple[tuple[LayerRange, ...], list[ReplicaRecord]], rng: random.Random
) -> None:
    cut, replicas = situation
    found = choose_bindings(cut, replicas, fingerprint="a", owner_id="g")
    rng.shuffle(replicas)
    assert choose_bindings(cut, replicas, fingerprint="a", owner_id="g") == found
    if chain(replicas, "a")[0]:
        assert not found
        return
    mine = [one for one in replicas if one.fingerprint == "a"]
    have = {LayerRange(one.start_layer, one.end_layer) for one in mine}
    missing = [layers for layers in cut if layers not in have]
    taken = {binding.replica.incarnation: binding for binding in found}
    assert len(taken) == len(found)
    assert all(one.replica.bindable and not one.replica.loading and one.replica in mine for one in found)
    assert {one.layers for one in found} <= set(missing)
    after = [
        replace(one, start_layer=taken[one.incarnation].layers.start_layer, end_layer=taken[one.incarnation].layers.end_layer)
        if one.incarnation in taken else one
        for one in mine
    ]  # fmt: skip
    have_after = {LayerRange(one.start_layer, one.end_layer) for one in after}
    assert have & set(cut) <= have_after, "a stage that was there is gone"
    if len(found) == len(missing):
        assert chain(after, "a")[0]
    else:
        unbound = sum(one.bindable and not one.loading and not one.bound for one in mine)
        assert unbound < len(missing), "an unbound spare stands by while a stage is missing"
