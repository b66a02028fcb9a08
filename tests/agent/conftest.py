"""One file system that shares extents and one that does not, for all tests of agents as processes."""

from __future__ import annotations

import os

import pytest

from tests.loopfs import mounted


@pytest.fixture(scope="session")
def xfs(tmp_path_factory):
    """A mounted XFS; where only plain files can be had, a directory: everything then works by copies."""
    if os.geteuid() != 0:
        yield tmp_path_factory.mktemp("plain")
        return
    with mounted("xfs", 1 << 30) as point:
        yield point
