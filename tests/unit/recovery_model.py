"""The recovery protocol as a transition system: gateways, stage replicas, and a network that delays, reorders and repeats.

Every decision is the production function: `Claims` and `Intake` of a stage, `next_claim` and `StepWindow` of a gateway. What
is modelled here is what surrounds them: messages, kernels, queues, deaths, time. State is one immutable value; `moves`
lists everything that can happen next. Work carries who sent it and what it computes, which no production function sees;
the assertions compare with that.

The network is a set: whatever is in it can arrive next or never. Steps and results arrive in order unless a reordering is
spent. A repeated message is one that arrives and stays. Time is a
lease that ran out, of one replica, at any moment: clocks of different hosts agree on nothing.

The file is long because it is one relation: whoever asks whether a move is missing has to see all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gateway.pipelines.protocol import StepWindow, next_claim
from stageline.errors import StagelineError
from stages.server.claims import Bind, Claims
from stages.server.intake import Intake

Endpoint = tuple[int, str]  # a replica and the incarnation that is meant


class Violation(AssertionError):
    """An invariant does not hold."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


class Claim(NamedTuple):
    gateway: int
    attempt: int
    to: Endpoint
    min_epoch: int
    stage: int


class Connect(NamedTuple):
    gateway: int
    attempt: int
    to: Endpoint
    epoch: int
    following: Endpoint | None
    stage: int


class Binding(NamedTuple):
    gateway: int
    to: Endpoint
    seen_epoch: int
    stage: int


class Release(NamedTuple):
    to: Endpoint
    epoch: int


class Work(NamedTuple):
    """What a step computes: token `position` of `sequence`, for `owner`."""

    owner: int
    sequence: int
    position: int


class Frame(NamedTuple):
    to: Endpoint
    epoch: int
    step_id: int
    work: Work


class Answer(NamedTuple):
    source: Endpoint
    epoch: int
    step_id: int
    work: Work


Message = Binding | Claim | Connect | Release | Frame | Answer


class Replica(NamedTuple):
    claims: Claims
    intake: Intake
    following: Endpoint | None = None
    inbox: tuple[Frame, ...] = ()
    kernel: Frame | None = None
    replies: tuple[tuple[int, int, int], ...] = ()  # gateway, attempt, epoch: told once the kernel is done
    alive: bool = True
    owner: int | None = None  # who was granted the epoch, and not yet fenced: by us, not by Claims
    lease_runs: bool = False
    executed: int = 0  # steps begun in this epoch


class Gateway(NamedTuple):
    alive: bool = True
    phase: str = "idle"  # idle, claiming, connecting, running, done
    chain: tuple[Endpoint, ...] = ()
    granted: tuple[int, ...] = ()
    num_connected: int = 0
    attempt: int = 0
    window: StepWindow = StepWindow()
    out: tuple[Work, ...] = ()
    tokens: tuple[int, ...] = ()


class Budget(NamedTuple):
    """How often each fault may still happen."""

    deaths: int = 0
    gateway_deaths: int = 0
    expiries: int = 0
    repeats: int = 0
    reorderings: int = 0
    give_ups: int = 0
    failed_loads: int = 0
    binds: int = 0
    """How often spares are bound, each to any stage. Not a fault either: gateways do not wait until one is lost."""
    attempts: int = 2
    """How often a gateway claims a pipeline. Not a fault: a bound of the search."""


class State(NamedTuple):
    replicas: tuple[Replica, ...]
    gateways: tuple[Gateway, ...]
    network: frozenset[Message]
    budget: Budget


NO_FAULTS = Budget()


