"""The simulated cluster: who may act next, and what happens then.

One `random.Random` decides everything: which message arrives, whose clock is asked, what an operator types, what fails.
Each seed first draws how often each kind of fault is to come (some never), so that many seeds are calm in most ways and
get far. Everything is reached through methods that the world calls one at a time: a step is one of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from agent.identity import Remembered
from coordinator.core import events as e
from coordinator.core.orders import OpenEpoch, OrderResult
from resilver.errors import ResilverError, Unavailable
from resilver.lineage import ConsistencyPoint, Snapshot
from resilver.volume import Grant, Progress, VolumeRecord
from tests.simulation.agent import Agent, Crash
from tests.simulation.another_tool import AnotherTool
from tests.simulation.coordinator import STORE_ID, Coordinator, Store
from tests.simulation.disk import BLOCKS, NEW_DISK
from tests.simulation.guarantees import Guarantees
from tests.simulation.network import Ack, Call, Down, Reply, Stream
from tests.simulation.operators import Operator
from tests.simulation.telling import said, told

START_MS = 1_700_000_000_000
NODES = "abcd"

# What may go wrong, and how often at most: per step, or per occasion.
FAULTS = {
    "freeze": 0.02,
    "coordinator dies": 0.01,
    "commit refused": 0.01,
    "commit unknown": 0.02,
    "agent dies": 0.012,
    "agent dies in an order": 0.08,
    "order lost": 0.05,
    "order doubled": 0.1,
    "order held up": 0.2,
    "answer lost": 0.05,
    "answer doubled": 0.05,
    "stream breaks": 0.012,
    "partition": 0.01,
    "disk away": 0.003,
    "disk restored": 0.003,
    "store restored": 0.002,
    "in use": 0.006,
    "written aside": 0.03,
    "jump": 0.008,
}


class World:
    """Nodes, coordinators, a store and what is on its way between them."""

    def __init__(self, seed: int, trace: list[str] | None = None, harsh: Mapping[str, float] | None = None) -> None:
        self.random = random.Random(seed)
        self.trace = trace
        self.watch = Guarantees()
        self.store = Store(self.watch)
        self.rates = {fault: self._rate(most) for fault, most in FAULTS.items()} | dict(harsh or {})
        self.faulty = True
        self.steps = 0
        self._now = START_MS
        self._numbers: dict[str, int] = {}
        self._writes = 0
        self.cuts: set[frozenset[str]] = set()
        self.streams: dict[str, Stream] = {}
        self.speakers: dict[str, str] = {}
        self.flights: list[Call | Reply] = []
        self.volumes = ("v1", "v2") if self.random.random() < 0.2 else ("v1",)
        names = NODES[: self.random.choice((3, 3, 4))]
        self.agents = [Agent(self, name, self.volumes, self.random.choice((0, 0, 5))) for name in names]
        self.node = {agent.name: agent for agent in self.agents}
        self.coordinators = [Coordinator(self, name) for name in ("c1", "c2")[: self.random.choice((1, 2, 2))]]
        clocks = [one.name for one in (*self.agents, *self.coordinators)]
        self._skew = {name: self.random.choice((0, 0, -3_000, 4_000, 60_000)) for name in clocks}
        self.operator = Operator(self)
        self.another_tools: list[AnotherTool] = []
        for volume in self.volumes:
            self._lay_out(volume)
        for agent in self.agents:
            agent.start()

    def _rate(self, most: float) -> float:
        return self.random.choice((0.0, 0.0, most / 4, most, most))

    def _lay_out(self, volume: str) -> None:
        """Either nobody knows anything of the volume yet, or all members are in sync in epoch 1.

        In half of the first kind another tool has mirrored it so far.
        """
        first = self.random.choice(self.agents)
        first.disks[volume].live = NEW_DISK
        for block in range(BLOCKS):
            self.write(first.disks[volume], block)
        if self.random.random() < 0.3:
            # What an older store did not know of, nobody could ask for.
            self.rates["store restored"] = 0.0
            if self.random.random() < 0.5:
                self.another_tools.append(AnotherTool(self, volume, first.name))
                self.another_tools[-1].lay_out()
                return
            if self.random.random() < 0.3:
                self.write(self.random.choice(self.agents).disks[volume])
            return
        epoch_id, tip = f"{volume}-epoch-1", self.next_id("s")
        made = Snapshot(tip, ConsistencyPoint(1, 1), epoch_id=epoch_id, create_time_ms=START_MS, size_bytes=BLOCKS)
        members = tuple(agent.name for agent in self.agents)
        record = VolumeRecord(volume, f"{volume}-id", 1, epoch_id, first.name, members, made.cp, tip)
        first.disks[volume].grant = Grant(record.volume_id, 1, epoch_id)
        self.watch.granted(first.disks[volume], first.disks[volume].grant)
        content = first.disks[volume].live
        assert content is not None
        self.watch.took(first.disks[volume], made, content)
        for agent in self.agents:
            disk = agent.disks[volume]
            disk.records, disk.stored, disk.live = (made,), {tip: content}, content
            disk.record, disk.volume_id = record, record.volume_id
            agent.state.remembered[volume] = Remembered(f"fs-{agent.name}", tip, record.volume_id)
        self.store.found(volume, record)

    # What everybody asks for.

    def next_id(self, kind: str) -> str:
        number = self._numbers[kind] = self._numbers.get(kind, 0) + 1
        return f"{kind}{number}"

    def now_ms(self, who: str) -> int:
        return self._now + self._skew[who]

    def true_ms(self) -> int:
        return self._now

    def log(self, line: Callable[[], str]) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.steps:5} {(self._now - START_MS) / 1000:9.3f}  {line()}")

    def chance(self, fault: str) -> bool:
        return self.faulty and self.random.random() < self.rates[fault]

    def linked(self, one: str, other: str) -> bool:
        return frozenset({one, other}) not in self.cuts

    def reach(self, node: str, source: str) -> Agent:
        agent = self.node[source]
        if not agent.alive or not self.linked(node, source):
            raise Unavailable("NODE_UNREACHABLE", f"{source} does not answer {node}")
        return agent

    def speaker(self, stream: str) -> str:
        return self.speakers[stream]

    def write(self, disk: Any, block: int | None = None) -> None:
        self._writes += 1
        disk.write(self.random.randrange(BLOCKS) if block is None else block, self._writes)
        self.log(lambda: f"{disk.node} writes {disk.volume}: {disk.live}")

    def leader(self) -> Coordinator | None:
        return next((one for one in self.coordinators if one.alive and not one.frozen and one.leads), None)

    # From a coordinator.

    def give(self, coordinator: Coordinator, action: e.GiveOrder) -> None:
        call = Call(action.order_id, coordinator, coordinator.leader_id, self.node[action.node], action.order)
        self.log(lambda: f"{coordinator.name} gives {call}")
        self.flights.append(call)
        if self.chance("order doubled"):
            self.flights.append(Call(call.order_id, coordinator, call.reign, call.agent, call.order, twin=call))
        for one in self.flights[-2:]:
            if isinstance(one, Call) and one.order is action.order and self.chance("order held up"):
                one.not_before = self.steps + self.random.randrange(10, 400)
                if self.random.random() < 0.5:
                    self._answer(one, _unreached(one))

    def send(self, action: e.SendExamine | e.SendRecord | e.RefuseAgent) -> None:
        stream = self.streams.get(action.stream)
        if stream is not None and not stream.broken:
            stream.down.append((stream.ack, action))

    def answered(self, coordinator: Coordinator, action: e.Answer) -> None:
        self.operator.told(coordinator, action)

    def reign_ended(self, coordinator: Coordinator) -> None:
        """Its streams end; what it had asked is never answered."""
        for stream in [one for one in self.streams.values() if one.coordinator is coordinator]:
            self.break_stream(stream)
            self.streams.pop(stream.id, None)

    # Streams.

    def connect(self, agent: Agent) -> None:
        ready = [one for one in self.coordinators if one.alive and not one.frozen and one.leads]
        ready = [one for one in ready if self.linked(agent.name, one.name)]
        if not ready or not agent.alive or agent.stream is not None:
            return
        coordinator = self.random.choice(ready)
        assert coordinator.engine is not None
        ack = Ack(coordinator.engine.identity.term, coordinator.leader_id)
        stream = Stream(self.next_id("t"), agent, coordinator, coordinator.leader_id, ack)
        self.log(lambda: f"{agent.name} opens {stream}")
        stream.up.append(agent.hello(stream.id))
        self.streams[stream.id] = agent.stream = stream
        self.speakers[stream.id] = agent.name

    def break_stream(self, stream: Stream) -> None:
        """What is on its way is lost from some message on."""
        if stream.broken:
            return
        self.log(lambda: f"{stream} breaks")
        stream.broken = True
        stream.down.clear()
        for _ in range(self.random.randrange(len(stream.up) + 1)):
            stream.up.pop()
        stream.up.append(None)
        if stream.agent.stream is stream:
            stream.agent.stream = None

    def flush(self, agent: Agent) -> None:
        """The agent sends what it has to tell."""
        stream = agent.stream
        if stream is None or not stream.heard:
            return
        for message in agent.outbox.take():
            if isinstance(message, Progress):
                stream.up.append(message)
            else:
                agent.seq += 1
                stream.up.append((agent.seq, *message))

    def deliver_up(self, stream: Stream) -> None:
        message = stream.up.popleft()
        coordinator = stream.coordinator
        if message is None:
            self.streams.pop(stream.id, None)
        if coordinator.leader_id != stream.reign or coordinator.engine is None:
            self.break_stream(stream)
            return
        match message:
            case None:
                event: e.Event = e.AgentDisconnected(stream.id)
            case e.AgentConnected():
                event = message
            case Progress():
                event = e.ProgressReported(stream.id, message)
            case (seq, report, examine_id):
                event = e.ReplicaReported(stream.id, seq, report, examine_id)
        self.log(lambda: f"{coordinator.name} hears {stream.agent.name}: {told(event)}")
        coordinator.post(event)
        if isinstance(event, e.AgentConnected) and not stream.broken and coordinator.leader_id == stream.reign:
            stream.down.appendleft((stream.ack, None))

    def deliver_down(self, stream: Stream) -> None:
        ack, action = stream.down.popleft()
        term, news = stream.agent.state.pin.term, False
        if isinstance(action, e.SendRecord) and action.record.volume in stream.agent.disks:
            known = stream.agent.disks[action.record.volume].record
            news = known is None or known.epoch < action.record.epoch
        self._at(stream.agent, lambda: self._hear(stream, ack, action))
        if ack.term > term or news:
            self.worst_moment(stream.agent)

    def _hear(self, stream: Stream, ack: Ack, action: Down[1]) -> None:  # type: ignore[valid-type]
        agent = stream.agent
        self.log(lambda: f"{agent.name} is told {type(action).__name__} in term {ack.term}")
        try:
            if isinstance(action, e.RefuseAgent):
                raise Unavailable("NO_LEADER", action.reason)
            agent.identity.meet(STORE_ID, ack.term, ack.leader_id)
        except ResilverError:
            self.break_stream(stream)
            return
        self.watch.met(agent.name, ack.term, ack.leader_id, "a stream")
        if not stream.heard:
            stream.heard = True
            agent.tell_everything()
        if isinstance(action, e.SendExamine):
            agent.examine(action.volumes, action.examine_id)
        elif isinstance(action, e.SendRecord):
            agent.store(action.record)

    # Calls.

    def deliver(self, flight: Call | Reply) -> None:
        self.flights.remove(flight)
        if isinstance(flight, Reply):
            self._reply(flight)
        elif not self.linked(flight.coordinator.name, flight.agent.name) or self.chance("order lost"):
            self.log(lambda: f"lost: {flight}")
            self._answer(flight, _unreached(flight))
        else:
            self._call(flight)

    def _call(self, call: Call) -> None:
        agent = call.agent
        if not agent.alive:
            self._answer(call, _unreached(call))
            return
        if not call.settled and self.random.random() < 0.02 and self.faulty:
            # Whoever gave it has waited long enough; it is obeyed all the same, later.
            self._answer(call, _unreached(call))
            self.flights.append(call)
            return
        answer: list[OrderResult | ResilverError] = []
        if self.chance("agent dies in an order"):
            agent.fuse = self.random.randrange(1, 7)

        def obey() -> None:
            try:
                answer.append(agent.obey(call.order))
            except ResilverError as error:
                answer.append(error)

        self._at(agent, obey)
        agent.fuse = 0
        self.log(lambda: f"{agent.name} obeys {call}: {said(answer)}")
        lost = not answer or self.chance("answer lost")
        self._answer(call, _unreached(call) if lost else answer[0])
        if isinstance(call.order, OpenEpoch) and not call.not_before:
            self.worst_moment(agent)

    def _answer(self, call: Call, answer: OrderResult | ResilverError) -> None:
        if call.settled:
            return
        call.answered = True
        self.flights.append(Reply(call.order_id, call.coordinator, call.reign, answer))

    def _reply(self, reply: Reply) -> None:
        coordinator = reply.coordinator
        if coordinator.leader_id != reply.reign or coordinator.engine is None:
            return
        self.log(lambda: f"{coordinator.name} is answered {reply}")
        coordinator.post(e.OrderAnswered(reply.order_id, reply.answer))
        if self.chance("answer doubled"):
            self.flights.append(reply)

    def _at(self, agent: Agent, job: Callable[[], None]) -> None:
        """Something that an agent does, and then it tells what has changed; a crash ends it where it falls."""
        try:
            job()
        except Crash:
            self.stop_agent(agent)
            return
        if self.random.random() < 0.8:
            self.flush(agent)

    def stop_agent(self, agent: Agent) -> None:
        self.log(lambda: f"{agent.name} dies")
        self.watch.counts["agents died"] += 1
        agent.crash()
        if agent.stream is not None:
            self.break_stream(agent.stream)

    def start_agent(self, agent: Agent) -> None:
        self.log(lambda: f"{agent.name} starts")
        agent.start()
        self.worst_moment(agent)

    def worst_moment(self, agent: Agent) -> None:
        """What had been held up on its way to an agent arrives just now."""
        late = [one for one in self.flights if isinstance(one, Call) and one.agent is agent and one.not_before]
        if self.faulty and late and self.random.random() < 0.5:
            for call in late:
                if agent.alive:
                    self.deliver(call)

    def run_step(self, agent: Agent) -> None:
        """One step of one of its runs."""
        run = self.random.choice(agent.runs.active())
        if self.chance("agent dies in an order"):
            agent.fuse = self.random.randrange(1, 5)
        self._at(agent, run.drive)
        agent.fuse = 0
        self.log(lambda: f"{agent.name} runs {run.wanted.resync_id}: {run.progress.state.value} {run.progress.message}")

    def look(self, agent: Agent) -> None:
        """A look now and then, of which a report may come."""
        replica = self.random.choice(list(agent.replicas.values()))
        self._at(agent, replica.examine if self.random.random() < 0.5 else replica.look)

    # Time.

    def pass_time(self, milliseconds: int) -> None:
        since = self._now
        self._now += milliseconds
        for coordinator in self.coordinators:
            if coordinator.alive:
                coordinator.renew(since)
        for coordinator in self.coordinators:
            idle = coordinator.alive and not coordinator.frozen and coordinator.engine is None
            if idle and self.linked(coordinator.name, "store"):
                coordinator.campaign()
        for coordinator in self.coordinators:
            if coordinator.alive and not coordinator.frozen and coordinator.engine is not None:
                coordinator.post(e.Ticked())

    def tick(self) -> None:
        self._now += 1


def _unreached(call: Call) -> ResilverError:
    return Unavailable("NODE_UNREACHABLE", f"node {call.agent.name} did not answer", node=call.agent.name)
