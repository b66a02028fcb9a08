"""How much of a live copy was changed, or comes free: told where that can be counted, and nothing waits for it."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from resilver.config import CoordinatorConfig
from resilver.volume import LiveState
from tests.agent.backends.btrfs.nodes import pair
from tests.loopfs import run


def test_counting_what_was_changed_never_makes_a_node_late(node, tmp_path, monkeypatch):
    """A comparison that never comes to its end, like one of very many files: it differs, and how much is not known."""
    node.create()
    node.snapshot()
    node.write("new", os.urandom(1 << 20))
    real = shutil.which("btrfs")
    (tmp_path / "btrfs").write_text(f'#!/bin/sh\n"{real}" "$@"\ncase "$*" in *--no-data*) exec sleep 60;; esac\n')
    (tmp_path / "btrfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begun = time.monotonic()
    live = node.backend.examine().live
    assert time.monotonic() - begun < CoordinatorConfig(cluster="prod").examine_timeout_s
    assert (live.state, live.modified_bytes) == (LiveState.MODIFIED, None)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_snapshot_that_cannot_be_sent_hinders_no_drop(node, which):
    """Somebody has left one writable: how much comes free is not known, and all but the tip can go."""
    node.create()
    made = []
    for turn in range(3):
        node.write("a", b"%d" % turn)
        made.append(node.snapshot().id)
    run("btrfs", "property", "set", "-f", node.data(made[which]), "ro", "false")
    assert node.backend.drop(made[1]) == 0
    assert [gone for gone, _freed in node.backend.prune(1, frozenset())] == [made[0]]
    assert [record.id for record in node.lineage if record.present] == [made[2]]


def test_what_cannot_be_counted_is_preserved_all_the_same(node, other):
    """What the snapshot that leaves the lineage stands on was left writable."""
    base = pair(node, other)
    other.write("own", os.urandom(1 << 20))
    only_here = other.snapshot()
    other.write("more", os.urandom(1 << 20))
    run("btrfs", "property", "set", "-f", other.data(base), "ro", "false")
    stage = other.stage_from(node, "")
    kept = other.backend.commit(stage, other.order(node.lineage, replace_own_data=True))
    assert {(copy.based_on, copy.live) for copy in kept} == {(only_here.id, False), (only_here.id, True)}
    assert {copy.live: copy.exclusive_bytes for copy in kept} == {False: None, True: 1 << 20}
