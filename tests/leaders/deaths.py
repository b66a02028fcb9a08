"""A resync that runs through the deaths of its leaders and of the store, with no byte sent twice.

It is to take long enough for two leases to run out, so everything runs in a network namespace of its own whose loopback
carries so many bytes a second and no more. `python -m tests.leaders.deaths --mib 3072 --rate-mbit 300` is a long one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import namespace
from tests.acceptance import images
from tests.acceptance.images import MIB
from tests.cluster import Cluster, cluster, wait_for
from tests.loopfs import mounted

VOLUME = "vm1"


def in_a_namespace(mib: int, rate_mbit: int, lease_ttl_s: int, timeout_s: float) -> Any:
    """Runs this module where the loopback carries `rate_mbit`; what it tells."""
    words = ["--mib", mib, "--rate-mbit", rate_mbit, "--lease-ttl-s", lease_ttl_s]
    command = ["unshare", "--net", "--", sys.executable, "-m", "tests.leaders.deaths", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return json.loads(done.stdout)


def throttle(rate_mbit: int) -> None:
    """The loopback of a new namespace; refuses where anything is up already."""
    up = subprocess.run(["ip", "-o", "link", "show", "up"], check=True, timeout=10, capture_output=True).stdout
    assert not up, f"not in a network namespace of its own: {up!r}"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
    shape = ["rate", f"{rate_mbit}mbit", "burst", "256kb", "latency", "50ms"]
    subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", "tbf", *shape], check=True, timeout=10)


class Story:
    """One resync of one volume from a to b, and what happens around it."""

    def __init__(self, made: Cluster, disk: Path, mib: int) -> None:
        self.made = made
        self.told: dict[str, Any] = {"leaders": []}
        for name in ("c1", "c2"):
            made.start_coordinator(name)
        images.make(disk / "a" / f"{VOLUME}.img", mib * MIB, mib * MIB, seed=3)
        (disk / "b").mkdir()
        for node in "ab":
            made.start_agent(node, {VOLUME: disk / node / f"{VOLUME}.img"})
        made.wait_reachable(VOLUME, "a", "b")
        (started,) = made.ok("resync", VOLUME, "--no-wait")["resyncs"]
        self.id: str = started["id"]

    def run(self) -> dict[str, Any]:
        """The resync at its end, once two leaders and the store have died in the middle of it."""
        made, begun = self.made, time.monotonic()
        for part in (0.1, 0.35):
            self._wait_part(part)
            leader = made.leader()
            before = self._shown()["done_bytes"]
            made.processes[leader].kill()
            wait_for(lambda: made.leader() not in {"", leader}, "another one leads")  # noqa: B023 - used at once
            wait_for(self._moves, "the resync goes on under it")
            assert self._shown()["done_bytes"] >= before
            self.told["leaders"].append(leader)
            made.restart(leader)
        self._wait_part(0.6)
        made.processes["etcd"].kill()
        wait_for(lambda: not made.leader(), "nobody leads")
        made.restart("etcd")
        wait_for(made.leader, "somebody leads again")
        assert self._shown()["state"] in {"TRANSFERRING", "RUNNING"}, self._shown()
        run = wait_for(lambda: self._shown() if self._shown().get("end_time") else None, "it ends", 600.0)
        assert run["state"] == "SUCCEEDED", run
        made.wait_state(VOLUME, "b", "IN_SYNC")
        assert images.identical(made.image("a", VOLUME), made.image("b", VOLUME))
        return {
            "seconds": round(time.monotonic() - begun, 1),
            "leaders_killed": self.told["leaders"],
            "resyncs": len(made.resyncs(VOLUME)),
            **{key: run[key] for key in ("total_bytes", "done_bytes", "wire_bytes", "resent_bytes")},
        }

    def _shown(self) -> dict[str, Any]:
        return next((run for run in self.made.resyncs(VOLUME) if run["id"] == self.id), {})

    def _wait_part(self, part: float) -> None:
        def there() -> bool:
            run = self._shown()
            total, done = run.get("total_bytes") or 0, run.get("done_bytes") or 0
            return total > 0 and done >= part * total

        wait_for(there, f"{part:.0%} is there", 300.0)

    def _moves(self) -> bool:
        """Whether the new leader has heard of progress since it came."""
        first = self._shown().get("done_bytes") or 0
        return bool(first) and bool(
            wait_for(lambda: (self._shown().get("done_bytes") or 0) > first, "it moves", 30.0, every_s=0.2)
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="unshare --net python -m tests.leaders.deaths")
    parser.add_argument("--mib", type=int, default=3072)
    parser.add_argument("--rate-mbit", type=int, default=300)
    parser.add_argument("--lease-ttl-s", type=int, default=10)
    asked = parser.parse_args()
    namespace.enter()
    throttle(asked.rate_mbit)
    with (
        tempfile.TemporaryDirectory(prefix="deaths-") as directory,
        mounted("xfs", (3 * asked.mib + 1024) * MIB) as disk,
        cluster(Path(directory)) as made,
    ):
        made.lease_ttl_s = asked.lease_ttl_s
        sys.stdout.write(json.dumps(Story(made, disk, asked.mib).run()) + "\n")


if __name__ == "__main__":
    main()