@dataclass(frozen=True)
class Model:
    """`layers[i]` is the stage that replica i holds; a stage with several has spares, and None is an unbound one."""

    layers: tuple[int | None, ...] = (0, 1, 1)
    num_gateways: int = 2
    num_sequences: int = 2
    num_tokens: int = 1
    max_in_flight: int = 2
    budget: Budget = NO_FAULTS

    @property
    def num_stages(self) -> int:
        return max(stage for stage in self.layers if stage is not None) + 1

    def start(self) -> State:
        replicas = tuple(_process(f"{index}.0", stage) for index, stage in enumerate(self.layers))
        gateways = (Gateway(tokens=(0,) * self.num_sequences),) * self.num_gateways
        return State(replicas, gateways, frozenset(), self.budget)

    def moves(self, state: State) -> Iterator[tuple[str, Callable[[], State]]]:
        """Everything that can happen next: what it is, and the state after it."""
        budget = state.budget
        for message in sorted(state.network, key=repr):
            start = state
            if self._overtakes(state, message):
                if not budget.reorderings:
                    continue
                start = state._replace(budget=budget._replace(reorderings=budget.reorderings - 1))
            yield f"arrives: {message}", lambda m=message, s=start: self.deliver(s, m)
            if budget.repeats and not isinstance(message, Release):
                spent = state._replace(budget=budget._replace(repeats=budget.repeats - 1))
                yield f"arrives and will again: {message}", lambda m=message, s=spent: self.deliver(s, m, keep=True)
        for index, replica in enumerate(state.replicas):
            if not replica.alive:
                yield f"replica {index} restarts", lambda i=index: self.restart(state, i)
                continue
            if replica.kernel is not None:
                yield f"replica {index} is done with {replica.kernel}", lambda i=index: self.finish(state, i)
            if budget.expiries and replica.lease_runs:
                spent = state._replace(budget=budget._replace(expiries=budget.expiries - 1))
                yield f"the lease of replica {index} runs out", lambda i=index, s=spent: self.expire(s, i)
            if replica.claims.owner_id and replica.claims.expired(0.0):
                yield f"replica {index} notices that its lease ran out", lambda i=index: self.notice(state, i)
            if replica.claims.loading and replica.kernel is None:
                yield f"replica {index} has loaded", lambda i=index: self.loaded(state, i)
                if budget.failed_loads:
                    spent = state._replace(budget=budget._replace(failed_loads=budget.failed_loads - 1))
                    yield f"replica {index} cannot load", lambda i=index, s=spent: self.load_failed(s, i)
            if budget.deaths:
                spent = state._replace(budget=budget._replace(deaths=budget.deaths - 1))
                yield f"replica {index} dies", lambda i=index, s=spent: self.kill(s, i)
        for index, gateway in enumerate(state.gateways):
            if not gateway.alive or gateway.phase == "done":
                continue
            if gateway.phase == "idle":
                for chain in self.chains(state) if gateway.attempt < budget.attempts else ():
                    yield f"gateway {index} claims {chain}", lambda i=index, c=chain: self.begin(state, i, c)
            elif budget.give_ups:
                spent = state._replace(budget=budget._replace(give_ups=budget.give_ups - 1))
                yield f"gateway {index} gives its pipeline up", lambda i=index, s=spent: self.give_up(s, i)
            if budget.binds and gateway.phase == "idle":
                spent = state._replace(budget=budget._replace(binds=budget.binds - 1))
                for binding in self.bindings(state, index):
                    yield f"gateway {index} asks: {binding}", lambda b=binding, s=spent: _send(s, b)
            if budget.gateway_deaths:
                spent = state._replace(budget=budget._replace(gateway_deaths=budget.gateway_deaths - 1))
                yield (
                    f"gateway {index} dies",
                    lambda i=index, s=spent: _gateway(s, i, s.gateways[i]._replace(alive=False)),
                )

    def chains(self, state: State) -> list[tuple[Endpoint, ...]]:
        """All complete chains of live replicas; which of them is taken is left open."""
        chains: list[tuple[Endpoint, ...]] = [()]
        for layer in range(self.num_stages):
            live = [
                (index, replica.claims.incarnation)
                for index, replica in enumerate(state.replicas)
                if replica.alive and _stage(replica) == layer
            ]
            chains = [(*chain, endpoint) for chain in chains for endpoint in live]
        return chains

    def bindings(self, state: State, gateway: int) -> list[Binding]:
        """Every bindable replica that lives, as it is now, to every stage."""
        return [
            Binding(gateway, (index, replica.claims.incarnation), replica.claims.epoch, stage)
            for index, replica in enumerate(state.replicas)
            if replica.alive and replica.claims.bindable
            for stage in range(self.num_stages)
        ]

    def _overtakes(self, state: State, message: Message) -> bool:
        if not isinstance(message, Frame | Answer):
            return False
        return any(
            type(other) is type(message) and other[:2] == message[:2] and other.step_id < message.step_id  # type: ignore[union-attr]
            for other in state.network
        )

    # Gateways

    def begin(self, state: State, index: int, chain: tuple[Endpoint, ...]) -> State:
        gateway = state.gateways[index]._replace(
            phase="claiming", chain=chain, granted=(0,) * len(chain), num_connected=0, window=StepWindow(), out=()
        )
        return self._advance(_gateway(state, index, gateway), index)

    def give_up(self, state: State, index: int, phase: str = "idle") -> State:
        """Give back what was granted; what is out in the old epoch is of no interest any more."""
        gateway = state.gateways[index]
        releases = {
            Release(endpoint, epoch) for endpoint, epoch in zip(gateway.chain, gateway.granted, strict=True) if epoch
        }
        gateway = gateway._replace(
            phase=phase, chain=(), granted=(), attempt=gateway.attempt + 1, window=StepWindow(), out=(), num_connected=0
        )
        return _gateway(state, index, gateway)._replace(network=state.network | releases)

    def _advance(self, state: State, index: int) -> State:
        """What a gateway does by itself as soon as it can."""
        gateway = state.gateways[index]
        if gateway.phase == "claiming":
            claim = next_claim(gateway.granted)
            if claim is not None:
                place, min_epoch = claim
                return _send(state, Claim(index, gateway.attempt, gateway.chain[place], min_epoch, place))
            check(len(set(gateway.granted)) == 1, f"gateway {index} wires a pipeline of epochs {gateway.granted}")
            gateway = gateway._replace(phase="connecting")
        if gateway.phase == "connecting":
            place = len(gateway.chain) - 1 - gateway.num_connected
            if place >= 0:
                following = gateway.chain[place + 1] if place + 1 < len(gateway.chain) else None
                request = Connect(
                    index, gateway.attempt, gateway.chain[place], gateway.granted[place], following, place
                )
                return _send(_gateway(state, index, gateway), request)
            gateway = gateway._replace(phase="running")
        state = _gateway(state, index, gateway)
        return self._pump(state, index) if gateway.phase == "running" else state

    def _pump(self, state: State, index: int) -> State:
        gateway = state.gateways[index]
        if min(gateway.tokens) == self.num_tokens:
            return self.give_up(state, index, phase="done")
        for sequence, have in enumerate(gateway.tokens):
            busy = any(work.sequence == sequence for work in gateway.out)
            if have < self.num_tokens and not busy and len(gateway.out) < self.max_in_flight:
                work, step_id = Work(index, sequence, have + 1), gateway.window.last_sent + 1
                gateway = gateway._replace(window=gateway.window.send(step_id), out=(*gateway.out, work))
                state = _send(state, Frame(gateway.chain[0], gateway.granted[0], step_id, work))
        return _gateway(state, index, gateway)

    def _answer(self, state: State, answer: Answer) -> State:
        readers = [
            index
            for index, gateway in enumerate(state.gateways)
            if gateway.alive
            and gateway.phase == "running"
            and (gateway.chain[-1], gateway.granted[-1]) == (answer.source, answer.epoch)
        ]
        check(len(readers) <= 1, f"gateways {readers} read the same results")
        if not readers:  # the stream it came on is over
            return state
        gateway = state.gateways[readers[0]]
        try:
            window = gateway.window.take(answer.step_id)
        except StagelineError:
            return self.give_up(state, readers[0])
        due, tokens = gateway.out[0], list(gateway.tokens)
        check(answer.work == due, f"gateway {readers[0]} took {answer.work} for {due}")
        tokens[due.sequence] += 1
        check(due.position == tokens[due.sequence], f"{due} is lost or repeated: there are {gateway.tokens}")
        gateway = gateway._replace(window=window, out=gateway.out[1:], tokens=tuple(tokens))
        return self._pump(_gateway(state, readers[0], gateway), readers[0])

    def _refused(self, state: State, request: Claim | Connect) -> State:
        gateway = state.gateways[request.gateway]
        waits = gateway.alive and gateway.phase in ("claiming", "connecting") and gateway.attempt == request.attempt
        return self.give_up(state, request.gateway) if waits else state

    # Replicas

    def deliver(self, state: State, message: Message, *, keep: bool = False) -> State:
        if not keep:
            state = state._replace(network=state.network - {message})
        if isinstance(message, Answer):
            return self._answer(state, message)
        index, incarnation = message.to
        replica = state.replicas[index]
        try:
            if not replica.alive:
                return self._refused(state, message) if isinstance(message, Claim | Connect) else state
            if isinstance(message, Claim):
                return self._claim(state, message, replica)
            if isinstance(message, Connect):
                return self._connect(state, message, replica)
            if isinstance(message, Binding):
                return self._bind(state, message, replica)
            if incarnation != replica.claims.incarnation:
                return state  # its connection ended with that process
            if isinstance(message, Release):
                claims = replica.claims.release(epoch=message.epoch, incarnation=incarnation, now_s=0.0)
                return _replica(state, index, _next_epoch(replica, claims))
            return self._frame(state, message, replica)
        except StagelineError:
            return self._refused(state, message) if isinstance(message, Claim | Connect) else state

    def _claim(self, state: State, request: Claim, replica: Replica) -> State:
        claims = replica.claims.claim(
            owner_id=f"gateway {request.gateway}", incarnation=request.to[1], min_epoch=request.min_epoch,
            lease_s=1.0, now_s=0.0, layers=(request.stage, request.stage + 1),
        )  # fmt: skip
        check(claims.epoch > replica.claims.epoch, f"epoch {claims.epoch} is granted a second time")
        check(not replica.lease_runs or replica.owner == request.gateway, "two gateways own one stage")
        replica = _next_epoch(replica, claims)._replace(owner=request.gateway, lease_runs=True)
        replica = replica._replace(replies=(*replica.replies, (request.gateway, request.attempt, claims.epoch)))
        return self._reply(_replica(state, request.to[0], replica), request.to[0])

    def _bind(self, state: State, request: Binding, replica: Replica) -> State:
        asked = Bind(f"gateway {request.gateway}", request.seen_epoch, request.stage, request.stage + 1)
        claims = replica.claims.bind(asked, incarnation=request.to[1], lease_s=1.0, now_s=0.0)
        if claims is replica.claims:
            return state
        check(claims.epoch > replica.claims.epoch, f"epoch {claims.epoch} is granted a second time")
        check(replica.claims.epoch == request.seen_epoch, f"{request} is granted late")
        check(not replica.claims.loading, f"{request} is granted while the replica loads")
        check(not replica.lease_runs or replica.owner == request.gateway, "two gateways own one stage")
        replica = _next_epoch(replica, claims)._replace(owner=request.gateway, lease_runs=True)
        return _replica(state, request.to[0], replica)

    def loaded(self, state: State, index: int) -> State:
        replica = state.replicas[index]
        return _replica(state, index, replica._replace(claims=replica.claims.loaded()))

    def load_failed(self, state: State, index: int) -> State:
        replica = state.replicas[index]
        return _replica(state, index, _next_epoch(replica, replica.claims.load_failed()))

    def _reply(self, state: State, index: int) -> State:
        replica = state.replicas[index]
        if replica.kernel is not None:
            return state
        for number, attempt, epoch in replica.replies:
            gateway = state.gateways[number]
            if gateway.alive and gateway.phase == "claiming" and gateway.attempt == attempt:
                granted = tuple(
                    epoch if endpoint[0] == index else before
                    for endpoint, before in zip(gateway.chain, gateway.granted, strict=True)
                )
                state = self._advance(_gateway(state, number, gateway._replace(granted=granted)), number)
        return _replica(state, index, replica._replace(replies=()))

    def _connect(self, state: State, request: Connect, replica: Replica) -> State:
        claims = replica.claims.connect(epoch=request.epoch, now_s=0.0)
        if request.to[1] != claims.incarnation:
            return self._refused(state, request)
        check(_stage(replica) == request.stage, f"{request} wires a replica of stage {_stage(replica)}")
        state = _replica(state, request.to[0], replica._replace(claims=claims, following=request.following))
        gateway = state.gateways[request.gateway]
        if not (gateway.alive and gateway.phase == "connecting" and gateway.attempt == request.attempt):
            return state
        place = len(gateway.chain) - 1 - gateway.num_connected
        if gateway.chain[place] != request.to:  # a second answer to one call
            return state
        gateway = gateway._replace(num_connected=gateway.num_connected + 1)
        return self._advance(_gateway(state, request.gateway, gateway), request.gateway)

    def _frame(self, state: State, frame: Frame, replica: Replica) -> State:
        if not replica.claims.connected:
            return state
        intake = replica.intake.admit(epoch=frame.epoch, step_id=frame.step_id)
        replica = replica._replace(intake=intake, inbox=(*replica.inbox, frame))
        return _replica(state, frame.to[0], _run(replica))

    def finish(self, state: State, index: int) -> State:
        """The kernel is done: its output goes on where its epoch still runs."""
        replica = state.replicas[index]
        frame = replica.kernel
        assert frame is not None
        if frame.epoch == replica.intake.epoch:
            if replica.following is None:
                state = _send(state, Answer(frame.to, frame.epoch, frame.step_id, frame.work))
            else:
                state = _send(state, Frame(replica.following, frame.epoch, frame.step_id, frame.work))
        return self._reply(_replica(state, index, _run(replica._replace(kernel=None))), index)

    def expire(self, state: State, index: int) -> State:
        replica = state.replicas[index]
        over = Claims(**{**_fields(replica.claims), "lease_ends_s": 0.0})
        return _replica(state, index, replica._replace(claims=over, lease_runs=False))

    def notice(self, state: State, index: int) -> State:
        replica = state.replicas[index]
        return _replica(state, index, _next_epoch(replica, replica.claims.expire(0.0)))

    def kill(self, state: State, index: int) -> State:
        """Frames and calls to it are lost with its connections."""
        replica = state.replicas[index]
        gone = (index, replica.claims.incarnation)
        network = frozenset(
            message
            for message in state.network
            if not (isinstance(message, Frame | Release) and message.to == gone)
            and not (isinstance(message, Answer) and message.source == gone)
        )
        dead = replica._replace(alive=False, kernel=None, inbox=(), replies=(), owner=None, lease_runs=False)
        return _replica(state, index, dead)._replace(network=network)

    def restart(self, state: State, index: int) -> State:
        number = int(state.replicas[index].claims.incarnation.partition(".")[2])
        return _replica(state, index, _process(f"{index}.{number + 1}", self.layers[index]))

    def settle(self, state: State, seen: set[State] | None = None) -> State:
        """No more faults: messages arrive, leases end where nobody renews them. Everyone must finish."""
        states = []
        for _ in range(2000):
            if seen is not None and state in seen:
                break
            states.append(state)
            after = self._calm(state)
            if after is None:
                unfinished = [i for i, one in enumerate(state.gateways) if one.alive and one.phase != "done"]
                check(not unfinished, f"gateways {unfinished} hang without a fault")
                break
            state = after
        else:
            check(False, "work goes on for ever without a fault")
        if seen is not None:
            seen.update(states)
        return state

    def _calm(self, state: State) -> State | None:
        if state.network:
            return self.deliver(state, min(state.network, key=_send_order))
        for index, replica in enumerate(state.replicas):
            if replica.kernel is not None:
                return self.finish(state, index)
            if replica.claims.loading and replica.alive:
                return self.loaded(state, index)
            if not replica.alive:
                return self.restart(state, index)
        for index, gateway in enumerate(state.gateways):  # nothing of it is under way: its watchdog ends it
            if gateway.alive and gateway.phase not in ("idle", "done"):
                return self.give_up(state, index)
        for index, replica in enumerate(state.replicas):
            if replica.claims.owner_id:
                return self.notice(self.expire(state, index), index)
        for index, gateway in enumerate(state.gateways):
            if gateway.alive and gateway.phase == "idle":
                return self.begin(state, index, self.chains(state)[0])
        return None


