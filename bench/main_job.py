"""Times the main job on this machine: a first copy, and a delta of 1 % in scattered 4 KiB blocks, three nodes, XFS.

    sudo .venv/bin/python bench/main_job.py [GIB]

Prints a table: what was selected, what it took, what went over the wire, and the same change brought over
by rsync where that is installed. Absolute times are of this machine; the ratios are what to compare.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.acceptance import images
from tests.cluster import Cluster, cluster
from tests.loopfs import mounted

GIB = 1 << 30
MIB = 1 << 20


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def row(what: str, figure: str) -> None:
    print(f"{what:<52}{figure:>24}")


def copied(started: dict) -> tuple[int, int]:
    """Payload and wire bytes of all runs."""
    runs = started["resyncs"]
    assert all(run["state"] == "SUCCEEDED" for run in runs), runs
    return sum(run["done_bytes"] for run in runs), sum(run["wire_bytes"] for run in runs)


def first_copy(made: Cluster, data_bytes: int) -> None:
    took, started = timed(lambda: made.ok("resync", "vm1", timeout_s=600))
    done, wire = copied(started)
    row(f"first copy, {data_bytes / GIB:.2f} GiB to each of two nodes", f"{took:.2f} s")
    row("  rate, both together", f"{done / took / MIB:.0f} MiB/s")
    row("  wire over payload", f"{wire / done:.4f}")


def delta(made: Cluster, live: Path, size_bytes: int) -> None:
    offsets = images.scattered(size_bytes, size_bytes // images.BLOCK // 100, seed=5)
    images.write(live, offsets, seed=6)
    made.ok("snapshot", "vm1")
    changed = len(offsets) * images.BLOCK
    took, planned = timed(lambda: made.ok("plan", "vm1"))
    (plan,) = planned["volumes"]
    row(f"plan: examine, elect, select {plan['replicas'][0]['range_count']} ranges", f"{took:.2f} s")
    took, started = timed(lambda: made.ok("resync", "vm1", timeout_s=600))
    done, wire = copied(started)
    row(f"delta, {changed / MIB:.0f} MiB to each of two nodes, whole command", f"{took:.2f} s")
    row("  moved over changed", f"{done / 2 / changed:.4f}")
    row("  wire over payload", f"{wire / done:.4f}")


def by_rsync(disk: Path, live: Path, old: Path) -> None:
    if shutil.which("rsync") is None:
        row("rsync --inplace --no-whole-file", "not installed")
        return
    words = ["rsync", "--inplace", "--no-whole-file", str(live), str(disk / "by-rsync.img")]
    shutil.copyfile(old, disk / "by-rsync.img")
    took, _ = timed(lambda: subprocess.run(words, check=True))
    row("the same change by rsync, to one node, no read-back", f"{took:.2f} s")


def main() -> None:
    size_bytes = int(float(sys.argv[1] if sys.argv[1:] else "4") * GIB)
    data_bytes = size_bytes // 4
    work = Path(tempfile.mkdtemp(prefix="resilver-bench-"))
    try:
        with mounted("xfs", size_bytes * 4) as disk, cluster(work) as made:
            made.start_coordinator()
            for node in "abc":
                (disk / node).mkdir()
            live = images.make(disk / "a" / "vm1.img", size_bytes, data_bytes, seed=4, stripe_bytes=4 * MIB)
            for node in "abc":
                made.start_agent(node, {"vm1": disk / node / "vm1.img"})
            made.wait_reachable("vm1", *"abc")
            row(f"volume of {size_bytes / GIB:g} GiB", f"{data_bytes / GIB:.2f} GiB of data")
            first_copy(made, data_bytes)
            subprocess.run(["cp", "--reflink=always", str(live), str(disk / "old.img")], check=True)
            delta(made, live, size_bytes)
            for name in (*"abc", "c1"):
                row(f"peak memory of {name}", f"{made.processes[name].memory_peak_bytes() / MIB:.0f} MiB")
            by_rsync(disk, live, disk / "old.img")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
