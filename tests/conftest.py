"""Options that all tests share, and which of them are kept for a thorough run.

A thorough run (`make thorough`) takes hours on a small machine: every kind of volume killed at every step, in every
state that a target can be in. The ordinary one keeps the same steps for one kind of each shape, and some of the rest.
"""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests import namespace

_PATTERNS = (
    # Killed at each step: all states of a target on XFS, one on Btrfs.
    r"conformance/test_crash\.py::test_killed_in_a_commit\[btrfs-(?!stale\])",
    r"conformance/test_crash\.py::.*\[image-(btrfs|ext4)",
    r"conformance/test_crash\.py::test_(?!killed_in_a_commit|killed_in_a_snapshot).*\[btrfs",
    r"backends/zfs/test_crash\.py::test_(?!killed_in_a_snapshot)",
    r"backends/btrfs/test_crash\.py::test_killed_in_a_commit",
    # Compacting beside everything: all on XFS.
    r"backends/test_compact\.py::.*\[btrfs",
    r"backends/test_trail\.py::.*btrfs-compressed",
    r"conformance/test_history\.py::.*\[(image-btrfs|image-ext4|image-compressed)",
    # zfs-fuse takes seconds for each replica: some commits and the looks of the suite for all kinds, and what only
    # ZFS has.
    r"conformance/test_(?!looking|commit|letting_go).*\[zfs",
    r"conformance/test_commit\.py::(?!test_commit\[zfs-(stale|diverged|written)\]).*\[zfs",
    r"conformance/test_letting_go\.py::test_prune.*\[zfs",
    r"backends/zfs/test_use\.py::test_a_target_in_use",
    r"backends/zfs/test_troubles\.py::test_(?!what_|holds_|a_pool|datasets|pruning)",
    # The story of files: the ordinary tests tell it on Btrfs.
    r"acceptance/test_trees\.py::.*\[(image|zfs)\]",
    # The larger models of the protocol.
    r"model/test_model\.py::.*-deeper",
)
THOROUGH = re.compile("|".join(_PATTERNS))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="accept what was found as the new golden text")


def pytest_configure() -> None:
    """What the tests mount is gone with them, also after a kill; and Ctrl-C works, whatever the shell says."""
    namespace.enter()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is thorough is left out, unless it is asked for, here or by its own name."""
    if os.environ.get("RESILVER_THOROUGH") or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if THOROUGH.search(item.nodeid)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