def _send_order(message: Message) -> tuple[int, str]:
    return (message.step_id if isinstance(message, Frame | Answer) else 0, repr(message))


def _process(incarnation: str, stage: int | None) -> Replica:
    if stage is None:
        return Replica(Claims(incarnation=incarnation, bindable=True, bound=False), Intake(0))
    return Replica(Claims(incarnation=incarnation, layers=(stage, stage + 1)), Intake(0))


def _stage(replica: Replica) -> int | None:
    """What it holds."""
    return replica.claims.layers[0] if replica.claims.bound else None


def _fields(claims: Claims) -> dict[str, object]:
    return {name: getattr(claims, name) for name in Claims.__dataclass_fields__}


def _next_epoch(replica: Replica, claims: Claims) -> Replica:
    """What is queued is dropped; the running kernel goes on."""
    return replica._replace(
        claims=claims, intake=Intake(claims.epoch), following=None, inbox=(), owner=None, lease_runs=False, executed=0
    )


def _run(replica: Replica) -> Replica:
    """Begin the next kernel, if none runs."""
    if replica.kernel is not None or not replica.inbox:
        return replica
    frame = replica.inbox[0]
    check(frame.epoch == replica.claims.epoch, f"{frame} is executed in epoch {replica.claims.epoch}")
    check(replica.owner in (None, frame.work.owner), f"gateway {replica.owner} owns the stage that executes {frame}")
    check(replica.owner is not None, f"{frame} is executed and nobody owns the stage")
    check(replica.claims.bound, f"{frame} is executed by a replica without a stage")
    check(frame.step_id == replica.executed + 1, f"{frame} is executed after step {replica.executed}")
    return replica._replace(kernel=frame, inbox=replica.inbox[1:], executed=frame.step_id)


