"""`kill -9` of any process of a cluster, again and again, while its volume is written to and resynced.

Three agents, two coordinators and three members of etcd, all real processes. One thread writes, asks for consistency
points and resyncs, and notes what was acknowledged; another kills at random moments, seldom more than one process at a
time, and starts again what it killed. Now and then the primary's node stays away: it is given up by name, another one
is written to, and the old one comes back with writes of its own.

At the end, once all run: the replicas are the same byte for byte; every consistency point that was acknowledged is in
the lineage of all of them, or was given up by name and is preserved where it was made; and whatever is still there of
each has the bytes that the volume had when it was taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests import etcd
from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.cluster import Cluster, Ran, wait_for

NODES = ("a", "b", "c")
COORDINATORS = ("c1", "c2")
VOLUME = "vm1"
IMAGE_BYTES = 64 * MIB
DATA_BYTES = 24 * MIB
BLOCKS_AT_ONCE = 200
PAUSE_S = (0.05, 1.5)
DOWN_S = (0.0, 2.0)
GIVE_UP_EVERY = 40
SETTLE_S = 240.0
COMMAND_TIMEOUT_S = 60.0
_RECORD = re.compile(r'\{[^{}]*"parent"[^{}]*\}')


@dataclass(frozen=True)
class Point:
    """A consistency point that was acknowledged: where it was taken, and the volume's bytes then."""

    id: str
    cp: str
    node: str
    digest: str


@dataclass
class Story:
    """What has happened. `given_up` are the nodes whose points an operator has accepted to lose, by name."""

    kills: Counter[str] = field(default_factory=Counter)
    points: list[Point] = field(default_factory=list)
    commands: Counter[str] = field(default_factory=Counter)
    given_up: list[str] = field(default_factory=list)
    preserved: int = 0
    troubles: list[str] = field(default_factory=list)


