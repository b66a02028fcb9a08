"""One run of one competitor, and all of them in turn.

The rules, the same for everybody:

* What a competitor needs and a daemon would have at hand (a process that has started, a target that stands at the base)
  is made before the clock starts. Then all is synced, and the caches are dropped, or the source is read into them.
* The clock stops when the target's file system has been synced, which is in the time of all.
* Rounds are interleaved: A B C A B C. Whoever took longer than `SLOW_S` in its first round takes part in
  `SLOW_ROUNDS`, and longer than `VERY_SLOW_S` in no other.
* After its first run the target is compared with the source: every changed range, and a sample of the rest.

CPU seconds are those of all processes that the competitor consists of, from /proc or from wait4. Work that the kernel
does in threads of its own (writeback, loop devices, Btrfs's workers) is nobody's there. Peak memory is the largest
VmHWM of one process of them. Wire bytes are what the loopback interface of the suite's own network namespace has
carried, headers and all, unless the competitor has another way and says which. Bytes read are the loop devices' own.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, Self

from bench.suite.data import TOOL_TIMEOUT_S, Disk

SLOW_S: Final = 60.0
SLOW_ROUNDS: Final = 2
VERY_SLOW_S: Final = 300.0
FAILURE_CHARS_MAX: Final = 200
NOT_COUNTED: Final = -1
DIES_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL")  # before a command: it must not outlive this process
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_SAMPLE_S: Final = 0.05


@dataclass
class Used:
    """What a competitor tells of its own run.

    `wire_bytes` None: the loopback's counter is right; `read_bytes` None: the loop devices'. NOT_COUNTED: nobody knows.
    `time_s` None: the clock of whoever has asked for the run is right.
    """

    cpu_s: float
    peak_bytes: int
    wire_bytes: int | None = None
    read_bytes: int | None = None
    time_s: float | None = None
    parts: dict[str, float] = field(default_factory=dict)


class Competitor(Protocol):
    """Whoever can bring the change over."""

    name: str
    how: str
    """What is run, for the page."""

    def missing(self) -> str:
        """Why it cannot take part; empty if it can."""

    def before(self) -> None:
        """What is not measured: the target stands at the base, daemons listen."""

    def run(self) -> Used:
        """What is measured."""

    def result(self) -> Path | None:
        """The target's file, to be compared; None where there is none to look at."""

    def after(self) -> None:
        """Removes what `before` and `run` have made."""


@dataclass
class Run:
    """One run, as it goes into the JSON."""

    round: int
    time_s: float
    cpu_s: float
    peak_bytes: int
    wire_bytes: int
    read_bytes: int
    written_bytes: int
    parts: dict[str, float]


@dataclass
class Entry:
    """One competitor's runs, or why there are none."""

    name: str
    how: str
    missing: str = ""
    runs: list[Run] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Arena:
    """What a case's competitors have in common."""

    disks: Sequence[Disk]
    """All that count for bytes read and written."""
    target: Callable[[Competitor], Disk]
    """Whose file system is synced within the time."""
    settle: Callable[[Any], None]
    """Makes the caches cold or warm."""
    differs: Callable[[Path], str]
    """How a result differs from what it is to be; empty if it does not."""


def compete(
    competitors: Sequence[Any], arena: Arena, rounds: int, say: Callable[[str], None], *, warm_up: bool = False
) -> list[Entry]:
    """Runs all of them in turn."""
    entries = [Entry(one.name, one.how, one.missing()) for one in competitors]
    if warm_up:
        once(competitors[0], arena, 0)  # whoever comes first finds backing files without blocks: not to be counted
    for number in range(rounds):
        for one, entry in zip(competitors, entries, strict=True):
            if entry.missing or number >= rounds_of(entry):
                continue
            try:
                done = once(one, arena, number)
            except RuntimeError as error:  # shown, like one that is not installed: the others' figures hold
                entry.missing, entry.runs = f"failed: {str(error)[:FAILURE_CHARS_MAX]}", []
                continue
            entry.runs.append(done)
            say(f"  round {number + 1}: {one.name}: {done.time_s:.3f} s{told(done.parts)}")
    for entry in entries:
        if entry.missing:
            say(f"  {entry.name}: {entry.missing}")
    return entries


def rounds_of(entry: Entry) -> float:
    """In how many rounds it takes part."""
    first_s = entry.runs[0].time_s if entry.runs else 0.0
    return 1 if first_s > VERY_SLOW_S else SLOW_ROUNDS if first_s > SLOW_S else math.inf


def told(parts: dict[str, float]) -> str:
    """The parts that are times, for whoever watches."""
    return "".join(f", {name[:-2]} {value:.3f}" for name, value in parts.items() if name.endswith("_s"))


