"""Several gateways claim from one pool: none holds half a pipeline for good, and every whole pipeline finds an owner.

The decisions are the production ones: `chain` says what to claim, `next_claim` in which order, `Claims` who gets it. As in the
keeper, a gateway that is refused gives back what it holds and passes over what belongs to others for a while. Claims go by
layer and never wait, so whoever holds the furthest stage of all that are half-claimed is refused by nobody but owners of
whole pipelines.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.pipelines.discovery import ReplicaRecord
from gateway.pipelines.form import Chain, chain
from gateway.pipelines.protocol import next_claim
from stageline.errors import FailedPreconditionError
from stages.server.claims import Claims

LEASE_S = 1e9


@dataclass
class Lane:
    """One gateway's attempt to have a pipeline, one call at a time."""

    owner: str
    stages: Chain = ()
    granted: list[int] = field(default_factory=list)
    suspects: set[str] = field(default_factory=set)
    whole: bool = False

    def move(self, pool: list[ReplicaRecord], claims: dict[str, Claims], in_use: set[str]) -> None:
        if self.whole:
            return
        if not self.stages:
            free = [one for one in pool if one.incarnation not in in_use]
            found = chain([one for one in free if one.incarnation not in self.suspects], "a")[0]
            self.suspects = self.suspects if found else set()  # suspicion passes
            if found:
                self.stages, self.granted = found[0], [0] * len(found[0])
            return
        claim = next_claim(self.granted)
        if claim is None:
            self.whole = True
            return
        place, min_epoch = claim
        name = self.stages[place].incarnation
        try:
            claims[name] = claims[name].claim(
                owner_id=self.owner, incarnation=name, min_epoch=min_epoch, lease_s=LEASE_S, now_s=0
            )
            self.granted[place] = claims[name].epoch
        except FailedPreconditionError:
            for stage, epoch in zip(self.stages, self.granted, strict=True):
                if epoch:
                    claims[stage.incarnation] = claims[stage.incarnation].release(
                        epoch=epoch, incarnation=stage.incarnation, now_s=0
                    )
            self.suspects |= {
                s.incarnation for s in self.stages if claims[s.incarnation].owner_id not in ("", self.owner)
            }
            self.stages = ()


def record(layer: int, number: int, num_stages: int) -> ReplicaRecord:
    name = f"{number * 7919 % 101}-{layer}-{number}"  # the order of incarnations is none
    return ReplicaRecord(
        address=name, incarnation=name, fingerprint="a", start_layer=layer, end_layer=layer + 1, num_layers=num_stages
    )


@given(
    num_stages=st.integers(1, 4),
    num_pipelines=st.integers(1, 4),
    num_gateways=st.integers(1, 4),
    in_step=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=150, deadline=None)
def test_every_pipeline_finds_one_owner(
    num_stages: int, num_pipelines: int, num_gateways: int, in_step: bool, seed: int
) -> None:
    rng = random.Random(seed)  # fair, unlike hypothesis's own: everyone has its turn
    pool = [record(layer, number, num_stages) for layer in range(num_stages) for number in range(num_pipelines)]
    claims = {one.incarnation: Claims(incarnation=one.incarnation) for one in pool}
    gateways = [[Lane(f"g{i}") for _ in range(num_pipelines)] for i in range(num_gateways)]
    lanes = [lane for gateway in gateways for lane in gateway]
    for moves in range(4000):
        if sum(lane.whole for lane in lanes) == num_pipelines:
            break
        # In step: all gateways do the same at the same time, the worst case for claims in order.
        lane = lanes[moves % len(lanes)] if in_step else rng.choice(lanes)
        siblings = next(gateway for gateway in gateways if lane in gateway)
        in_use = {stage.incarnation for other in siblings if other is not lane for stage in other.stages}
        lane.move(pool, claims, in_use)
    else:
        raise AssertionError("pipelines stay without an owner")
    for lane in lanes:  # nobody holds what is of no use
        if lane.whole:
            assert {claims[stage.incarnation].owner_id for stage in lane.stages} == {lane.owner}
            assert len({claims[stage.incarnation].epoch for stage in lane.stages}) == 1
