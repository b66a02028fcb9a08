"""One mount of each kind of file system for the session, and a replica in a directory of its own for each test."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agent.backends.replica import STAGES, Replica, noise
from tests.loopfs import KINDS, mounted


@pytest.fixture(scope="session")
def mounts() -> Iterator[Callable[[str], Path]]:
    """Mounts a kind at first use, and all of them until the end."""
    with contextlib.ExitStack() as stack:
        made: dict[str, Path] = {}

        def mount(kind: str) -> Path:
            if os.geteuid() != 0:
                pytest.skip("only root can mount file systems")
            if kind not in made:
                made[kind] = stack.enter_context(mounted(kind))
            return made[kind]

        yield mount


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def place(mounts: Callable[[str], Path], kind: str) -> Iterator[Path]:
    """An empty directory on that kind of file system."""
    made = mounts(kind) / uuid.uuid4().hex
    made.mkdir()
    yield made
    while STAGES:
        STAGES.pop().close()
    shutil.rmtree(made)


@pytest.fixture
def replica(place: Path) -> Replica:
    return Replica(place / "a")


@pytest.fixture
def other(place: Path) -> Replica:
    """A second node's replica, on the same file system."""
    return Replica(place / "b")


@pytest.fixture
def small(kind: str) -> Iterator[Path]:
    """A file system of its own, which a test may fill."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount file systems")
    with mounted(kind, 320 << 20) as point:
        yield point
        while STAGES:
            STAGES.pop().close()


@pytest.fixture
def stale(replica: Replica, other: Replica) -> tuple[Replica, Replica, str]:
    """A source, a target that lacks its tip, and what they have in common."""
    replica.create()
    base = replica.snapshot().id
    other.receive(replica)
    replica.write(300_000, noise(7, 40_000))
    replica.snapshot()
    return replica, other, base
