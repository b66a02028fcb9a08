"""Options that all tests share, and which of them are kept for a thorough run.

A thorough run (`make thorough`) takes hours on a small machine: every kind of volume killed at every step, in every
state that a target can be in. The ordinary one keeps the same steps for one kind of each shape, and some of the rest.
"""

from __future__ import annotations

import os
import re
import signal

import pytest

import resilver  # noqa: F401 - before every import of gRPC, of which it sets what versions of TLS it speaks
from tests import namespace

_PATTERNS = (
    # Killed at each step: all states of a target on XFS.
    r"conformance/test_crash\.py::test_killed_in_a_commit\[btrfs",
    r"conformance/test_crash\.py::.*\[image-(btrfs|ext4)",
    r"conformance/test_crash\.py::test_(?!killed_in_a_commit|killed_in_a_snapshot).*\[btrfs",
    # A failing disk: each step on XFS, in the states that take all steps; every call is thorough.
    r"conformance/test_disk_faults\.py::test_a_fault_of_every_call",
    r"conformance/test_disk_faults\.py::test_a_fault_in_a_commit\[(?!image-xfs-diverged-new)",
    r"conformance/test_disk_faults\.py::test_a_fault_in_a_(snapshot|drop)\[(?!image-xfs-same)",
    r"conformance/test_disk_faults\.py::test_a_fault_in_a_prune\[(?!image-xfs-new)",
    r"conformance/test_disk_faults\.py::test_a_fault_while_receiving\[(?!image-xfs-diverged-.*-same)",
    r"conformance/test_disk_faults\.py::test_a_fault_while_a_record_is_kept\[(?!image-xfs|btrfs)",
    r"agent/test_failing_disk\.py::test_a_run_on_a_failing_disk.*\[ENOSPC",
    r"agent/test_failing_disk\.py::test_a_mount_is_never_left_frozen\[EIO",
    r"backends/test_compact\.py::test_a_fault_at_every_step\[(?!EIO-IO_ERROR-lasting-xfs)",
    # Compacting beside everything: all on XFS.
    r"backends/test_compact\.py::.*\[btrfs",
    r"backends/test_trail\.py::.*(btrfs-compressed|ext4)",
    r"conformance/test_history\.py::.*\[(image-btrfs|image-ext4|image-compressed)",
    # zfs-fuse takes seconds for each replica: the looks and commits of the suite for all, and what only ZFS has.
    r"conformance/test_(?!looking|letting_go|claims|commit).*\[zfs",
    r"conformance/test_commit\.py::test_(?!commit\[zfs-(stale|diverged|written|newcomer)\]).*\[zfs",
    r"conformance/test_letting_go\.py::test_(prune|the_preserved|what_was_dropped).*\[zfs",
    r"backends/zfs/test_use\.py::test_a_target_in_use",
    r"backends/zfs/test_troubles\.py::test_(?!holds_|a_pool|datasets)",
    r"backends/zfs/test_cut_off\.py::test_a_(cut_off|taking_back)",
    r"backends/zfs/test_strangers\.py::test_a_pair_of_plain_scripts",
    # On Btrfs a transfer takes a second: some of the suite's walks through several.
    r"conformance/test_receiving\.py::test_(receive_again_and_again|the_other_way_round).*\[btrfs",
    r"conformance/test_commit\.py::test_it_goes_on_as_a_replica_like_any_other\[btrfs",
    r"conformance/test_letting_go\.py::test_prune_and_receive_go_together\[btrfs",
    # The story of files: the ordinary tests tell the first copy of it on Btrfs.
    r"acceptance/test_trees\.py::.*\[(image|zfs)\]",
    r"acceptance/test_trees\.py::test_a_(receiver|primary|database|node_that_missed)",
    # Which of the agent's rights are needed: the ordinary tests hold that they are enough.
    r"agent/test_capabilities\.py::test_(without_any_one|an_agent_mirrors_a_tree)",
    # Renewing a certificate is ordinary; replacing the authority is the same, for everybody.
    r"trust/test_rotation\.py",
    # What random moments and the large add to the steps and sizes that the ordinary tests take one by one.
    r"acceptance/test_in_use\.py::test_a_(disk_that_is_full|kill_at_any_moment)",
    r"acceptance/test_memory\.py::test_memory_and_time",
    r"acceptance/test_hooks\.py::test_a_database_on_two",
    r"acceptance/test_delta\.py::test_every_node_that_has",
    r"acceptance/test_election\.py::test_the_old_primary_comes_back.*\[quiet",
    r"campaign/test_kills\.py",
    r"acceptance/test_crash\.py::test_a_transfer_outlives",
    r"partitions/test_partitions\.py::test_a_transfer_(waits|needs|goes_on)",
    r"partitions/test_links\.py::test_a_link_that_flaps",
    r"conformance/test_in_use\.py::.*\[image-(btrfs|ext4)",
    r"conformance/test_history\.py::.*\[btrfs",
    r"acceptance/test_adoption_zfs\.py::test_the_next_delta",
    # How long the store is away makes no difference, once it is longer than a lease.
    r"leaders/test_leaders\.py::.*(\[a-minute|\[shortly-killed|turn\[killed)",
    # Partitions: the ordinary tests cut the primary's half off, and hang one of two sources.
    r"partitions/test_partitions\.py::test_of_two_halves_one_acts\[c\]",
    r"partitions/test_links\.py::test_the_only_source_hangs",
    r"bench/test_suite\.py::test_every_case",
    # The larger models of the protocol.
    r"model/test_model\.py::.*(-deeper|keeps_the_guarantees\[(volume-two-resyncs|volume-three-epochs)\])",
)
THOROUGH = re.compile("|".join(_PATTERNS))
LONG = ("vm/", "acceptance/", "leaders/", "model/", "simulation/", "campaign/", "partitions/", "agent/backends/")
"""Where a file takes minutes: begun first, so that no worker is left alone with one at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="accept what was found as the new golden text")


def pytest_configure() -> None:
    """What the tests mount is gone with them, also after a kill; and Ctrl-C works, whatever the shell says."""
    namespace.enter()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is thorough is left out, unless it is asked for, here or by its own name; what takes long goes first."""
    items.sort(
        key=lambda item: next((at for at, place in enumerate(LONG) if f"tests/{place}" in item.nodeid), len(LONG))
    )
    thorough = os.environ.get("RESILVER_THOROUGH") or any("::" in argument for argument in config.args)
    left_out = [item for item in items if not thorough and THOROUGH.search(item.nodeid)]
    if not os.environ.get("RESILVER_TEST_OPENZFS"):
        left_out += [item for item in items if "backends/zfs/test_openzfs.py" in item.nodeid]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