def once(one: Competitor, arena: Arena, number: int) -> Run:
    """One run."""
    try:
        one.before()
        arena.settle(one)
        target = arena.target(one)
        read, written, wire = _read(arena.disks), _written(arena.disks), loopback_bytes()
        begun = time.perf_counter()
        used = one.run()
        target.sync()
        took = time.perf_counter() - begun
        found = Run(
            number,
            took if used.time_s is None else used.time_s,
            used.cpu_s,
            used.peak_bytes,
            loopback_bytes() - wire if used.wire_bytes is None else used.wire_bytes,
            _read(arena.disks) - read if used.read_bytes is None else used.read_bytes,
            _written(arena.disks) - written,
            used.parts,
        )
        result = one.result() if number == 0 else None
        differs = arena.differs(result) if result is not None else ""
        if differs:
            raise AssertionError(f"{one.name} has not copied what it says: {differs}")
        return found
    finally:
        one.after()


def _read(disks: Iterable[Disk]) -> int:
    return sum(disk.read_bytes for disk in disks)


def _written(disks: Iterable[Disk]) -> int:
    return sum(disk.written_bytes for disk in disks)


def loopback_bytes() -> int:
    """What the loopback interface of this network namespace has carried."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, columns = line.partition(":")
        if name.strip() == "lo":
            return int(columns.split()[0])
    return 0


def cpu_s(pid: int) -> float:
    """Of a process, and of its children that have ended and were waited for."""
    rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(rest[column]) for column in (11, 12, 13, 14)) / _TICKS


def children_cpu_s() -> float:
    """Of this process's children that have ended and were waited for: a command that was run meanwhile."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_bytes(pid: int) -> int:
    """The largest resident set so far; 0 once the process has ended."""
    with contextlib.suppress(OSError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def _family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    with contextlib.suppress(OSError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


class _Sampler:
    """Looks at something again and again in a thread of its own, until its block ends; and once more then."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self._look()
        self._look()

    def _look(self) -> None:
        raise NotImplementedError


class Watch(_Sampler):
    """Looks at the memory of some processes and all that they start.

    (What wait4 tells would not do: a child's peak begins with that of the process that started it.)
    """

    def __init__(self, *pids: int) -> None:
        super().__init__()
        self._pids = pids
        self._peak = 0

    @property
    def peak_bytes(self) -> int:
        return self._peak

    def _look(self) -> None:
        for root in self._pids:
            for pid in _family(root):
                self._peak = max(self._peak, peak_bytes(pid))


def tool(*stages: Sequence[str | Path], daemons: Sequence[int] = ()) -> Used:
    """Runs commands, each one's output into the next one's input; daemons are watched and counted along."""
    before = {pid: cpu_s(pid) for pid in daemons}
    running: list[subprocess.Popen[bytes]] = []
    env = {**os.environ, "LC_ALL": "C"}
    for words in stages:
        source = running[-1].stdout if running else subprocess.DEVNULL
        last = len(running) == len(stages) - 1
        running.append(
            subprocess.Popen(
                [str(word) for word in words],
                stdin=source,
                stdout=subprocess.DEVNULL if last else subprocess.PIPE,
                stderr=subprocess.PIPE if last else subprocess.DEVNULL,
                env=env,
            )
        )
        if source not in (subprocess.DEVNULL, None) and not isinstance(source, int):
            source.close()  # theirs alone, so that the first one hears of the end of the second
    used = 0.0
    with Watch(*(process.pid for process in running), *daemons) as watch, deadline(running):
        said = running[-1].stderr.read() if running[-1].stderr is not None else b""
        for process, words in zip(running, stages, strict=True):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            used += usage.ru_utime + usage.ru_stime
            if process.returncode != 0:
                raise RuntimeError(f"{words[0]}: exit {process.returncode}: {said.decode(errors='replace')[-2000:]}")
    used += sum(cpu_s(pid) - was for pid, was in before.items())
    return Used(used, watch.peak_bytes)


@contextlib.contextmanager
def deadline(running: Sequence[subprocess.Popen[bytes]], timeout_s: float = TOOL_TIMEOUT_S) -> Iterator[None]:
    """Kills what has not ended by then."""

    def cut() -> None:
        for process in running:
            if process.returncode is None:
                os.kill(process.pid, 9)

    timer = threading.Timer(timeout_s, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Rate(_Sampler):
    """How fast bytes came over the loopback, without the beginning and the end of what came."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[float, int]] = []

    def bytes_per_s(self, lowest: float = 0.2, highest: float = 0.8) -> float:
        """Between the moments at which these parts of everything had come."""
        first, total = self._seen[0][1], self._seen[-1][1] - self._seen[0][1]
        inside = [(when, count) for when, count in self._seen if lowest <= (count - first) / max(total, 1) <= highest]
        if len(inside) < 2 or inside[-1][0] == inside[0][0]:
            return 0.0
        return (inside[-1][1] - inside[0][1]) / (inside[-1][0] - inside[0][0])

    def _look(self) -> None:
        self._seen.append((time.perf_counter(), loopback_bytes()))
