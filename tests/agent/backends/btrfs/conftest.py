"""Two Btrfs for the session, as two nodes, and a directory of its own on each for every test."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.backends.btrfs_layout import remove
from agent.disk import btrfs
from tests.agent.backends.btrfs.nodes import Node
from tests.loopfs import mounted


@pytest.fixture(scope="session")
def disks() -> Iterator[tuple[Path, Path]]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(mounted("btrfs")), stack.enter_context(mounted("btrfs-compressed"))


@pytest.fixture
def places(disks: tuple[Path, Path]) -> Iterator[tuple[Path, Path]]:
    """An empty directory on each; names with a space and beyond ASCII, as people have them."""
    made = tuple(disk / f"größe {uuid.uuid4().hex[:8]}" for disk in disks)
    for place in made:
        place.mkdir()
    yield made
    for place in made:
        cleared(place)


def cleared(place: Path) -> None:
    """Removes all that a test has left there, subvolumes within subvolumes too."""
    while True:
        inner = [found for found in btrfs.subvolumes(place) if found.path.startswith(btrfs.place_of(place)[1] + "/")]
        if not inner:
            break
        deepest = max(inner, key=lambda found: found.path.count("/"))
        path = Path(btrfs.place_of(place)[0].point + deepest.path)
        for above in path.relative_to(place).parents:  # nothing is removed from one that is read-only
            if btrfs.is_subvolume(place / above):
                btrfs.set_read_only(place / above, read_only=False)
        btrfs.destroy(path)
    remove(place)


@pytest.fixture
def node(places: tuple[Path, Path]) -> Node:
    return Node(places[0] / "a")


@pytest.fixture
def other(places: tuple[Path, Path]) -> Node:
    """A second node, on another file system."""
    return Node(places[1] / "b")


@pytest.fixture
def small() -> Iterator[Path]:
    """A file system of its own, which a test may fill."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    with mounted("btrfs", 512 << 20) as point:
        yield point
