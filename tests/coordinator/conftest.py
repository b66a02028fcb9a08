"""A coordinator as a process, for the tests of its services."""

from __future__ import annotations

import pytest

from tests.cluster import Cluster, wait_for


@pytest.fixture
def coordinator(tmp_path):
    """The address of a coordinator that leads, on a store of its own."""
    cluster = Cluster(tmp_path, "sqlite")
    cluster.start_coordinator(extra="heartbeat_s = 1\nnode_timeout_s = 2\n")
    try:
        wait_for(lambda: "serving" in cluster.log("c1") or not cluster.processes["c1"].alive, "the coordinator serves")
        yield f"127.0.0.1:{cluster.ports['c1']}"
        assert cluster.processes["c1"].alive, cluster.log("c1")
        assert "Traceback" not in cluster.log("c1"), cluster.log("c1")
    finally:
        cluster.close()
