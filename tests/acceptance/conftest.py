"""What the acceptance tests stand on: a real XFS on a loop device and a real cluster, once for each module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, cluster
from tests.loopfs import mounted

DISK_BYTES = 16 << 30  # sparse


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A mounted file system that shares extents."""
    with mounted("xfs", DISK_BYTES) as point:
        yield point


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Etcd and one coordinator; the module's own fixtures bring the agents."""
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        made.start_coordinator()
        yield made
