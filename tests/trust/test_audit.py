"""Who was not let in is in the audit trail under the name of its certificate, and in the log; and so is who was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from resilver.names import Role
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import coordinator_pb2_grpc
from tests.certificates import CLIENT, Authority, channel, forged
from tests.cluster import Cluster, wait_for

WITHIN_S = 10


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path, "sqlite", authority=Authority(tmp_path / "certs"))
    try:
        made.start_coordinator()
        yield made
    finally:
        made.close()


def test_who_is_let_in_and_who_is_not(cluster: Cluster, tmp_path: Path) -> None:
    target = f"127.0.0.1:{cluster.ports['c1']}"
    authority = cluster.authority
    trusted = Path(authority.issue(Role.VIEWER, "wall").ca).read_bytes()
    two = ("resilver://test/operator/x", "resilver://test/operator/y")
    double = forged(tmp_path / "double", *two, by=authority.held.own, trusted=trusted, usages=(CLIENT,))
    jo, wall, node = (
        authority.issue(role, name) for role, name in ((Role.OPERATOR, "jo"), (Role.VIEWER, "wall"), (Role.NODE, "a"))
    )
    stubs = {
        name: coordinator_pb2_grpc.CoordinatorStub(channel(target, files, Role.COORDINATOR))
        for name, files in (("jo", jo), ("wall", wall), ("a", node), ("double", double))
    }

    def led() -> str:
        with contextlib.suppress(grpc.RpcError):
            return stubs["wall"].GetCluster(api.GetClusterRequest(), timeout=WITHIN_S).store_id
        return ""

    store_id = wait_for(led, "the leader")
    for name in ("wall", "a", "double"):
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                stubs[name].AdoptStore(api.AdoptStoreRequest(store_id=store_id), timeout=WITHIN_S)
            assert caught.value.code() in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
    stubs["jo"].AdoptStore(api.AdoptStoreRequest(store_id=store_id), timeout=WITHIN_S)

    def listed() -> list[api.AuditEntry]:
        found = stubs["wall"].ListAuditEntries(api.ListAuditEntriesRequest(), timeout=WITHIN_S).entries
        return list(found) if sum(one.attempt_count for one in found) == 10 else []

    entries = wait_for(listed, "all ten")
    said = {(one.principal, one.reason): one for one in entries}
    assert set(said) == {
        ("resilver://test/operator/jo", ""),
        ("resilver://test/viewer/wall", "ROLE_NOT_ALLOWED"),
        ("resilver://test/node/a", "ROLE_NOT_ALLOWED"),
        ("127.0.0.1", "NO_CERTIFICATE"),
    }
    assert said["resilver://test/operator/jo", ""].result == api.AUDIT_RESULT_DONE
    assert all(one.method == "AdoptStore" and one.address == "127.0.0.1" for one in entries)
    lines = wait_for(lambda: [line for line in cluster.log("c1").splitlines() if '"audit"' in line], "the log")
    assert any("resilver://test/operator/jo" in line and '"DONE"' in line for line in lines)
    screen = cluster.cli("audit", "--by", "jo", "-o", "table")
    assert "adopt store" in screen.out
