"""Memory and time follow what changed, not the size of the volume."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import images
from tests.acceptance.images import BLOCK, MIB, identical
from tests.cluster import Cluster, cluster
from tests.loopfs import needs_root, run

pytestmark = needs_root

SMALL_BYTES = 4 << 30
LARGE_BYTES = 16 << 40
DATA_BYTES = 100 * MIB
CHANGED_BLOCKS = SMALL_BYTES // BLOCK // 100  # 10,485, as many as 1 % of 4 GiB
HOLE = (256 << 30, 512 << 30)
AGENT_BYTES_MAX = 200 * MIB
COORDINATOR_BYTES_MAX = 150 * MIB
GROWTH_BYTES_MAX = 30 * MIB
STEP_S_MAX = 30.0
NODES = ("a", "b", "c")


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Cluster]:
    """Three nodes; `small` and `large` have as much data, on `a` alone."""
    with cluster(tmp_path_factory.mktemp("memory")) as made:
        made.start_coordinator()
        for seed, (volume, size_bytes) in enumerate({"small": SMALL_BYTES, "large": LARGE_BYTES}.items()):
            images.make(disk / "a" / f"{volume}.img", size_bytes, DATA_BYTES, seed)
        for node in NODES:
            (disk / node).mkdir(exist_ok=True)
            made.start_agent(node, {volume: disk / node / f"{volume}.img" for volume in ("small", "large")})
        for volume in ("small", "large"):
            made.wait_reachable(volume, *NODES)
        yield made


def resync(made: Cluster, volume: str) -> list[Any]:
    """The runs of a resync that brings both secondaries over, within the time that the work takes."""
    begun = time.monotonic()
    runs = made.ok("resync", volume)["resyncs"]
    assert time.monotonic() - begun < STEP_S_MAX
    assert [one["state"] for one in runs] == ["SUCCEEDED"] * 2
    return list(runs)


def peaks(made: Cluster) -> dict[str, int]:
    return {name: made.processes[name].memory_peak_bytes() for name in (*NODES, "c1")}


def through(made: Cluster, volume: str, size_bytes: int) -> None:
    """A first copy, and a delta of ten thousand blocks."""
    for copied in resync(made, volume):
        assert copied["done_bytes"] == DATA_BYTES
    images.write(made.image("a", volume), images.scattered(size_bytes, CHANGED_BLOCKS, seed=3), seed=3)
    for copied in resync(made, volume):
        assert (copied["done_bytes"], copied["range_count"]) == (CHANGED_BLOCKS * BLOCK, CHANGED_BLOCKS)
    for node in ("b", "c"):
        assert identical(made.image("a", volume), made.image(node, volume))


def test_memory_and_time_do_not_grow_with_the_volume(trio: Cluster) -> None:
    through(trio, "small", SMALL_BYTES)
    before = peaks(trio)
    through(trio, "large", LARGE_BYTES)
    after = peaks(trio)
    for name in NODES:
        assert after[name] < AGENT_BYTES_MAX
        assert after[name] - before[name] < GROWTH_BYTES_MAX
    assert after["c1"] < COORDINATOR_BYTES_MAX
    assert after["c1"] - before["c1"] < GROWTH_BYTES_MAX


def test_a_hole_of_half_a_tib_is_a_hole_everywhere(trio: Cluster) -> None:
    trio.ok("resync", "large")
    live = trio.image("a", "large")
    offset, length = HOLE
    run("fallocate", "--punch-hole", "--offset", str(offset), "--length", str(length), live)
    for done in resync(trio, "large"):
        assert (done["done_bytes"], done["wire_bytes"]) == (0, 0)
    for node in NODES:
        image = trio.image(node, "large")
        with image.open("rb") as file:
            assert os.lseek(file.fileno(), offset, os.SEEK_DATA) >= offset + length
        assert identical(live, image)
    assert max(peaks(trio)[node] for node in NODES) < AGENT_BYTES_MAX
