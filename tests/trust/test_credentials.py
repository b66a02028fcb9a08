"""Files that change, fit or do not fit, and the table of who may do what."""

from __future__ import annotations

import asyncio
import shutil
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from resilver import rpc
from resilver.access import CHANGES_WITH, ROLES, Gate
from resilver.address import Address
from resilver.config import Tls
from resilver.credentials import Credentials, credentials_of
from resilver.errors import Forbidden, Invalid, Unauthenticated
from resilver.names import Name, Role
from resilver.v1 import agent_pb2, coordinator_pb2
from tests.certificates import Authority, forged

NODE_A = Name("test", Role.NODE, "a")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "certs")


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> Tls:
    """Node a's, in a place of their own, to be overwritten."""
    place = tmp_path / "tls"
    shutil.copytree(Path(authority.issue(Role.NODE, "a").cert).parent, place)
    return Tls(ca=str(place / "ca.crt"), cert=str(place / "tls.crt"), key=str(place / "tls.key"))


@pytest.mark.parametrize(
    ("spoil", "field", "says"),
    [
        (lambda f: Path(f.ca).unlink(), "tls.ca", "cannot be read: No such file"),
        (lambda f: Path(f.ca).write_text("nothing"), "tls.ca", "no certificates as PEM"),
        (lambda f: Path(f.cert).write_text("nothing"), "tls.cert", "no certificate as PEM"),
        (lambda f: Path(f.key).write_text("nothing"), "tls.key", "not the key of tls.cert"),
        (lambda f: shutil.copy(f.ca, f.cert), "tls.cert", "names no party"),
        (lambda f: Path(f.key).write_bytes(bytes((1 << 20) + 1)), "tls.key", "no PEM file"),
    ],
)
def test_files_that_are_none(files: Tls, spoil, field: str, says: str) -> None:
    spoil(files)
    with pytest.raises(Invalid, match=says) as caught:
        Credentials(files)
    assert caught.value.metadata["field"] == field


def test_a_process_starts_with_its_own_certificate_alone(files: Tls) -> None:
    made = credentials_of(files, NODE_A)
    assert made is not None
    assert made.name == NODE_A
    for other in (Name("test", Role.NODE, "b"), Name("test", Role.COORDINATOR, "a"), Name("prod", Role.NODE, "a")):
        with pytest.raises(Invalid, match="is of resilver://test/node/a"):
            credentials_of(files, other)
    assert credentials_of(Tls(), NODE_A) is None


def test_an_expired_certificate_is_told_at_the_start_and_may_be_renewed(authority: Authority, tmp_path: Path) -> None:
    """No error: a daemon that starts too late must be able to take on the next one."""
    trusted = Path(authority.issue(Role.NODE, "a").ca).read_bytes()
    spent = forged(
        tmp_path / "spent", str(NODE_A), by=authority.held.own, trusted=trusted,
        begins=timedelta(days=-2), ends=timedelta(days=-1),
    )  # fmt: skip
    with capture_logs() as logs:
        credentials_of(spent, NODE_A)
    assert [line["log_level"] for line in logs] == ["error"]
    assert "expired" in logs[0]["event"]


def test_a_pair_that_is_half_written_is_told_once_and_the_old_one_goes_on(authority: Authority, files: Tls) -> None:
    made = Credentials(files)
    authority.renew(Role.NODE, "a")
    new = authority.issue(Role.NODE, "a")
    with capture_logs() as logs:
        assert made.number == 1
        shutil.copy(new.cert, files.cert)
        assert [made.number for _ in range(3)] == [1, 1, 1]
        assert [line["log_level"] for line in logs] == ["warning"]
        assert "not the key of tls.cert" in logs[0]["why"]
        Path(files.key).write_bytes(Path(new.key).read_bytes()[:40])
        assert [made.number for _ in range(3)] == [1, 1, 1]
        assert len(logs) == 2
        shutil.copy(new.key, files.key)
        assert [made.number for _ in range(3)] == [2, 2, 2]
    assert [line["log_level"] for line in logs] == ["warning", "warning", "info"]


