"""Us, the whole command: `resilver resync` on a real cluster, from its first word to its last.

A coordinator and two agents, as processes, with their files as an operator would have them. In the time are: starting
the command, examining, planning, the base's check, the transfer, the read-back, the commit, the report, and the
command's waiting. The daemons run while the competitor runs and at no other time.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

from bench.suite.data import Images, change, clone, remove
from bench.suite.measure import Used, Watch, children_cpu_s, cpu_s
from tests.cluster import Cluster

VOLUME: Final = "vm1"
_NODES: Final = ("a", "b")
_QUIET: Final = 'log_level = "warning"\n'
_RESYNC_TIMEOUT_S: Final = 900.0
_NO_RESERVE: Final = "[space]\nreserve_ratio = 0.0\nreserve_min_bytes = 0\n"


class Standing:
    """A cluster whose daemons are started and stopped at will; `directories` are the nodes' places on their disks."""

    def __init__(self, work: Path, directories: dict[str, Path]) -> None:
        self.made = Cluster(work, store="sqlite")
        self.directories = directories

    def live(self, node: str) -> Path:
        return self.directories[node] / f"{VOLUME}.img"

    def start(self, extra: str = "", only: tuple[str, ...] = ()) -> None:
        """Starts the coordinator and all agents, or `only` these; `extra` goes into the agents' files."""
        made, nodes = self.made, only or tuple(self.directories)
        if made.processes:
            for name, process in made.processes.items():
                if name in nodes or name not in self.directories:
                    process.start()
        else:
            made.start_coordinator(extra=_QUIET)
            for node in self.directories:
                made.start_agent(node, {VOLUME: self.live(node)}, extra=_QUIET + extra + _NO_RESERVE)
        made.wait_reachable(VOLUME, *nodes)

    def stop(self) -> None:
        self.made.close()

    def pids(self) -> list[int]:
        return [process.pid for process in self.made.processes.values() if process.alive]

    def resync(self) -> Used:
        """The command, with what all daemons used meanwhile."""
        before = sum(cpu_s(pid) for pid in self.pids()) + children_cpu_s()
        with Watch(*(self.made.processes[node].pid for node in self.directories)) as watch:
            started: dict[str, Any] = self.made.ok("resync", VOLUME, timeout_s=_RESYNC_TIMEOUT_S)
        runs = started["resyncs"]
        if not runs or any(run["state"] != "SUCCEEDED" for run in runs):
            raise RuntimeError(f"the resync has not succeeded: {runs}")
        used = sum(cpu_s(pid) for pid in self.pids()) + children_cpu_s() - before
        stream_bytes = sum(run["wire_bytes"] for run in runs)
        return Used(used, watch.peak_bytes, parts={"stream_bytes": stream_bytes})


class Command:
    """What both kinds of it have in common."""

    name = "resilver resync, the whole command"
    how = (
        "`resilver resync` on a cluster of a coordinator and two agents: examine, plan, move, read back, commit, report"
    )

    def __init__(self, work: Path, directories: dict[str, Path]) -> None:
        self.work, self.directories = work, directories
        self.standing: Standing | None = None

    def missing(self) -> str:
        return ""

    def run(self) -> Used:
        assert self.standing is not None
        return self.standing.resync()

    def result(self) -> None:
        return None


class DeltaCommand(Command):
    """Both nodes hold the volume; before each run as much is changed as the others have to move."""

    def __init__(self, work: Path, directories: dict[str, Path], images: Images) -> None:
        super().__init__(work, directories)
        self.images = images
        self.changes = 0

    def before(self) -> None:
        if self.standing is None:
            self.standing = Standing(Path(tempfile.mkdtemp(prefix="cluster-", dir=self.work)), self.directories)
            for directory in self.directories.values():
                directory.mkdir()
            clone(self.images.before, self.standing.live("a"))
            self.standing.start()
            self.standing.resync()
        else:
            self.standing.start()
        self.changes += 1
        change(self.standing.live("a"), self.images.offsets, self.changes)
        self.standing.made.ok("snapshot", VOLUME)

    def after(self) -> None:
        if self.standing is not None:
            self.standing.stop()


class FirstCommand(Command):
    """A volume that no cluster has seen yet: each run has one of its own."""

    def __init__(self, work: Path, directories: dict[str, Path], source: Path) -> None:
        super().__init__(work, directories)
        self.source = source

    def before(self) -> None:
        self.standing = Standing(Path(tempfile.mkdtemp(prefix="cluster-", dir=self.work)), self.directories)
        for directory in self.directories.values():
            directory.mkdir()
        clone(self.source, self.standing.live("a"))
        self.standing.start()

    def after(self) -> None:
        if self.standing is not None:
            self.standing.stop()
            shutil.rmtree(self.standing.made.directory)
        for directory in self.directories.values():
            remove(directory)