class Campaign:
    """One cluster and all that is done to it; `run` ends with everything running again and checked."""

    def __init__(self, made: Cluster, store: etcd.Etcd, directory: Path, seed: int) -> None:
        self.made, self.store, self.directory = made, store, directory
        self.chance = random.Random(seed)
        self.story = Story()
        self.primary = "a"
        self._writes = random.Random(seed + 1)
        self._done = threading.Event()
        self._turn = threading.Lock()
        """Held while the volume is written to and its point asked for, and while another node becomes the primary."""

    def start(self) -> None:
        paths = {node: self.directory / node / f"{VOLUME}.img" for node in NODES}
        images.make(paths["a"], IMAGE_BYTES, DATA_BYTES, 1)
        for node in NODES[1:]:
            paths[node].parent.mkdir(parents=True)
        for name in COORDINATORS:
            self.made.start_coordinator(name)
        for node in NODES:
            self.made.start_agent(node, {VOLUME: paths[node]}, volume_extra="keep_last = 10000")
        self.made.wait_reachable(VOLUME, *NODES)
        self.made.ok("resync", VOLUME)

    def run(self, kills: int, give_up_every: int = GIVE_UP_EVERY) -> Story:
        writer = threading.Thread(target=self._guarded, name="writer", daemon=True)
        writer.start()
        try:
            for number in range(1, kills + 1):
                time.sleep(self.chance.uniform(*PAUSE_S))
                self._kill_one()
                if number % give_up_every == 0:
                    self._give_up_primary()
        finally:
            self._done.set()
            writer.join(SETTLE_S)
        assert not writer.is_alive(), "the writer did not end"
        assert not self.story.troubles, self.story.troubles
        self._settle()
        self._check()
        return self.story

    # Killing.

    def _kill_one(self) -> None:
        victim = self.chance.choice([*NODES, *NODES, *COORDINATORS, *COORDINATORS, "etcd"])
        pause_s = self.chance.uniform(*DOWN_S)
        if victim == "etcd":
            index = self.chance.randrange(len(self.store.members))
            self.store.kill(index)
            time.sleep(pause_s)
            self.store.start(index)
            self.store.wait(index)
        else:
            process = self.made.processes[victim]
            assert process.alive, f"{victim} ended by itself:\n{self.made.log(victim)[-4000:]}"
            process.kill()
            time.sleep(pause_s)
            process.start()
        self.story.kills[victim] += 1

    def _give_up_primary(self) -> None:
        """The primary's node stays away; another one is elected by name, and written to from then on."""
        with self._turn:
            old = self.primary
            wait_for(self._point, f"a point that only {old} has", SETTLE_S, every_s=1.0)
            self.made.processes[old].kill()
            self.story.kills[old] += 1
            self.made.wait_away(VOLUME, old)
            elected = wait_for(lambda: self._elected(old), f"{old} is given up", SETTLE_S, every_s=1.0)
            self.primary = elected
            self.story.given_up.append(old)
            # What nobody has seen, and nobody may lose: writes on the old one, which goes on as if nothing were.
            self._write(old)
            self.made.processes[old].start()

    def _elected(self, away: str) -> str:
        ran = self._command("elect", VOLUME, "--accept-loss", away)
        return str(ran.json["winner"]) if ran.code == 0 and ran.json["winner"] != away else ""

    # Writing.

    def _guarded(self) -> None:
        try:
            while not self._done.is_set():
                self._step()
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            self.story.troubles.append(repr(error))

    def _step(self) -> None:
        with self._turn:
            self._point()
        if self._writes.random() < 0.5:
            self._command("resync", VOLUME, "--no-wait")
        time.sleep(self._writes.uniform(0.0, 0.3))

    def _point(self) -> bool:
        """Writes, and asks for a consistency point; whether it was acknowledged."""
        node = self.primary
        self._write(node)
        digest = self._digest(self.made.image(node, VOLUME))
        ran = self._command("snapshot", VOLUME)
        if ran.code == 0:
            (row,) = ran.json["snapshots"]
            self.story.points.append(Point(row["id"], row["cp"], node, digest))
        return ran.code == 0

    def _write(self, node: str) -> None:
        seed = self._writes.randrange(1 << 30)
        images.write(self.made.image(node, VOLUME), images.scattered(IMAGE_BYTES, BLOCKS_AT_ONCE, seed), seed)

    def _command(self, *words: str) -> Ran:
        """A command whose failing is no defect, as long as it says why."""
        ran = self.made.cli("--timeout", "20s", *words, timeout_s=COMMAND_TIMEOUT_S)
        self.story.commands[f"{words[0]} {ran.code}"] += 1
        return ran

    # The end.

    def _settle(self) -> None:
        for node in NODES:
            assert self.made.processes[node].alive, f"{node} ended by itself:\n{self.made.log(node)[-4000:]}"
        try:
            wait_for(self._all_in_sync, "all are in sync", SETTLE_S, every_s=1.0)
        except AssertionError as error:
            error.add_note(self.made.cli("status", "-o", "table").out)
            error.add_note(self.made.cli("resync", VOLUME, "-o", "table").err)
            raise

    def _all_in_sync(self) -> bool:
        rows = self.made.replicas(VOLUME)
        if all(rows.get(node, {}).get("reachable") and rows[node]["state"] == "IN_SYNC" for node in NODES):
            return len({rows[node]["snapshot"] for node in NODES}) == 1
        ran = self._command("resync", VOLUME)
        for node in set(self.story.given_up):
            # Given up for the second time within the hour, and written to: that takes the operator's word.
            if any("KEEPS_BEING_WRITTEN" in line and f"{VOLUME}/{node}" in line for line in ran.err.splitlines()):
                self._command("resync", VOLUME, "--replace", node)
        return False

    def _check(self) -> None:
        live = [self.made.image(node, VOLUME) for node in NODES]
        assert identical(live[0], live[1])
        assert identical(live[0], live[2])
        lineages = {node: self._lineage(node) for node in NODES}
        kept = {row["based_on"]: row for row in self.made.ok("preserved", VOLUME)["preserved"] if not row["live"]}
        for point in self.story.points:
            for node in NODES:
                data = self.made.snapshot_data(node, VOLUME, point.id)
                if data.exists():
                    assert self._digest(data) == point.digest, f"{node} has other bytes as {point}"
            without = [node for node in NODES if point.id not in lineages[node]]
            if without:
                assert point.node in self.story.given_up, f"{point} is gone from {without}"
                assert point.id in kept, f"{point} was given up by name, and is not preserved"
                assert self._digest(Path(kept[point.id]["path"])) == point.digest, (
                    f"the copy of {point} has other bytes"
                )
                self.story.preserved += 1

    def _lineage(self, node: str) -> set[str]:
        """The ids from the node's tip backwards, by the files on its disk."""
        records = self.made.records(node, VOLUME)
        parents: dict[str, str] = {}
        for path in (*records.glob("ancestry.jsonl"), *records.glob("*/record.json")):
            for text in _RECORD.findall(path.read_text()):
                one = json.loads(text)
                parents[one["id"]] = one["parent"]
        at, found = self.made.replicas(VOLUME)[node]["snapshot"], set()
        while at:
            found.add(at)
            at = parents[at]
        return found

    @staticmethod
    def _digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()


@contextlib.contextmanager
def campaign(directory: Path, disk: Path, seed: int) -> Iterator[Campaign]:
    """A cluster whose volume is in sync on three nodes; `disk` is a file system that shares extents."""
    (directory / "etcd").mkdir()
    with etcd.running(directory / "etcd", 3) as store:
        made = Cluster(directory, etcd_url=store.url)
        try:
            one = Campaign(made, store, disk, seed)
            one.start()
            yield one
        finally:
            made.close()
