"""One seed: a time of faults, and then a time without (`calm.py`), at whose end everything must be in sync."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import agent.examiner
import agent.replica
import agent.run
import agent.runs
from tests.simulation.agent import Agent, Inline
from tests.simulation.calm import Calm, deliver_any
from tests.simulation.disk import Disk
from tests.simulation.guarantees import Broken
from tests.simulation.world import World

STEPS = 600

# How often each thing happens, where it can; a message arrives whenever nothing else does.
CHOICES = {
    "deliver": 70,
    "run": 14,
    "flush": 6,
    "write": 5,
    "look": 3,
    "second": 8,
    "connect": 6,
    "command": 6,
    "start": 3,
    "thaw": 3,
    "heal": 2,
    "fault": 10,
}


@dataclass(frozen=True)
class Result:
    """What became of a seed: empty `broken` if everything held."""

    seed: int
    broken: str
    name: str
    step: int
    counts: Counter[str]


class Quiet:
    """A log that nobody reads."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_args, **_kwargs: None


@contextmanager
def patched(**values: tuple[Any, str, Any]) -> Iterator[None]:
    """Puts other values in place of names in modules, for as long as it lasts."""
    before = {key: getattr(place, name) for key, (place, name, _) in values.items()}
    for place, name, value in values.values():
        setattr(place, name, value)
    try:
        yield
    finally:
        for key, (place, name, _) in values.items():
            setattr(place, name, before[key])


class Simulation:
    """Drives one world."""

    def __init__(self, seed: int, trace: list[str] | None, harsh: Mapping[str, float] | None) -> None:
        self.world = World(seed, trace, harsh)
        self._names, self._weights = list(CHOICES), list(CHOICES.values())
        self._alone: dict[str, Callable[[], None]] = {
            "write": self._write,
            "second": lambda: self.world.pass_time(self.world.random.choice((200, 1000, 1000, 3000))),
            "command": self.world.operator.anything,
            "thaw": self._thaw,
            "heal": self._heal,
            "fault": self._faults,
        }

    def run(self) -> None:
        world = self.world
        for _ in range(STEPS):
            world.steps += 1
            world.tick()
            self.one_step()
        Calm(world).run()

    def one_step(self) -> None:
        """One thing that may happen; where it cannot just now, a message arrives."""
        world, chance = self.world, self.world.random
        up = [one for one in world.agents if one.alive]
        running = [one for one in up if one.runs.active()]
        apart = [one for one in up if one.stream is None]
        down = [one for one in world.agents if not one.alive]
        match chance.choices(self._names, self._weights)[0]:
            case "run" if running:
                world.run_step(chance.choice(running))
            case "flush" if up:
                world.flush(chance.choice(up))
            case "look" if up:
                world.look(chance.choice(up))
            case "connect" if apart:
                world.connect(chance.choice(apart))
            case "start" if down:
                world.start_agent(chance.choice(down))
            case name if name in self._alone:
                self._alone[name]()
            case _ if not deliver_any(world):
                self._idle(apart, running)

    def _idle(self, apart: list[Agent], running: list[Agent]) -> None:
        """Nothing is on its way: somebody begins something, or time passes."""
        world, chance = self.world, self.world.random
        draw = chance.random()
        if apart and draw < 0.5:
            world.connect(chance.choice(apart))
        elif running and draw < 0.8:
            world.run_step(chance.choice(running))
        elif draw < 0.6:
            world.operator.anything()
        else:
            world.pass_time(chance.choice((1000, 1000, 4000)))

    def _thaw(self) -> None:
        for coordinator in self.world.coordinators:
            if not coordinator.alive:
                coordinator.alive = True
            elif coordinator.frozen and self.world.random.random() < 0.4:
                self.world.log(lambda one=coordinator: f"{one.name} goes on")
                coordinator.frozen = False
                coordinator.work(thawed=self.world.random.random() < 0.5)

    def _heal(self) -> None:
        cuts = self.world.cuts
        if cuts:
            cuts.discard(self.world.random.choice(sorted(cuts, key=sorted)))

    def _write(self) -> None:
        """Who writes is usually the primary's user, as far as the agent beside him knows."""
        world, chance = self.world, self.world.random
        if world.another_tools and chance.random() < 0.3:
            chance.choice(world.another_tools).goes_on()
            return
        agent = chance.choice(world.agents)
        disk = agent.disks[chance.choice(world.volumes)]
        reigns = disk.grant is not None or (disk.live is not None and disk.record is None)
        if disk.mounted and disk.live is not None and (reigns or world.chance("written aside")):
            world.write(disk)

    def _faults(self) -> None:
        world, chance = self.world, self.world.random
        agent = chance.choice(world.agents)
        disk = agent.disks[chance.choice(world.volumes)]
        if disk.grant is None and chance.random() < 0.3:
            return  # what befalls a primary is more telling
        each = 6  # these are asked in one step of so many
        if agent.alive and chance.random() < each * world.rates["agent dies"]:
            world.stop_agent(agent)
        if agent.stream is not None and chance.random() < each * world.rates["stream breaks"]:
            world.break_stream(agent.stream)
        if chance.random() < each * world.rates["partition"]:
            ends = chance.sample(["store", *(one.name for one in (*world.coordinators, *world.agents))], 2)
            world.log(lambda: f"cut {ends}")
            world.cuts.add(frozenset(ends))
        if chance.random() < each * world.rates["disk away"] or not disk.mounted:
            disk.mounted = not disk.mounted
            world.log(lambda: f"disk of {disk.volume} on {disk.node} {'mounted' if disk.mounted else 'away'}")
        if disk.live is not None and (chance.random() < each * world.rates["in use"] or disk.user):
            disk.user = "" if disk.user else chance.choice(("writer", "reader"))
        if chance.random() < each * world.rates["disk restored"]:
            self._restore_disk(agent, disk)
        if chance.random() < each * world.rates["store restored"]:
            self._restore_store()
        if chance.random() < each * world.rates["jump"]:
            world.pass_time(chance.choice((12_000, 31_000, 70_000, 700_000, 3_700_000)))

    def _restore_disk(self, agent: Agent, disk: Disk) -> None:
        if disk.image is None:
            disk.take_image()
            return
        self.world.log(lambda: f"the disk of {disk.volume} on {disk.node} is restored from an old image")
        if agent.alive:
            self.world.stop_agent(agent)
        disk.restore_image()

    def _restore_store(self) -> None:
        world = self.world
        if world.store.backup is None:
            world.store.back_up()
            return
        world.log(lambda: "the store is restored from its backup")
        for coordinator in world.coordinators:
            coordinator.end("the store is stopped")
        world.store.restore()


