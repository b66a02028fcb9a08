"""One cluster on a network of its own for each module; a test that fails costs it, and the next one gets another."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.loopfs import mounted
from tests.partitions.scattered import Scattered, scattered

DISK_BYTES = 4 << 30  # sparse


class Clusters:
    """Gives the cluster that there is, or makes one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count()
        self._open = contextlib.ExitStack()
        self._made: Scattered | None = None

    def get(self) -> Scattered:
        if self._made is None:
            directory = self._directory / str(next(self._numbers))
            directory.mkdir()
            disk = self._open.enter_context(mounted("xfs", DISK_BYTES))
            self._made = self._open.enter_context(scattered(directory, disk))
        return self._made

    def close(self) -> None:
        self._made = None
        self._open.close()


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    made = Clusters(tmp_path_factory.mktemp("partitions"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def made(clusters: Clusters, request: pytest.FixtureRequest) -> Iterator[Scattered]:
    """A cluster whose network is whole and whose volume is in sync on all nodes; so it must be in the end, too."""
    cluster = clusters.get()
    failed_before = request.session.testsfailed
    whole = False
    try:
        yield cluster
        if request.session.testsfailed == failed_before:
            cluster.settle()
            assert cluster.all_identical()
            assert not cluster.errors()
            whole = True
    finally:
        if not whole:
            cluster.tell_logs()
            clusters.close()


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a figure for whoever reads along."""

    def say(sentence: str) -> None:
        with capsys.disabled():
            print(f"\n  {sentence}", end="", flush=True)  # noqa: T201 - a figure

    return say
