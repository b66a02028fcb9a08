"""An agent whose volumes have hooks that write down when they run, and do beside it what a test asks for."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from resilver.errors import ResilverError
from resilver.v1 import agent_pb2, volume_pb2
from tests.agent.agents import MIB, AgentProcess, Leader, until, write_image

VOLUMES = ("vm1", "vm2", "vm3")
HOOK = """#!/bin/sh
echo "$RESILVER_PHASE $RESILVER_VOLUME $RESILVER_NODE $RESILVER_CP ${RESILVER_GROUP:-alone}" >> "$1/log"
if [ -e "$1/$RESILVER_PHASE.$RESILVER_VOLUME" ]; then . "$1/$RESILVER_PHASE.$RESILVER_VOLUME"; fi
"""


@dataclass
class Scene:
    """An agent that is primary of three volumes: `vm1` and `vm2` are the group `db`. All of them have hooks."""

    agent: AgentProcess
    directory: Path
    leaders: dict[str, Leader]

    def does(self, phase: str, volume: str, script: str) -> None:
        """What the volume's hook does beside writing to the log."""
        (self.directory / f"{phase}.{volume}").write_text(script)

    def log(self) -> list[str]:
        path = self.directory / "log"
        return path.read_text().splitlines() if path.exists() else []

    def ran(self) -> list[str]:
        """The phases and volumes in the log; it is empty then."""
        found = [" ".join(line.split()[:2]) for line in self.log()]
        (self.directory / "log").unlink(missing_ok=True)
        return found

    def pending(self) -> list[Path]:
        return list((self.agent.directory / f"state-{self.agent.node}" / "hooks").glob("*.json"))

    def take(self, volume: str = "vm3", **options) -> volume_pb2.SnapshotRecord:
        return self.agent.snapshot(self.leaders[volume], **options)

    def take_together(self, *volumes: str, expected: dict[str, str] | None = None, **options):
        requests = [
            agent_pb2.TakeSnapshotRequest(
                header=self.leaders[volume].header((expected or {}).get(volume)),
                request_id=str(uuid.uuid4()),
                **options,
            )
            for volume in volumes
        ]
        wanted = agent_pb2.TakeSnapshotsRequest(requests=requests, group_id=str(uuid.uuid4()))
        return wanted.group_id, self.agent.call("TakeSnapshots", wanted).snapshots

    def tips(self) -> dict[str, str]:
        return {volume: self.agent.tip(volume) for volume in VOLUMES}

    def pid(self) -> int:
        assert self.agent.process is not None
        return self.agent.process.pid

    def change_config(self, volume: str, extra: str) -> None:
        """Another configuration of the volume, taken on by SIGHUP."""
        self.agent.volume_extras[volume] = extra
        self.agent.write_config()
        count = self.agent.log().count('"reloaded"')
        os.kill(self.pid(), signal.SIGHUP)
        until(lambda: self.agent.log().count('"reloaded"') > count, "the configuration is reloaded")


def hooked(directory: Path, more: str = "timeout_s = 60", *, after: str = "") -> str:
    """The hooks of a volume. Their time is long, so that none runs out of it on a busy machine."""
    program = directory / "hook"
    return (
        f'[volumes.hooks]\nbefore = ["{program}", "{directory}"]\nafter = ["{after or program}", "{directory}"]\n{more}'
    )


@contextlib.contextmanager
def running(tmp_path: Path, xfs: Path) -> Iterator[Scene]:
    place = xfs / uuid.uuid4().hex
    place.mkdir()
    program = tmp_path / "hook"
    program.write_text(HOOK)
    program.chmod(0o700)
    agent = AgentProcess("a", tmp_path, place, VOLUMES, extra='log_format = "json"')
    agent.volume_extras = {volume: f'group = "db"\n{hooked(tmp_path)}' for volume in ("vm1", "vm2")}
    agent.volume_extras["vm3"] = hooked(tmp_path)
    leaders = {volume: Leader(volume=volume) for volume in VOLUMES}
    for volume in VOLUMES:
        write_image(agent.image(volume), MIB)
    try:
        agent.start()
        for leader in leaders.values():
            agent.open_epoch(leader)
        yield Scene(agent, tmp_path, leaders)
    finally:
        agent.close()


def reason_of(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(ResilverError) as raised:
        call()
    return raised.value.reason, raised.value.message
