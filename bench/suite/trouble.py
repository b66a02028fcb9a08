"""What a death costs, and what a second source brings: a cluster whose sources are capped, so that all have time.

Each competitor here is a story: a resync that is left alone, or in which an agent is killed (SIGKILL) once half of the
data has arrived. A killed target is started again at once. What was sent again is told in two ways: by the agents
(`sent again`), and by the loopback's counter (`wire / changed`), which nobody can talk to.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from bench.suite import data
from bench.suite.command import VOLUME, Standing
from bench.suite.data import BLOCK, MIB
from bench.suite.measure import Rate, Used, Watch, cpu_s

CAP_BYTES_S: Final = 50_000_000
END_TIMEOUT_S: Final = 600.0
_LOOK_S: Final = 0.05


class Story:
    """One resync to the node `target`, from all nodes of `sources`; `killed` is the node that dies at half, if any."""

    target: str
    sources: tuple[str, ...]

    def __init__(self, name: str, how: str, stage: Stage, killed: str = "") -> None:
        self.name, self.how = name, how
        self.stage, self.killed = stage, killed
        self._cpu_lost_s = 0.0

    def missing(self) -> str:
        return ""

    def before(self) -> None:
        raise NotImplementedError

    def run(self) -> Used:
        standing = self.stage.standing
        nodes = [*self.sources, self.target]
        pids = [standing.made.processes[node].pid for node in nodes]
        before, self._cpu_lost_s = sum(cpu_s(pid) for pid in pids), 0.0
        with Watch(*pids) as watch, Rate() as rate:
            (started,) = standing.made.ok("resync", VOLUME, "--to", self.target, "--no-wait")["resyncs"]
            at = self._kill_at_half(started["id"]) if self.killed else 0
            run = self._ended(started["id"])
        pids = [standing.made.processes[node].pid for node in nodes if standing.made.processes[node].alive]
        parts: dict[str, float] = {
            "rate_bytes_per_s": rate.bytes_per_s(),
            "resent_bytes": run["resent_bytes"],
            "stream_bytes": run["wire_bytes"],
            "killed_at_bytes": at,
        }
        used = sum(cpu_s(pid) for pid in pids) + self._cpu_lost_s - before
        return Used(used, watch.peak_bytes, parts=parts)

    def result(self) -> None:
        """Compares by itself: the target's live copy with the primary's."""
        one, other = (self.stage.standing.live(node) for node in ("a", self.target))
        differs = data.differing(one, other, [(0, one.stat().st_size)])
        if differs:
            raise AssertionError(f"{self.name}: {differs}")

    def after(self) -> None:
        self.stage.standing.stop()

    def _kill_at_half(self, resync: str) -> int:
        """Kills once half has arrived, as far as the coordinator knows; how much that was."""
        half = self._when(resync, lambda run: run["total_bytes"] and 2 * run["done_bytes"] >= run["total_bytes"])
        if half["end_time"]:
            raise RuntimeError(f"{self.name}: the resync ended before anything could be killed: {half}")
        process = self.stage.standing.made.processes[self.killed]
        self._cpu_lost_s = cpu_s(process.pid)
        process.kill()
        if self.killed == self.target:
            process.start()
        return int(half["done_bytes"])

    def _ended(self, resync: str) -> dict[str, Any]:
        run = self._when(resync, lambda _run: False)
        if run["state"] != "SUCCEEDED":
            raise RuntimeError(f"{self.name}: {run}")
        return run

    def _when(self, resync: str, so: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The resync once it is so, or has ended."""
        until = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < until:
            for run in self.stage.standing.made.resyncs(VOLUME):
                if run["id"] == resync and (run["end_time"] or so(run)):
                    return run
            time.sleep(_LOOK_S)
        raise RuntimeError(f"{self.name}: not within {END_TIMEOUT_S:g} s")


class Stage:
    """The cluster of all stories of one kind, and the volume in it."""

    def __init__(self, standing: Standing, size_bytes: int, cap_bytes_s: int) -> None:
        self.standing, self.size_bytes = standing, size_bytes
        self.extra = f"[limits]\nsend_max_bytes_s = {cap_bytes_s}\n"
        self.changes = 0
        for directory in standing.directories.values():
            directory.mkdir()
        data.fill(standing.live("a"), size_bytes)
        self._sent = False

    def start(self, *nodes: str) -> None:
        """The daemons, with these agents; all replicas are in sync after the first start."""
        if not self._sent:
            self.standing.start(self.extra)
            self.standing.made.ok("resync", VOLUME, timeout_s=END_TIMEOUT_S)
            self.standing.stop()
            self._sent = True
        self.standing.start(self.extra, only=nodes)

    def change(self, changed_bytes: int, piece_bytes: int) -> None:
        """Other bytes in so much of the volume, in pieces of that size that are spread over it."""
        self.changes += 1
        count = changed_bytes // piece_bytes
        apart = self.size_bytes // count // BLOCK * BLOCK
        with self.standing.live("a").open("r+b", buffering=0) as file:
            for number in range(count):
                file.seek(number * apart)
                file.write(data.noise(piece_bytes))
            # An examine would have to wait for it, and has ten seconds: to write 65,536 blocks back takes longer here.
            os.fsync(file.fileno())


class Killed(Story):
    """The target is killed at half of a delta, and goes on."""

    target = "b"
    sources = ("a",)

    def __init__(self, name: str, stage: Stage, changed_bytes: int, piece_bytes: int) -> None:
        how = (
            f"{changed_bytes // MIB} MiB changed in pieces of {piece_bytes >> 10} KiB; `kill -9` of the target at half"
        )
        super().__init__(name, how, stage, killed="b")
        self.changed_bytes, self.piece_bytes = changed_bytes, piece_bytes

    def before(self) -> None:
        self.stage.start("a", "b")
        self.stage.change(self.changed_bytes, self.piece_bytes)
        self.stage.standing.made.ok("snapshot", VOLUME)


class Sourced(Story):
    """The target comes back and has missed a change, which one or two others hold."""

    target = "c"

    def __init__(
        self, name: str, stage: Stage, changed_bytes: int, sources: tuple[str, ...], *, killed: str = ""
    ) -> None:
        how = "`resilver resync --to`, each source capped"
        super().__init__(name, f"{how}; `kill -9` of {killed} at half" if killed else how, stage, killed)
        self.sources, self.changed_bytes = sources, changed_bytes

    def before(self) -> None:
        self.stage.start("a", "b")
        self.stage.change(self.changed_bytes, min(MIB, self.changed_bytes))
        self.stage.standing.made.ok("resync", VOLUME, "--to", "b", timeout_s=END_TIMEOUT_S)
        made = self.stage.standing.made
        if "b" not in self.sources:
            made.processes["b"].stop()
            made.wait_away(VOLUME, "b")
        made.processes["c"].start()
        made.wait_reachable(VOLUME, *self.sources, "c")


@contextlib.contextmanager
def standing(work: Path, directories: dict[str, Path], size_bytes: int, cap_bytes_s: int) -> Iterator[Stage]:
    """A stage whose daemons have ended when the block has, however it ends."""
    work.mkdir()
    made = Standing(work, directories)
    try:
        yield Stage(made, size_bytes, cap_bytes_s)
    finally:
        made.stop()