def _replica(state: State, index: int, replica: Replica) -> State:
    return state._replace(replicas=(*state.replicas[:index], replica, *state.replicas[index + 1 :]))


def _gateway(state: State, index: int, gateway: Gateway) -> State:
    return state._replace(gateways=(*state.gateways[:index], gateway, *state.gateways[index + 1 :]))


def _send(state: State, message: Message) -> State:
    return state._replace(network=state.network | {message})


@dataclass(frozen=True, slots=True)
class Explored:
    """What a search found: how many states there are, and the moves to the first violation."""

    num_states: int
    violation: str = ""
    trace: tuple[str, ...] = ()


def explore(model: Model, *, max_states: int) -> Explored:
    """Every state that can be reached, breadth first, each of them also settled: from anywhere, all work must end once faults
    do. Raises RuntimeError where there are more than `max_states`: a search that stops early shows nothing."""
    start = model.start()
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    settled: set[State] = set()
    frontier = [start]
    while frontier:
        following: list[State] = []
        for state in frontier:
            label = "then faults end"
            try:
                model.settle(state, settled)
                for label, move in model.moves(state):
                    after = move()
                    if after not in came_from:
                        came_from[after] = state, label
                        following.append(after)
            except Violation as violation:
                trace, at = [label], came_from[state]
                while at is not None:
                    trace.append(at[1])
                    at = came_from[at[0]]
                return Explored(len(came_from), str(violation), tuple(reversed(trace)))
            if len(came_from) > max_states:
                raise RuntimeError(f"more than {max_states} states")
        frontier = following
    return Explored(len(came_from))
