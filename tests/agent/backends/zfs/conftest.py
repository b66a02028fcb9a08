"""One zfs-fuse for the session, and a pool for each node of each test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agent.backends.zfs.replica import Replica, close_stages
from tests.zfsfs import Zfs, running, unavailable


@pytest.fixture(scope="session")
def service() -> Iterator[Zfs]:
    if unavailable():
        pytest.skip(unavailable())
    with running() as made:
        yield made


@pytest.fixture
def node(service: Zfs, tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Makes a replica on a pool of its own."""
    with contextlib.ExitStack() as stack:

        def make(name: str = "vm1", size_bytes: int = 1 << 30) -> Replica:
            pool = stack.enter_context(service.pool(size_bytes))
            work = tmp_path / pool
            work.mkdir()
            return Replica(pool, work, name)

        yield make
        close_stages()


@pytest.fixture
def replica(node: Callable[..., Replica]) -> Replica:
    return node()


@pytest.fixture
def other(node: Callable[..., Replica]) -> Replica:
    return node()


@pytest.fixture
def third(node: Callable[..., Replica]) -> Replica:
    return node()
