"""Certificates that are renewed while a volume is copied: nothing notices, and what comes after uses the new ones."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from resilver.names import Role
from tests.acceptance import images
from tests.cluster import Cluster, wait_for
from tests.loopfs import needs_root
from tests.trust.pair import MIB, pair

pytestmark = needs_root

CAP = 8 * MIB
PARTIES = ((Role.COORDINATOR, "c1"), (Role.NODE, "a"), (Role.NODE, "b"), (Role.OPERATOR, "test"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with pair(tmp_path, tmp_path / "certs", 64 * MIB, b_limits=f"[limits]\nreceive_max_bytes_s = {CAP}") as made:
        yield made


def test_a_resync_goes_on_while_every_certificate_is_renewed(cluster: Cluster) -> None:
    cluster.wait_reachable("vm1", "a", "b")
    cluster.ok("resync", "vm1", "--no-wait")
    run = wait_for(lambda: next((one for one in cluster.resyncs("vm1") if one["done_bytes"] > 4 * MIB), None), "blocks")
    assert run["state"] == "TRANSFERRING"
    shown = {name: served(cluster, name) for name in ("c1", "a", "a-stream", "b")}

    for role, name in PARTIES:
        cluster.authority.renew(role, name)
    wait_for(lambda: all(served(cluster, name) != before for name, before in shown.items()), "the new certificates")
    assert cluster.resyncs("vm1")[0]["state"] == "TRANSFERRING", "the copy was to be caught in the middle"

    # The coordinator's next order, the agents' next question and the operator's next call take the new ones.
    run = wait_for(lambda: next((o for o in cluster.resyncs("vm1") if o["state"] == "SUCCEEDED"), None), "the end")
    assert run["resent_bytes"] == 0
    assert cluster.ok("status")["volumes"][0]["state"] == "HEALTHY"
    images.write(cluster.image("a", "vm1"), [0, MIB], seed=2)
    assert [one["state"] for one in cluster.ok("resync", "vm1")["resyncs"]] == ["SUCCEEDED"]
    assert images.identical(cluster.image("a", "vm1"), cluster.image("b", "vm1"))
    for name in ("c1", "a", "b"):
        assert cluster.log(name).count("new certificate files are taken on") == 1


def served(cluster: Cluster, name: str) -> int:
    """The serial number of the certificate that a port shows now."""
    mine = cluster.authority.issue(Role.NODE, "b")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(mine.ca)
    context.load_cert_chain(mine.cert, mine.key)
    with (
        socket.create_connection(("127.0.0.1", cluster.ports[name]), timeout=10) as plain,
        context.wrap_socket(plain) as connection,
    ):
        assert connection.version() == "TLSv1.3"
        return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True)).serial_number
