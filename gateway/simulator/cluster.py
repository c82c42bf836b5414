"""Several gateways, each with pipelines of its own, under traffic and failures."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

from gateway.engine.drain import Pace, Remainder
from gateway.engine.lane import SEQUENCE_COST_TOKENS
from gateway.engine.takeover import WAIT_PERIOD_S, places, standing
from gateway.scheduler import Sequence
from gateway.simulator.clock import Clock, Worker, steady
from gateway.simulator.lane import SimulatedLane, cores_of
from gateway.simulator.result import Result, percentiles
from gateway.simulator.scenario import Scenario
from gateway.simulator.traffic import arrivals, lengths
from stageline.errors import StagelineError


@dataclass(slots=True, eq=False)
class _Request:
    sent_s: float
    client: int | None
    last_s: float | None = None  # of its newest token
    interrupted_s: float | None = None


@dataclass(slots=True, eq=False)
class _Gateway:
    worker: Worker
    lanes: list[SimulatedLane] = field(default_factory=list)
    homeless: list[Sequence] = field(default_factory=list)
    spares: int = 0


def simulate(scenario: Scenario) -> Result:
    """Run a scenario to its end."""
    return _Cluster(scenario).run()


class _Cluster:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._clock = Clock()
        self._cores = cores_of(scenario, self._clock)
        # One stream for each purpose, so that failures do not change the traffic.
        self._lengths = random.Random(f"{scenario.seed}/lengths")
        self._choice = random.Random(f"{scenario.seed}/gateways")
        self._deaths = random.Random(f"{scenario.seed}/deaths")
        self._requests: dict[int, _Request] = {}
        self._gateways = [
            _Gateway(Worker(self._clock, self._cores), spares=scenario.failures.spares)
            for _ in range(scenario.gateways)
        ]
        for number in range(scenario.pipelines):
            gateway = self._gateways[number % scenario.gateways]
            gateway.lanes.append(SimulatedLane(scenario, self._clock, self._cores, gateway.worker, self._on_tokens))
        self._ttft, self._itl, self._total, self._pauses = array("d"), array("d"), array("d"), array("d")
        self._num = dict.fromkeys(
            ("requests", "completed", "refused", "output", "prompt", "deaths", "moved", "rows"), 0
        )
        self._next_id = 0
        self._down_s = 0.0

    def run(self) -> Result:
        scenario = self._scenario
        if scenario.traffic.streams:
            for client in range(scenario.traffic.streams):
                self._arrive(*lengths(scenario.traffic, self._lengths), client)
        else:
            self._open_loop()
        self._plan_failures()
        self._clock.run(scenario.warmup_s)
        lanes = [lane for gateway in self._gateways for lane in gateway.lanes]
        before = [(list(lane.stage_busy_s), lane.num_steps) for lane in lanes]
        gateway_before = [gateway.worker.busy_s for gateway in self._gateways]
        self._num |= {"output": 0, "prompt": 0, "rows": 0}
        self._clock.run(scenario.duration_s)
        span_s = scenario.duration_s - scenario.warmup_s
        busy = [
            sum(lane.stage_busy_s[stage] - old[stage] for lane, (old, _) in zip(lanes, before, strict=True))
            for stage in range(len(scenario.plan.stages))
        ]
        steps = sum(lane.num_steps - old for lane, (_, old) in zip(lanes, before, strict=True))
        return Result(
            duration_s=span_s,
            requests=self._num["requests"],
            completed=self._num["completed"],
            refused=self._num["refused"],
            unfinished=len(self._requests),
            output_tokens_per_s=self._num["output"] / span_s,
            prompt_tokens_per_s=self._num["prompt"] / span_s,
            ttft_s=percentiles(self._ttft),
            itl_s=percentiles(self._itl),
            end_to_end_s=percentiles(self._total),
            utilization=tuple(one / span_s / len(lanes) for one in busy),
            gateway_utilization=max(
                (gateway.worker.busy_s - old) / span_s
                for gateway, old in zip(self._gateways, gateway_before, strict=True)
            ),
            rows_per_step=self._num["rows"] / steps if steps else 0.0,
            preemptions=sum(lane.scheduler.num_preemptions for lane in lanes),
            deaths=self._num["deaths"],
            moved_sequences=self._num["moved"],
            recovery_pauses_s=percentiles(self._pauses),
            availability=1 - self._down_s / (scenario.duration_s * len(lanes)),
        )

    def _open_loop(self) -> None:
        stream = arrivals(self._scenario.traffic, self._scenario.duration_s, self._scenario.seed)

        def next_one() -> None:
            arrival = next(stream, None)
            if arrival is None:
                return

            def arrive() -> None:
                self._arrive(arrival.prompt_tokens, arrival.output_tokens, None)
                next_one()

            self._clock.after(arrival.at_s - self._clock.now_s, arrive)

        next_one()

    def _arrive(self, prompt_tokens: int, output_tokens: int, client: int | None) -> None:
        """A client sends a request to any gateway, as a load balancer does that knows nothing of them."""
        self._next_id += 1
        sequence = Sequence(
            sequence_id=self._next_id,
            prompt_token_ids=(0,) * prompt_tokens,
            max_total_tokens=prompt_tokens + output_tokens,
            use_prefix_cache=False,
        )
        self._requests[self._next_id] = _Request(self._clock.now_s, client)
        self._num["requests"] += self._counts()
        gateway = (
            self._gateways[client % len(self._gateways)] if client is not None else self._choice.choice(self._gateways)
        )
        gateway.worker.submit(
            steady(self._scenario.gateway_cost.request_s), lambda _: self._place(gateway, sequence, True)
        )

    def _place(self, gateway: _Gateway, sequence: Sequence, bounded: bool) -> None:
        """As `gateway.engine` does: where it has the least to wait for, on a pipeline that stands if one does."""
        if not gateway.lanes:
            gateway.homeless.append(sequence)
            return
        lane = min(gateway.lanes, key=lambda one: (one.state != "ready", _cost(one)))
        try:
            lane.scheduler.add(sequence, bounded=bounded)
        except StagelineError:
            request = self._requests.pop(sequence.sequence_id)
            self._num["refused"] += self._counts()
            if request.client is not None:  # a refused client of a closed loop waits a second
                self._clock.after(1.0, lambda: self._next_of(request.client))
            return
        lane.pump()

    def _next_of(self, client: int | None) -> None:
        if client is not None:
            self._arrive(*lengths(self._scenario.traffic, self._lengths), client)

    def _on_tokens(self, sequences: list[Sequence]) -> None:
        now_s, counts = self._clock.now_s, self._counts()
        self._num["output"] += len(sequences)
        self._num["rows"] += len(sequences)
        for sequence in sequences:
            request = self._requests[sequence.sequence_id]
            if request.last_s is None:
                self._num["prompt"] += len(sequence.prompt_token_ids)
                if counts:
                    self._ttft.append(now_s - request.sent_s)
            elif counts:
                self._itl.append(now_s - request.last_s)
            if request.interrupted_s is not None:
                self._pauses.append(now_s - request.interrupted_s)
                request.interrupted_s = None
            request.last_s = now_s
            if sequence.finished:
                del self._requests[sequence.sequence_id]
                if counts:
                    self._num["completed"] += 1
                    self._total.append(now_s - request.sent_s)
                self._next_of(request.client)

    def _counts(self) -> bool:
        return self._clock.now_s >= self._scenario.warmup_s

    def _plan_failures(self) -> None:
        failures = self._scenario.failures
        first = self._gateways[0].lanes[0]
        for at_s in failures.at_s:
            self._clock.after(at_s, lambda: self._die(self._gateways[0], first))
        if failures.mtbf_s is not None:
            for gateway in self._gateways:
                for lane in gateway.lanes:
                    self._next_death(gateway, lane)

    def _next_death(self, gateway: _Gateway, lane: SimulatedLane) -> None:
        assert self._scenario.failures.mtbf_s is not None
        rate = len(lane.layers) / self._scenario.failures.mtbf_s

        def die() -> None:
            self._die(gateway, lane)
            self._next_death(gateway, lane)

        self._clock.after(self._deaths.expovariate(rate), die)

    def _die(self, gateway: _Gateway, lane: SimulatedLane) -> None:
        """A replica of a lane dies. One that is down already has nothing more to lose."""
        if lane.state != "ready":
            return
        failures, now_s = self._scenario.failures, self._clock.now_s
        self._num["deaths"] += 1
        lane.break_()
        for sequence in lane.scheduler.live_sequences:
            request = self._requests[sequence.sequence_id]
            if request.last_s is not None and request.interrupted_s is None:
                request.interrupted_s = now_s
        has_spare = gateway.spares > 0
        if has_spare:
            gateway.spares -= 1
            self._clock.after(failures.restart_s, lambda: self._add_spare(gateway))
        ready_s = now_s + failures.detection_s + (0 if has_spare else failures.restart_s) + failures.takeover_s
        self._clock.after(failures.detection_s, lambda: self._move(gateway, lane, lane.epoch, ready_s))
        back_s = failures.detection_s + (0 if has_spare else failures.restart_s) + failures.takeover_s

        def back() -> None:
            self._down_s += back_s
            lane.reopen()

        self._clock.after(back_s, back)

    def _add_spare(self, gateway: _Gateway) -> None:
        gateway.spares += 1

    def _move(self, gateway: _Gateway, lane: SimulatedLane, epoch: int, ready_s: float) -> None:
        """As the keeper does, again and again: sequences of a lost pipeline go where their next token comes sooner."""
        if lane.state == "ready" or lane.epoch != epoch:
            return
        others = [other for other in gateway.lanes if other.state == "ready"]
        sequences = [one for one in lane.scheduler.live_sequences if self._requests.get(one.sequence_id) is not None]
        found = places(
            [
                Remainder(left_tokens=None, num_tokens=one.num_tokens, begun=one.num_computed_tokens > 0)
                for one in sequences
            ],
            ready_in_s=ready_s - self._clock.now_s,
            here=_pace(lane),
            others=[standing(other.scheduler, _pace(other), _load(other)) for other in others],
        )
        for sequence, place in zip(sequences, found, strict=True):
            if place is None:
                continue
            lane.scheduler.cancel(sequence.sequence_id)
            successor = sequence.successor()
            successor.resumed = bool(successor.output_token_ids)
            others[place].scheduler.add(successor, bounded=False)
            self._num["moved"] += 1
        for other in others:
            other.pump()
        self._clock.after(WAIT_PERIOD_S, lambda: self._move(gateway, lane, epoch, ready_s))


def _pace(lane: SimulatedLane) -> Pace:
    scheduler = lane.scheduler
    return Pace(
        token_s=None, prefill_token_s=scheduler.costs.prefill_token_s(0), backlog_tokens=scheduler.backlog_tokens
    )


def _load(lane: SimulatedLane) -> int:
    return lane.scheduler.num_running + lane.scheduler.num_waiting


def _cost(lane: SimulatedLane) -> int:
    return lane.scheduler.backlog_tokens + _load(lane) * SEQUENCE_COST_TOKENS
