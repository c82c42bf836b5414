"""When a gateway knows that its model is served no more."""

from __future__ import annotations

from gateway.engine.superseded import LOOK_S, ModelWatch, Superseded
from gateway.pipelines.discovery import Registry, ReplicaRecord


def replica(fingerprint: str) -> ReplicaRecord:
    return ReplicaRecord(
        address="127.0.0.1:1", incarnation=fingerprint, fingerprint=fingerprint, start_layer=0, end_layer=4, num_layers=4
    )  # fmt: skip


OLD, NEW, NEWER = replica("old"), replica("new"), replica("newer")


def test_only_replicas_of_other_models_and_for_long_enough() -> None:
    def look(state: Superseded, *replicas: ReplicaRecord, now_s: float, in_use: bool = False) -> Superseded:
        return state.after(replicas, in_use=in_use, fingerprint="old", now_s=now_s)

    state = look(Superseded(), OLD, NEW, now_s=0.0)
    assert not state.holds(100.0, 30.0)
    state = look(state, NEW, now_s=5.0, in_use=True)  # what Serve does not list any more goes on while it drains
    assert not state.holds(100.0, 30.0)
    state = look(state, NEW, now_s=10.0)
    state = look(state, NEW, NEWER, now_s=20.0)
    assert not state.holds(39.0, 30.0)
    assert state.holds(40.0, 30.0)
    assert not look(state, OLD, now_s=41.0).holds(100.0, 30.0)
    assert not look(state, now_s=41.0).holds(100.0, 30.0)  # they may be starting again


def test_the_watch_says_when_that_begins_and_ends() -> None:
    registry = Registry()
    watch = ModelWatch(registry, fingerprint="old", after_s=0.0, in_use=lambda: False)
    assert (watch.look(), watch.superseded, watch.look_again_s) == (False, False, None)
    registry.set_replicas("test", [NEW])
    assert (watch.look(), watch.superseded, watch.look_again_s) == (True, True, None)
    assert watch.look() is False
    error = watch.error()
    assert (error.reason, error.metadata["fingerprint"]) == ("MODEL_SUPERSEDED", "old")
    assert float(error.metadata["retry_after_s"]) > 0
    registry.set_replicas("test", [NEW, OLD])
    assert (watch.look(), watch.superseded) == (True, False)


def test_it_looks_again_while_that_may_begin() -> None:
    registry = Registry()
    registry.set_replicas("test", [NEW])
    watch = ModelWatch(registry, fingerprint="old", after_s=60.0, in_use=lambda: False)
    assert (watch.look(), watch.superseded, watch.look_again_s) == (False, False, LOOK_S)