def test_files_that_go_away_or_are_somebody_elses_are_not_taken_on(authority: Authority, files: Tls) -> None:
    made = Credentials(files)
    b = authority.issue(Role.NODE, "b")
    with capture_logs() as logs:
        for ours, theirs in ((files.cert, b.cert), (files.key, b.key)):
            shutil.copy(theirs, ours)
        assert made.number == 1
        assert made.name == NODE_A
        Path(files.ca).unlink()
        assert made.number == 1
    assert ["is of resilver://test/node/b" in line["why"] for line in logs] == [True, False]


def test_every_rpc_of_ours_stands_in_the_table() -> None:
    ours = [
        f"/{service.full_name}/{method.name}"
        for module in (agent_pb2, coordinator_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    assert set(ours) == {path for path in ROLES if path.startswith("/resilver.")}
    for path, field in CHANGES_WITH.items():
        request = getattr(coordinator_pb2, path.rpartition("/")[2] + "Request")()
        assert getattr(request, field) is False


class Asked:
    """What gRPC tells of a call."""

    def __init__(self, *uris: str, version: str = "TLSv1.3", cert: str = "") -> None:
        self._auth = {"peer_uri": [uri.encode() for uri in uris]}
        if cert:
            self._auth["x509_pem_cert"] = [Path(cert).read_bytes()]
        if version:
            self._auth["ssl_tls_version"] = [version.encode()]

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._auth


def test_an_rpc_that_stands_in_no_table_is_refused() -> None:
    gate = Gate("test")
    for role in Role:
        with pytest.raises(Forbidden, match="it is for nobody"):
            gate.admit("/resilver.v1.Coordinator/EraseEverything", None, Asked(f"resilver://test/{role.value}/x"))
        gate.admit("/grpc.health.v1.Health/Check", None, Asked(f"resilver://test/{role.value}/x"))
    with pytest.raises(Unauthenticated, match=r"TLSv1\.3"):
        gate.admit("/grpc.health.v1.Health/Check", None, Asked("resilver://test/viewer/x", version="TLSv1.2"))


def test_a_version_that_is_not_told_is_no_name() -> None:
    """As with the oldest gRPC that we take, and on a port without TLS."""
    gate = Gate("test")
    gate.admit("/grpc.health.v1.Health/Check", None, Asked("resilver://test/viewer/x", version=""))
    with pytest.raises(Unauthenticated, match="names no party"):
        gate.admit("/grpc.health.v1.Health/Check", None, Asked(version=""))


def test_a_certificate_that_ends_while_its_connection_is_open_is_refused(authority: Authority, tmp_path: Path) -> None:
    gate, uri = Gate("test"), "resilver://test/viewer/x"
    trusted = Path(authority.issue(Role.NODE, "a").ca).read_bytes()
    for ends, refused in ((timedelta(hours=1), False), (timedelta(seconds=-1), True)):
        files = forged(tmp_path / str(refused), uri, by=authority.held.own, trusted=trusted, ends=ends)
        asked = Asked(uri, cert=files.cert)
        if refused:
            with pytest.raises(Unauthenticated, match="has ended"):
                gate.admit("/grpc.health.v1.Health/Check", None, asked)
        else:
            gate.admit("/grpc.health.v1.Health/Check", None, asked)


async def test_a_connection_has_an_age_and_whoever_has_one_must_make_another(authority, monkeypatch) -> None:
    monkeypatch.setattr(
        rpc, "_SECURED", (("grpc.max_connection_age_ms", 500), ("grpc.max_connection_age_grace_ms", 500))
    )
    tls = Credentials(authority.issue(Role.COORDINATOR, "c1"))
    server = rpc.make_server(tls=tls)
    await rpc.add_health_and_reflection(server, [])
    port = rpc.bind(server, Address("127.0.0.1", 0), tls=tls)
    await server.start()
    mine = Credentials(authority.issue(Role.NODE, "a"))
    async with rpc.make_channel(f"127.0.0.1:{port}", tls=mine) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watching = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert await asyncio.wait_for(watching.code(), 60) is grpc.StatusCode.UNAVAILABLE
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20, wait_for_ready=True)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.stop(None)
