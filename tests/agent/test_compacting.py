"""A running agent puts a torn image together by itself, and is there for orders meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from agent.disk import ioctl
from tests.agent.agents import MIB, Leader, agents, until
from tests.agent.backends.replica import digest

SIZE_BYTES = 256 * MIB


def extent_count(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return ioctl.extent_count(fd)
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount file systems")
def test_a_torn_image_is_compacted(tmp_path, xfs):
    with agents(tmp_path, xfs, "a") as (agent,):
        leader, path = Leader(), agent.image()
        with path.open("wb") as file:
            for _ in range(SIZE_BYTES // MIB):
                file.write(os.urandom(MIB))
        agent.open_epoch(leader)
        first = agent.snapshot(leader, opening=True)
        with path.open("r+b") as file:
            for at in range(0, SIZE_BYTES, 8192):
                file.seek(at)
                file.write(os.urandom(4096))
        second = agent.snapshot(leader)
        snapshots = [agent.snapshot_data("vm1", taken.id) for taken in (first, second)]
        torn, before = extent_count(snapshots[1]), [digest(each) for each in (path, *snapshots)]
        assert torn > 60_000
        until(lambda: extent_count(snapshots[1]) < torn - 3000, "several parts are compacted", 90)
        size = agent.prepare(leader, "r1", first.id, second.id, "b", size_only=True)
        assert size.delta_bytes == SIZE_BYTES // 2
        third = agent.snapshot(leader)
        assert agent.tip() == third.id
        assert [digest(each) for each in (path, *snapshots)] == before
    shutil.rmtree(xfs / "a")
