"""Mirrors as scripts make them, without us."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from agent.disk import btrfs
from tests.agent.backends.btrfs.nodes import Node, listed
from tests.loopfs import run


def send(source: Path, into: Path, parent: Path | None = None) -> None:
    """What a cron job does."""
    command = ["btrfs", "send", "-q", *(["-p", parent] if parent else []), source]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as sender:
        run_in = subprocess.run(["btrfs", "receive", "-q", into], stdin=sender.stdout, check=False)
    assert sender.returncode == 0
    assert run_in.returncode == 0


class Pair:
    """A primary with five snapshots, of which the secondary has received the first three."""

    def __init__(self, places: tuple[Path, Path], snapshots: str = "snaps", backups: str = "backup") -> None:
        self.places = places
        self.node = Node(places[0])
        self.other = Node(places[1], adopt=(f"{backups}/vm1.*",))
        self.node.create()
        self.node.write("big", os.urandom(4 << 20))
        self.snaps, self.backups = places[0] / snapshots, places[1] / backups
        self.snaps.mkdir(parents=True)
        self.backups.mkdir(parents=True)
        for turn in range(1, 6):
            self.node.write(f"n{turn}", os.urandom(50_000))
            run("btrfs", "subvolume", "snapshot", "-r", self.node.path, self.snaps / f"vm1.{turn}")
            if turn <= 3:
                send(self.snaps / f"vm1.{turn}", self.backups, self.snaps / f"vm1.{turn - 1}" if turn > 1 else None)

    def theirs(self) -> list[str]:
        """All that btrfs-progs say of the snapshots that are not ours."""
        lines = [line for place in self.places for line in listed(place)]
        return [line for line in lines if "/vm1." in line]

    def native(self, turn: int) -> str:
        return btrfs.info(self.snaps / f"vm1.{turn}").uuid


def snapshots_of(live: Path, into: Path, count: int = 3) -> None:
    """What a tool takes, with a change between any two."""
    into.mkdir()
    for turn in range(count):
        (live / "turn").write_bytes(os.urandom(50_000))
        run("btrfs", "subvolume", "snapshot", "-r", live, into / f"vm1.{turn}")
