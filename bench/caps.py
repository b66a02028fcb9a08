"""How closely a node keeps to its caps: bytes on the wire ten times a second, and what any five seconds of them hold.

    sudo .venv/bin/python bench/caps.py [--case NAME]… [--mebibytes 1200] [--json FILE]

All are real processes on this machine, with images of random bytes on one XFS; each case is a first copy. Counted are
the bytes that the source's kernel has had acknowledged on the connections of its block stream (`ss -ti`): headers and
digests are among them. Of every stretch of five seconds between the first byte and the last one of the transfer that
ends first, the fullest and the emptiest are told.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resilver.v1 import coordinator_pb2 as api
from tests import namespace
from tests.cluster import Cluster, cluster
from tests.loopfs import mounted

MIB: Final = 1 << 20
MB: Final = 1_000_000
SAMPLE_S: Final = 0.1
WINDOW_S: Final = 5.0
DISK_BYTES: Final = 16 << 30


@dataclass(frozen=True)
class Case:
    """`targets` are copied to from a, `volumes` to each of them at once; the cap is of a's sending or b's receiving."""

    name: str
    way: str
    cap_bytes_s: int
    targets: tuple[str, ...] = ("b",)
    volumes: int = 1


CASES: Final = (
    Case("in, one transfer", "in", 50 * MB),
    Case("in, three transfers", "in", 50 * MB, volumes=3),
    Case("out, one transfer", "out", 50 * MB),
    Case("out, four transfers to two nodes", "out", 50 * MB, ("b", "c"), 2),
    Case("in, one transfer, low", "in", 1 * MB),
    Case("out, three transfers, low", "out", 1 * MB, volumes=3),
)


@dataclass
class Wire:
    """What has been acknowledged so far, sample by sample; `shares` by connection, with when it last grew."""

    port: int
    samples: list[tuple[float, int]] = field(default_factory=list)
    shares: dict[str, tuple[int, float]] = field(default_factory=dict)

    def look(self) -> None:
        command = ["ss", "-tinH", f"sport = :{self.port}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
        peer, now = "", time.monotonic()
        for row in done.stdout.splitlines():
            if not row.startswith((" ", "\t")):
                peer = row.split()[4]
            counted = re.search(r"\bbytes_acked:(\d+)", row)
            if counted is not None and int(counted[1]) > self.shares.get(peer, (0, 0.0))[0]:
                self.shares[peer] = (int(counted[1]), now)
        self.samples.append((now, sum(count for count, _ in self.shares.values())))

    def within(self) -> list[tuple[float, int]]:
        """From the first byte to the last one of the connection that ends first, of those that moved much."""
        most = max(count for count, _ in self.shares.values())
        end = min(at for count, at in self.shares.values() if count > most / 10)
        first = next((at for at, (_, count) in enumerate(self.samples) if count > MIB // 16), 0)
        return [one for one in self.samples[max(first - 1, 0) :] if one[0] <= end]


@dataclass
class Result:
    name: str
    cap_bytes_s: int
    seconds: float
    mean_ratio: float
    most_ratio: float
    least_ratio: float
    most_of_a_second_ratio: float
    fairness: float
    """What the connection that moved the least has moved, over that which moved the most."""
    load: float


def rates(samples: list[tuple[float, int]], window_s: float) -> list[float]:
    """Bytes a second over every stretch of at least that length, the shortest such from each sample."""
    found, last = [], 0
    for start, before in samples:
        while last < len(samples) and samples[last][0] - start < window_s:
            last += 1
        if last == len(samples):
            break
        found.append((samples[last][1] - before) / (samples[last][0] - start))
    return found


def run(case: Case, directory: Path, disk: Path, mebibytes: int) -> Result:
    names = [f"v{number}" for number in range(case.volumes)]
    total = min(mebibytes * MIB, 28 * case.cap_bytes_s)
    size = total // (case.volumes * len(case.targets)) // MIB * MIB
    with cluster(directory, "sqlite") as made:
        made.start_coordinator(extra='log_level = "warning"\n')
        for node in ("a", *case.targets):
            (disk / node).mkdir(parents=True)
            capped = {"a": ("out", "send"), "b": ("in", "receive")}.get(node, ("", ""))
            limits = "[limits]\nreceive_max_count = 8\nsend_max_count = 8\n"
            if capped[0] == case.way:
                limits += f"{capped[1]}_max_bytes_s = {case.cap_bytes_s}\n"
            if node == "a":
                for name in names:
                    fill(disk / node / f"{name}.img", size)
            made.start_agent(node, {name: disk / node / f"{name}.img" for name in names}, limits)
        for node in ("a", *case.targets):
            for name in names:
                made.wait_reachable(name, node)
        wire = Wire(made.ports["a-stream"])
        made.ask("StartResync", api.StartResyncRequest(volumes=names))
        load, ended = watch(made, wire, names)
        assert ended, "it never ended"
    samples = wire.within()
    spans, seconds = rates(samples, WINDOW_S), rates(samples, 1.0)
    took, moved = samples[-1][0] - samples[0][0], samples[-1][1] - samples[0][1]
    shares = sorted(count for count, _ in wire.shares.values() if count > MIB // 16)
    cap = case.cap_bytes_s
    return Result(
        case.name, cap, took, moved / took / cap, max(spans) / cap, min(spans) / cap, max(seconds) / cap,
        shares[0] / shares[-1], load,
    )  # fmt: skip


def watch(made: Cluster, wire: Wire, names: list[str]) -> tuple[float, bool]:
    """Samples until the first of the transfers has received all; the load meanwhile."""
    until, load = time.monotonic() + 240, 0.0
    next_at = time.monotonic()
    asked = 0
    while time.monotonic() < until:
        wire.look()
        load = max(load, os.getloadavg()[0])
        asked += 1
        if asked % 5 == 0:
            runs = [one for name in names for one in made.resyncs(name)]
            states = {one["state"] for one in runs}
            assert "FAILED" not in states, runs
            if states & {"VERIFYING", "COMMITTING", "SUCCEEDED"}:
                return load, True
        next_at = max(next_at + SAMPLE_S, time.monotonic())
        time.sleep(max(0.0, next_at - time.monotonic()))
    return load, False


def fill(path: Path, size: int) -> None:
    with path.open("wb") as image:
        for _ in range(size // MIB):
            image.write(os.urandom(MIB))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--mebibytes", type=int, default=1200, help="copied in each case, at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    namespace.enter()
    results = []
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        with tempfile.TemporaryDirectory() as directory, mounted("xfs", DISK_BYTES) as disk:
            results.append(run(case, Path(directory), disk, options.mebibytes))
        print(row(results[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1))


def row(one: Result) -> str:
    return (
        f"| {one.name} | {one.cap_bytes_s / MB:g} MB/s | {one.seconds:.0f} s | {one.mean_ratio:.3f} "
        f"| {one.most_ratio:.3f} | {one.least_ratio:.3f} | {one.most_of_a_second_ratio:.3f} | {one.fairness:.2f} "
        f"| {one.load:.0f} |"
    )


if __name__ == "__main__":
    main()
