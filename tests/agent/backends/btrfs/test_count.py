"""How much of a live copy was changed: told where that can be counted while the coordinator waits."""

from __future__ import annotations

import os
import shutil
import time

from resilver.config import CoordinatorConfig
from resilver.volume import LiveState


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