def simulate(seed: int, trace: list[str] | None = None, harsh: Mapping[str, float] | None = None) -> Result:
    """One seed from beginning to end; `harsh` are rates of faults in place of those that the seed draws."""
    current: list[World] = []

    def now_ms() -> int:
        return current[0].true_ms() if current else 0

    ids = iter(range(1, 1 << 30))
    mint = SimpleNamespace(uuid4=lambda: f"s{next(ids)}x")
    with patched(
        a=(agent.replica, "Worker", Inline),
        b=(agent.replica, "uuid", mint),
        c=(agent.replica, "now_ms", now_ms),
        d=(agent.examiner, "now_ms", now_ms),
        e=(agent.runs, "now_ms", now_ms),
        f=(agent.replica, "_log", Quiet()),
        g=(agent.run, "_log", Quiet()),
        h=(agent.runs, "_log", Quiet()),
    ):
        simulation = Simulation(seed, trace, harsh)
        world = simulation.world
        current.append(world)
        broken, name = "", ""
        try:
            simulation.run()
        except Broken as error:
            broken, name = str(error), error.name
        except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            if trace is not None and not isinstance(error, AssertionError):
                raise
            broken, name = f"{type(error).__name__}: {error}", "NO_CRASH"
    return Result(seed, broken, name, world.steps, world.watch.counts)


def stories(seeds: Iterable[int]) -> str:
    """A line for each seed that stands for its whole trace."""
    lines = []
    for seed in seeds:
        trace: list[str] = []
        simulate(seed, trace)
        lines.append(f"{seed} {hashlib.blake2b(repr(trace).encode()).hexdigest()}")
    return "\n".join(lines)
