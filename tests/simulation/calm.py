"""After the faults: what an operator does until everything is in sync again, and whether anything is stuck then.

CONVERGES        once faults stop, every replica is in sync after a few commands
NO_STUCK_FLOW    and no engine holds a lock, waits for an order that is answered, or leads a resync that has ended
"""

from __future__ import annotations

from typing import Any

from coordinator.core.cluster import ElectionRecord
from coordinator.core.requests import ElectRequest, ResyncRequest
from resilver.errors import ResilverError
from tests.simulation.agent import Agent
from tests.simulation.guarantees import Broken
from tests.simulation.world import World

COMMANDS_MAX = 6
DRAIN_MAX = 5_000
HOURS_2_MS = 2 * 3_600_000


def deliver_any(world: World) -> bool:
    """One message arrives, of all that are on their way; False if there is none."""
    ready: list[tuple[Any, Any]] = [(world.deliver, one) for one in world.flights if one.not_before <= world.steps]
    for stream in world.streams.values():
        if world.linked(stream.agent.name, stream.coordinator.name):
            if stream.up:
                ready.append((world.deliver_up, stream))
            if stream.down and not stream.broken:
                ready.append((world.deliver_down, stream))
        elif stream.up and stream.up[0] is None:
            ready.append((world.deliver_up, stream))
    if not ready:
        return False
    call, on = world.random.choice(ready)
    call(on)
    return True


class Calm:
    """No faults any more: what is needed to be in sync again."""

    def __init__(self, world: World) -> None:
        self.world = world

    def run(self) -> None:
        world = self.world
        self._mend()
        self._drain()
        for volume in world.volumes:
            for _ in range(COMMANDS_MAX):
                if self._in_sync(volume):
                    break
                self._command(volume)
                self._drain()
            else:
                raise Broken("CONVERGES", f"{volume}: {self._why(volume)}")
        self._nothing_stuck()

    def _mend(self) -> None:
        world = self.world
        world.faulty = False
        world.cuts.clear()
        world.log(lambda: "faults stop")
        for agent in world.agents:
            if not agent.alive:
                agent.start()
            for disk in agent.disks.values():
                disk.mounted, disk.user = True, ""
        for coordinator in world.coordinators:
            coordinator.alive = True
            if coordinator.frozen:
                coordinator.frozen = False
                coordinator.work()
        world.pass_time(HOURS_2_MS)
        for agent in world.agents:
            for replica in agent.replicas.values():
                replica.examine()

    def _drain(self) -> None:
        """Everything arrives, every run ends, and the time passes that somebody may wait for."""
        world = self.world
        idle = 0
        for _ in range(DRAIN_MAX):
            world.steps += 1
            world.tick()
            if any(self._agent_goes_on(agent) for agent in world.agents) or deliver_any(world):
                idle = 0
                continue
            idle += 1
            world.pass_time(1_000 if idle < 4 else 31_000)
            if idle > 30 or (idle > 6 and not self._waiting()):
                return
        raise Broken("NO_STUCK_FLOW", "the cluster never comes to rest")

    def _agent_goes_on(self, agent: Agent) -> bool:
        world = self.world
        if agent.stream is None:
            world.connect(agent)
            return agent.stream is not None
        world.flush(agent)
        if agent.runs.active():
            world.run_step(agent)
            return True
        return False

    def _waiting(self) -> bool:
        return any(one.engine is not None and one.engine._context.tasks._all for one in self.world.coordinators)

    def _command(self, volume: str) -> None:
        """What an operator does who follows what he is told."""
        operator, world = self.world.operator, self.world
        key = operator.ask(ElectRequest(volume))
        self._drain()
        for _ in range(3):
            answer = operator.answers.get(key)
            if not isinstance(answer, ElectionRecord) or answer.refusal is None:
                break
            request = operator.as_told(volume, answer.refusal)
            if not answer.refusal.next_command.startswith("resilver elect"):
                # Nobody has what is known of the volume: whoever has any data may be chosen by hand.
                having = [agent.name for agent in world.agents if agent.disks[volume].live is not None]
                request = ElectRequest(volume, choose=having[0])
            key = operator.ask(request)
            self._drain()
        operator.rows.clear()
        key = operator.ask(ResyncRequest((volume,)))
        self._drain()
        answer = operator.answers.get(key)
        if isinstance(answer, ResilverError) or answer is None:
            world.log(lambda: f"the resync was answered {answer}")
            return
        named = {node for (_, node), one in operator.rows.items() if "--replace" in one.next_command}
        full = {node for (_, node), one in operator.rows.items() if "--full" in one.next_command}
        for nodes, request in (
            (named, ResyncRequest((volume,), frozenset(named), replace=frozenset(named))),
            (full, ResyncRequest((volume,), frozenset(full), full=True)),
        ):
            if nodes:
                operator.ask(request)
                self._drain()

    def _in_sync(self, volume: str) -> bool:
        return not self._why(volume)

    def _why(self, volume: str) -> str:
        """What is not as it should be; empty if everything is."""
        entry = self.world.watch.store.get(volume)
        if entry is None or entry.opening or entry.recovering or not entry.record.primary:
            return f"it has no primary that reigns: {entry}"
        record = entry.record
        first = self.world.node[record.primary].disks[volume]
        if first.tip != record.newest_id:
            return f"the primary {record.primary} is at {first.tip}, the newest known CP is {record.newest_id}"
        if not first.tip:
            return f"the primary {record.primary} has taken no CP"
        for agent in self.world.agents:
            disk = agent.disks[volume]
            if (disk.tip, disk.live) != (first.tip, first.stored[first.tip]):
                return f"{agent.name} is at {disk.tip} {disk.live}, not at {first.tip} {first.stored[first.tip]}"
        return ""

    def _nothing_stuck(self) -> None:
        for coordinator in self.world.coordinators:
            if coordinator.engine is None:
                continue
            context = coordinator.engine._context
            left = {
                "locks": sorted(context.locks),
                "orders": sorted(context.orders),
                "examines": sorted(context.examines),
                "flows": [str(task.flow) for task in context.tasks._all.values()],
                "resyncs": [one.id for one in context.resyncs.values() if not one.state.final],
            }
            if any(left.values()):
                raise Broken("NO_STUCK_FLOW", f"{coordinator.name} at rest still has {left}")
