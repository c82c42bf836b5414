"""One pipeline: the real scheduler, and stages that take as long as the planner says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from gateway.planner.catalogue import host_of
from gateway.planner.cluster_plan import in_flight
from gateway.planner.cost import Step, loaded_seconds
from gateway.planner.report import DTYPE_BYTES
from gateway.scheduler import MicroBatch, Scheduler, Sequence, StepTiming
from gateway.simulator.clock import Clock, Cores, Spent, Worker, steady
from gateway.simulator.scenario import Scenario
from stages.partition import LayerRange, parse_layer_ranges


@dataclass(slots=True, eq=False)
class Flight:
    """A step on its way. `epoch` fences it: a result of an older epoch is dropped."""

    batch: MicroBatch
    epoch: int
    sent_s: float
    spent: list[Spent] = field(default_factory=list)  # at each stage it passed
    in_stages_s: float = 0.0  # waiting and computing
    received_s: float = 0.0


def as_step(batch: MicroBatch) -> Step:
    """What a micro-batch costs, in the planner's terms."""
    rows = batch.rows
    return Step(
        tokens=batch.num_tokens,
        output_rows=sum(row.wants_output for row in rows),
        attended_tokens=sum(row.num_tokens * (row.start + (row.num_tokens + 1) / 2) for row in rows),
        kv_tokens=float(sum(row.context_len for row in rows)),
    )


def cores_of(scenario: Scenario, clock: Clock) -> Cores:
    """What stages and gateways compute on: the cores of their host, or one each."""
    return Cores(clock, host_of(scenario.request.gpus))


class SimulatedLane:
    """Stages in a ring with their gateway.

    A stage takes steps in order, one at a time; its link to the next carries messages in order, one at a time, while the
    stage computes the next step. The gateway handles results in order, for all its lanes.
    """

    def __init__(
        self,
        scenario: Scenario,
        clock: Clock,
        cores: Cores,
        gateway: Worker,
        on_tokens: Callable[[list[Sequence]], None],
    ) -> None:
        self.scenario, self._clock, self._cores, self._gateway = scenario, clock, cores, gateway
        plan, request = scenario.plan, scenario.request
        self.layers: tuple[LayerRange, ...] = parse_layer_ranges(plan.layers())
        gpus = {gpu.name: gpu for gpu in request.gpus}
        self._gpus = [gpus[stage.gpu].under_load() for stage in plan.stages]
        host = host_of(request.gpus)
        self._hop_core_s = 0.0 if host is None else host.hop_core_s
        self._dtype_bytes = DTYPE_BYTES[plan.dtype]
        self.scheduler = Scheduler(
            num_blocks=plan.num_blocks,
            block_size_tokens=plan.block_size_tokens,
            max_in_flight=in_flight(len(plan.stages)),
            num_stages=len(plan.stages),
            limits=scenario.limits,
        )
        self.state = "ready"
        self.epoch = 1
        self.stage_busy_s = [0.0] * len(plan.stages)
        """Seconds that each stage computed on steps that came back."""
        self.num_steps = self.num_lost_steps = 0
        self._on_tokens = on_tokens
        self._workers: list[Worker] = []
        self._link_free_s: list[float] = []
        self._flights: deque[Flight] = deque()
        self._handling_s = 0.0
        self._wire()

    def _wire(self) -> None:
        self._workers = [Worker(self._clock, self._cores) for _ in self.layers]
        self._link_free_s = [0.0] * len(self.layers)

    def pump(self) -> None:
        """Send what the scheduler has."""
        if self.state != "ready":
            return
        self.scheduler.expire(self._clock.now_s)
        while (batch := self.scheduler.schedule()) is not None:
            flight = Flight(batch, self.epoch, self._clock.now_s)
            self._flights.append(flight)
            self._clock.after(self.scenario.request.link.seconds(0), partial(self._visit, flight, as_step(batch), 0))

    def _visit(self, flight: Flight, step: Step, index: int) -> None:
        """A step reaches stage `index`."""
        if flight.epoch != self.epoch:
            return
        flight.received_s = self._clock.now_s
        config = self.scenario.request.config
        seconds = loaded_seconds(config, self.layers[index], self._gpus[index], step, self._dtype_bytes)
        if self._hop_core_s:  # other threads of the stage's process, beside its compute thread
            self._cores.run(steady(self._hop_core_s), lambda _: None)
        self._workers[index].submit(seconds, lambda spent: self._leave(flight, step, index, spent))

    def _leave(self, flight: Flight, step: Step, index: int, spent: Spent) -> None:
        """Stage `index` has computed a step: it goes over the link, which is busy for as long as its bytes take."""
        now_s, link = self._clock.now_s, self.scenario.request.link
        flight.spent.append(spent)
        flight.in_stages_s += now_s - flight.received_s
        last = index + 1 == len(self.layers)
        num_bytes = 0 if last else step.tokens * self.scenario.request.config.hidden_size * self._dtype_bytes
        begin_s = max(now_s, self._link_free_s[index])
        hop_s = link.seconds(num_bytes)
        self._link_free_s[index] = begin_s + hop_s - link.latency_s
        arrive = partial(self._return, flight) if last else partial(self._visit, flight, step, index + 1)
        self._clock.after(begin_s - now_s + hop_s, arrive)

    def _return(self, flight: Flight) -> None:
        """The last stage's answer reaches the gateway, which handles it when it has handled what came before."""
        if flight.epoch != self.epoch:
            return
        cost = self.scenario.gateway_cost
        outputs = sum(row.wants_output for row in flight.batch.rows)
        handling_s = cost.step_s + cost.row_s * outputs
        ring_s = self._clock.now_s - flight.sent_s + self._handling_s
        self._handling_s = handling_s
        slowest_s = max(spent.elapsed_s for spent in flight.spent)  # as a stage reads it off its clock
        timing = StepTiming(slowest_s, max(0.0, ring_s - flight.in_stages_s))
        self._gateway.submit(steady(handling_s), lambda _: self._complete(flight, timing))

    def _complete(self, flight: Flight, timing: StepTiming) -> None:
        if flight.epoch != self.epoch:
            return
        assert self._flights.popleft() is flight
        rows = [row.sequence for row in flight.batch.rows if row.wants_output and not row.sequence.finished]
        tokens = {sequence.sequence_id: 1 for sequence in rows}
        self.scheduler.complete(flight.batch.step_id, tokens, timing=timing)
        self.num_steps += 1
        for index, spent in enumerate(flight.spent):
            self.stage_busy_s[index] += spent.core_s
        self._on_tokens(rows)
        self.pump()

    def break_(self) -> None:
        """A stage died: what is in flight is lost, its sequences wait."""
        self.state = "recovering"
        self.epoch += 1
        self.num_lost_steps += len(self._flights)
        self._flights.clear()
        for worker in self._workers:
            worker.kill()

    def reopen(self) -> None:
        """A new epoch on a complete chain: every sequence is computed again."""
        self._wire()
        self.scheduler.reset(self.scenario.plan.num_blocks)
        self.state = "ready"
        self.pump()
