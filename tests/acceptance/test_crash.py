"""Whatever is killed in the middle of a transfer, it goes on: the receiver, its sources, the coordinator, the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import images
from tests.acceptance.images import MIB, identical
from tests.cluster import Cluster, Process, cluster, wait_for
from tests.loopfs import needs_root

pytestmark = needs_root

LARGE_BYTES = 1 << 30
BYTES = 160 * MIB
AGAIN_BYTES_MAX = 16 * MIB
OTHER_READS_MAX = 4 * MIB
RECORD_BYTES = 48
NODES = ("a", "b", "c")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Cluster]:
    """Three nodes in sync on `vm1`; `large` is on two of them, with data on `a` alone."""
    with cluster(tmp_path_factory.mktemp("crash")) as made:
        made.start_coordinator()
        images.make(disk / "a" / "vm1.img", BYTES, BYTES, seed=1)
        images.make(disk / "a" / "large.img", LARGE_BYTES, LARGE_BYTES, seed=2)
        for node in NODES:
            (disk / node).mkdir(exist_ok=True)
            volumes = {"vm1", "large"} if node != "c" else {"vm1"}
            made.start_agent(node, {volume: disk / node / f"{volume}.img" for volume in sorted(volumes)})
        made.wait_reachable("vm1", *NODES)
        made.ok("resync", "vm1")
        yield made


class Transfer:
    """A resync to one node that has begun, and is not over."""

    def __init__(self, made: Cluster, volume: str, node: str, *, at_least_bytes: int = 8 * MIB) -> None:
        self.made, self.volume, self.node = made, volume, node
        self.journal = made.records(node, volume) / "stage" / "journal.bin"
        (started,) = made.ok("resync", volume, "--to", node, "--no-wait")["resyncs"]
        self.id: str = started["id"]
        self.target: str = started["plan"]["target"]
        wait_for(lambda: self.journaled_bytes() >= at_least_bytes, "a part is there", every_s=0.002)

    def journaled_bytes(self) -> int:
        """About how much of it is safely on the target's disk: one record for each MiB, and a few headers."""
        try:
            return self.journal.stat().st_size // RECORD_BYTES * MIB
        except FileNotFoundError:
            return 0

    def on_disk(self) -> bool:
        """Whether the target has become its tip, as the disk says: no daemon is asked."""
        return self.made.snapshot_data(self.node, self.volume, self.target).exists() and not self.journal.exists()

    def shown(self) -> Any:
        """The resync as the coordinator shows it; None while there is no coordinator that knows it."""
        return next((run for run in self.made.resyncs(self.volume) if run["id"] == self.id), None)

    def succeeds(self) -> Any:
        """The resync, once the coordinator shows that it has ended, which must be well."""

        def final() -> Any:
            run = self.shown()
            return run if run is not None and run["end_time"] else None

        run = wait_for(final, f"{self.volume} on {self.node} ends", 60.0)
        assert run["state"] == "SUCCEEDED", run
        assert run["done_bytes"] == run["total_bytes"]
        assert identical(self.made.image("a", self.volume), self.made.image(self.node, self.volume))
        return run


def rewrite(made: Cluster, seed: int) -> None:
    """New bytes in all of `vm1`."""
    images.make(made.image("a", "vm1"), BYTES, BYTES, seed)


def read_bytes(process: Process) -> int:
    """What a process has read so far: of a source, what it has sent, its records, and who has what open (/proc)."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    return int(fields["rchar"])


def test_a_receiver_that_is_killed_goes_on_and_little_is_sent_again(three: Cluster) -> None:
    source, target = three.processes["a"], three.processes["b"]
    before = read_bytes(source)
    transfer = Transfer(three, "large", "b", at_least_bytes=400 * MIB)
    target.kill()
    assert not transfer.on_disk()
    assert not three.image("b", "large").exists()
    kept = transfer.journaled_bytes()
    target.start()
    run = transfer.succeeds()
    assert kept < LARGE_BYTES
    assert LARGE_BYTES <= read_bytes(source) - before <= LARGE_BYTES + AGAIN_BYTES_MAX + OTHER_READS_MAX
    assert run["resent_bytes"] <= AGAIN_BYTES_MAX
    assert 0 <= run["wire_bytes"] - run["done_bytes"] <= AGAIN_BYTES_MAX


def test_a_transfer_outlives_the_coordinator(three: Cluster) -> None:
    rewrite(three, seed=11)
    transfer = Transfer(three, "vm1", "b")
    three.processes["c1"].kill()
    assert not transfer.on_disk()
    wait_for(transfer.on_disk, "the transfer ends without a coordinator")
    three.restart("c1")
    transfer.succeeds()
    three.wait_state("vm1", "b", "IN_SYNC")


def test_a_transfer_outlives_the_store(three: Cluster) -> None:
    rewrite(three, seed=12)
    transfer = Transfer(three, "vm1", "b")
    three.processes["etcd"].kill()
    assert not transfer.on_disk()
    wait_for(transfer.on_disk, "the transfer ends without a store")
    three.restart("etcd")
    transfer.succeeds()
    three.wait_state("vm1", "b", "IN_SYNC")


def test_another_replica_takes_over_from_a_source_that_is_killed(three: Cluster) -> None:
    rewrite(three, seed=14)
    three.ok("resync", "vm1", "--to", "b")
    transfer = Transfer(three, "vm1", "c")
    three.processes["a"].kill()
    assert not transfer.on_disk()
    run = transfer.succeeds()
    came = {source["node"]: source["wire_bytes"] for source in run["sources"]}
    assert came["a"] > 0
    assert came["b"] > 0
    three.restart("a")
    three.wait_state("vm1", "c", "IN_SYNC")


def test_the_only_source_is_waited_for(three: Cluster) -> None:
    three.processes["b"].stop()
    rewrite(three, seed=13)
    transfer = Transfer(three, "vm1", "c")
    three.processes["a"].kill()
    three.wait_away("vm1", "a")
    wait_for(lambda: transfer.shown()["state"] == "TRANSFERRING", "it is shown to wait")
    assert not transfer.on_disk()
    three.restart("a")
    transfer.succeeds()
