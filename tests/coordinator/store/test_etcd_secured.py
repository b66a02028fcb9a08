"""etcd with TLS, certificates at both ends, a user with no more rights than it needs, and tokens that end."""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from pathlib import Path

import pytest

from coordinator.store.base import Reign, Write
from resilver import ca, ca_files
from resilver.errors import Unavailable
from resilver.names import Name, Role
from tests import etcd
from tests.certificates import forged
from tests.coordinator.store.test_etcd import BOUND_S, led

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "store.md").read_text()
TOKEN_S = 2
NAME = Name("prod", Role.COORDINATOR, "c1")
STAGING = ca.make_authority("staging", ca.utc_now())


def made(directory: Path) -> etcd.Secured:
    """An authority as the command makes it, c1's files, and etcd's own by the recipe of the page."""
    authority = ca_files.create(directory / "ca", ca.make_authority("prod", ca.utc_now()), (STAGING.cert,))
    place = ca_files.issue(authority, NAME, ca.sign(authority.own, NAME, ca.Hosts(), ca.utc_now()))
    script = re.search(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
    script = script.replace("/etc/resilver/ca", str(directory / "ca")).replace("10.0.0.1", "127.0.0.1")
    subprocess.run(["sh", "-euc", script], cwd=directory, check=True, timeout=30, capture_output=True)
    return etcd.Secured(
        directory / "ca" / "ca.crt",
        directory / "etcd.crt",
        directory / "etcd.key",
        place / "tls.crt",
        place / "tls.key",
    )


@pytest.fixture
def secured(tmp_path):
    (tmp_path / "tls").mkdir()
    files = made(tmp_path / "tls")
    # Etcd makes the check of a password slow on purpose; a busy machine is slow enough.
    options = (f"--auth-token-ttl={TOKEN_S}", "--bcrypt-cost=4")
    with etcd.running(tmp_path, 1, *options, secured=files) as running:
        yield running


def tls(running, **more):
    files = running.secured
    return {"ca": str(files.ca), "cert": str(files.client_cert), "key": str(files.client_key), **more}


def with_user(running, tmp_path):
    """The user of the page: its own prefix, and nothing else."""
    commands = re.findall(
        r"^    etcdctl (.*)$", PAGE.split("## TLS, and a user", 1)[1].split("\n## ", 1)[0], re.MULTILINE
    )
    assert len(commands) >= 7
    for command in commands:
        running.etcdctl(*command.replace("SECRET", "secret").replace("ROOTS", "roots").split())
    password = tmp_path / "password"
    password.write_text("secret\n")
    return {"username": "resilver", "password_file": str(password)}


async def works(store, reign: Reign) -> Reign:
    """Everything that a leader does."""
    reign = await store.renew(reign)
    await store.commit(reign, [Write("nodes/a", {"at": time.monotonic_ns()})])
    assert (await store.leader()).leader_id == reign.leader.leader_id
    assert "nodes/a" in await store.read_all()
    assert (await store.health()).healthy_count == 1
    return reign


async def test_tls_with_certificates_at_both_ends(connect, secured, tmp_path):
    store = await connect(secured.url, cluster="prod", **tls(secured))
    reign = await works(store, await led(store))
    await store.resign(reign)

    other = ca.make_authority("prod", ca.utc_now())
    stranger = ca.sign(other, NAME, ca.Hosts(), ca.utc_now())
    (tmp_path / "other.crt").write_bytes(ca.cert_pem(other.cert))
    (tmp_path / "stranger.crt").write_bytes(ca.cert_pem(stranger.cert))
    (tmp_path / "stranger.key").write_bytes(ca.key_pem(stranger.key))
    beyond = forged(tmp_path / "beyond", str(NAME), by=STAGING, trusted=b"")
    theirs = {"cert": str(tmp_path / "stranger.crt"), "key": str(tmp_path / "stranger.key")}
    wrong = {
        "plaintext": {},
        "no certificate": tls(secured, cert="", key=""),
        "another authority's certificate": tls(secured, **theirs),
        "a trusted authority of another cluster": tls(secured, cert=beyond.cert, key=beyond.key),
        "another authority trusted": tls(secured, ca=str(tmp_path / "other.crt")),
    }
    for keys in wrong.values():
        with pytest.raises(Unavailable, match="no etcd member"):
            await connect(secured.url, cluster="prod", timeout_s=1.0, **keys)


async def test_a_user_with_its_own_prefix_whose_token_ends(connect, secured, tmp_path):
    user = with_user(secured, tmp_path)
    store = await connect(secured.url, cluster="prod", **tls(secured), **user)
    reign = await works(store, await led(store))
    # Nothing was asked for longer than a token lasts: the next call has a new one, and the reign goes on.
    await asyncio.sleep(TOKEN_S + 1.5)
    reign = await works(store, reign)
    # And after a restart, which forgets all tokens.
    secured.kill(0)
    secured.start(0)
    deadline = time.monotonic() + BOUND_S
    while (await store.health()).healthy_count == 0:
        assert time.monotonic() < deadline
    reign = await works(store, reign)
    # Beyond its prefix it may nothing.
    with pytest.raises(Unavailable, match=r"(?i)permission"):
        await connect(secured.url, cluster="another", **tls(secured), **user)
    # Who has another password or none gets nowhere, and the words say why.
    (tmp_path / "wrong").write_text("guess")
    with pytest.raises(Unavailable, match="authentication failed"):
        await connect(secured.url, cluster="prod", **tls(secured), **{**user, "password_file": str(tmp_path / "wrong")})
    # A changed password is in the file before the next token is asked for.
    secured_by_root = ["--user=root:roots"]
    secured.etcdctl(*secured_by_root, "user", "passwd", "resilver", "--interactive=false", stdin="changed\n")
    (tmp_path / "password").write_text("changed\n")
    await works(store, reign)


async def test_many_calls_at_once_when_the_token_ends(connect, secured, tmp_path):
    """One that gets a new token must not break what another one is doing."""
    user = with_user(secured, tmp_path)
    store = await connect(secured.url, cluster="prod", timeout_s=10.0, lease_ttl_s=60, **tls(secured), **user)
    reign = await led(store)
    for _ in range(2):
        await asyncio.sleep(TOKEN_S + 1.5)
        writes = [store.commit(reign, [Write(f"nodes/n{number}", {})]) for number in range(12)]
        await asyncio.gather(store.renew(reign), store.read_all(), *writes)
    assert len(await store.read_all()) == 12


async def test_a_renewed_certificate_is_shown_without_a_restart(connect, secured):
    files = secured.secured
    store = await connect(secured.url, cluster="prod", **tls(secured))
    reign = await led(store)
    authority = ca_files.load(files.ca.parent)
    members = store._members
    for _ in range(3):
        before = members._clients[0].client
        ca_files.renew(authority, NAME, ca.sign(authority.own, NAME, ca.Hosts(), ca.utc_now()))
        reign = await works(store, reign)
        assert members._clients[0].client is not before
    # While one file is there and its fellow is not yet, what was read last goes on.
    new, before = ca.sign(authority.own, NAME, ca.Hosts(), ca.utc_now()), members._clients[0].client
    files.client_cert.write_bytes(ca.cert_pem(new.cert))
    reign = await works(store, reign)
    files.ca.rename(files.ca.with_name("away"))
    files.client_key.write_bytes(ca.key_pem(new.key))
    reign = await works(store, reign)
    assert members._clients[0].client is before
    files.ca.with_name("away").rename(files.ca)
    await works(store, reign)
    assert members._clients[0].client is not before
