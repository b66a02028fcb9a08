"""One authority follows another while a cluster runs, by the three steps of docs/certificates.md: nothing stops."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilver import ca, ca_files
from resilver.cli.main import main
from resilver.names import Role
from tests.cluster import Cluster, wait_for
from tests.loopfs import needs_root
from tests.trust.pair import MIB, pair

pytestmark = needs_root

PARTIES = (("coordinator", "c1"), ("node", "a"), ("node", "b"), ("operator", "test"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with pair(tmp_path, tmp_path / "ca", 16 * MIB) as made:
        yield made


def certs(*arguments: str | Path) -> None:
    assert main(["certs", *map(str, arguments)]) == 0


def mirrors(cluster: Cluster) -> None:
    """Everybody still talks to everybody: an operator orders, and blocks move between nodes."""
    image = cluster.image("a", "vm1")
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes([image.read_bytes()[MIB] ^ 1]) * MIB)
    wait_for(lambda: cluster.cli("resync", "vm1").code == 0, "a resync under these certificates")
    assert cluster.image("b", "vm1").read_bytes() == image.read_bytes()


def test_one_authority_follows_another(cluster: Cluster, tmp_path: Path) -> None:
    old, new, away = tmp_path / "ca", tmp_path / "ca2", tmp_path / "kept"
    cluster.authority.issue(Role.OPERATOR, "test")
    cluster.wait_reachable("vm1", "a", "b")
    mirrors(cluster)
    pids = {name: process.pid for name, process in cluster.processes.items()}
    shutil.copytree(old / "operator" / "test", away)

    certs("init", "--cluster", "test", "--dir", new, "--also-trust", old / "ca.crt")
    own = ca.cert_pem(ca_files.load(new).own.cert)
    with (old / "ca.crt").open("ab") as file:
        file.write(own)
    certs("renew", "--all", "--keep-key", "--dir", old)
    mirrors(cluster)

    for role, name in PARTIES:
        certs("issue", role, name, "--dir", new)
        # One party after the other, and a file after the other, as a copy over the network would.
        for file in ("ca.crt", "tls.crt", "tls.key"):
            shutil.copyfile(new / role / name / file, old / role / name / file)
        mirrors(cluster)

    (new / "ca.crt").write_bytes(own)
    certs("renew", "--all", "--keep-key", "--dir", new)
    for role, name in PARTIES:
        for file in ("ca.crt", "tls.crt"):
            shutil.copyfile(new / role / name / file, old / role / name / file)
    mirrors(cluster)

    assert {name: process.pid for name, process in cluster.processes.items()} == pids, "nobody was restarted"
    for file in ("ca.crt", "tls.crt", "tls.key"):
        shutil.copyfile(away / file, old / "operator" / "test" / file)
    assert cluster.cli("status", timeout_s=60).code != 0, "the old authority is trusted by nobody any more"
