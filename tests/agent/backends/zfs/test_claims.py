"""Two agents that name one dataset, each with a snapshot_dir of its own: the records stay with the first."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from agent.backends.zfs import ZfsBackend
from agent.identity import Identity
from resilver.errors import Refused
from tests.zfsfs import zfs


def test_the_records_of_a_living_agent_stay_where_they_are(replica, tmp_path: Path):
    first, second = (Identity(tmp_path / name, "test", name) for name in ("first", "second"))
    mine = replica.again(state_dir=first.state_dir)
    mine.create()
    mine.snapshot()
    elsewhere = tmp_path / "elsewhere"
    theirs = ZfsBackend(
        mine.name, Path(mine.dataset), elsewhere, state_dir=second.state_dir, reserve_min_bytes=0, reserve_ratio=0.0
    )
    records = f"{mine.dataset}.resilver/records"
    for work in (theirs.examine, theirs.recover):
        with pytest.raises(Refused) as refused:
            work()
        assert refused.value.reason == "IN_USE"
        assert str(first.state_dir) in refused.value.message
        assert zfs("get", "-H", "-o", "value", "mountpoint", records).strip() == str(mine.root)
        assert not elsewhere.exists()
        zfs("unmount", records)  # as a boot leaves them
    mine.snapshot()
    # The one that ends leaves them to the other.
    first.close()
    theirs.recover()
    assert len(theirs.examine().lineage) == 2
    assert zfs("get", "-H", "-o", "value", "mountpoint", records).strip() == str(elsewhere)
    second.close()


def test_who_only_looks_makes_no_order_wait_and_takes_nothing_over(replica, tmp_path: Path):
    agent = Identity(tmp_path / "agent", "test", "a")
    mine = replica.again(state_dir=agent.state_dir)
    mine.create()
    mine.snapshot()
    order = os.open(mine.root, os.O_RDONLY)  # of the agent, which is at work
    fcntl.flock(order, fcntl.LOCK_EX)
    assert replica.again(state_dir=agent.state_dir).backend.examine(compare_live=False).problems == ()
    os.close(order)
    agent.close()
    another = Identity(tmp_path / "another", "test", "b")
    said = (mine.root / "agent.json").read_bytes()
    looker = replica.again(state_dir=another.state_dir).backend
    for compare in (False, True):
        assert len(looker.examine(compare_live=compare).lineage) == 1
        assert (mine.root / "agent.json").read_bytes() == said
    looker.recover()
    assert (mine.root / "agent.json").read_bytes() != said
    another.close()
