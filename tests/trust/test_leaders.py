"""Two coordinators with certificates: another one takes over, and everybody takes it for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.cluster import Cluster, free_port, wait_for


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path, "etcd", authority=Authority(tmp_path / "certs"), lease_ttl_s=4)
    made.ports |= {"c1": free_port(), "c2": free_port()}
    try:
        for name in ("c1", "c2"):
            made.start_coordinator(name)
        for node in ("a", "b"):
            (tmp_path / f"{node}-disk").mkdir()
            if node == "a":
                (tmp_path / "a-disk" / "vm1.img").write_bytes(b"resilver" * (1 << 15))
            made.start_agent(node, {"vm1": tmp_path / f"{node}-disk" / "vm1.img"})
        yield made
    finally:
        made.close()


def test_agents_and_operators_follow_the_lead_from_one_certificate_to_the_other(cluster: Cluster) -> None:
    cluster.wait_reachable("vm1", "a", "b")
    assert [one["state"] for one in cluster.ok("resync", "vm1")["resyncs"]] == ["SUCCEEDED"]
    leader = cluster.leader()
    cluster.processes[leader].kill()
    wait_for(lambda: cluster.leader() not in {"", leader}, "another leader")
    cluster.wait_reachable("vm1", "a", "b")
    cluster.image("a", "vm1").write_bytes(b"RESILVER" * (1 << 15))
    assert [one["state"] for one in cluster.ok("resync", "vm1")["resyncs"]] == ["SUCCEEDED"]
    assert cluster.image("a", "vm1").read_bytes() == cluster.image("b", "vm1").read_bytes()
    for node in ("a", "b"):
        assert '"event": "refused"' not in cluster.log(node)
