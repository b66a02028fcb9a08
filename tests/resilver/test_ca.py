"""The small authority: who may sign for whom, what TLS makes of it, and what a crash leaves behind."""

import os
import ssl
import stat
from datetime import timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc import aio

from resilver import ca, ca_files, ca_show
from resilver.errors import Damaged, Invalid
from resilver.names import Name, Role
from resilver.tls import server_name

NOW = ca.utc_now()
WITHIN = timedelta(days=14)
NODE = Name("prod", Role.NODE, "a")
OPERATOR = Name("prod", Role.OPERATOR, "ops")
AT = ca.Hosts(("a.example.org",))
PROD = ca.make_authority("prod", NOW)
OTHER = ca.make_authority("prod", NOW)
OLD = ca.make_authority("prod", NOW - timedelta(days=200))
STAGING = ca.make_authority("staging", NOW)
SERVER = ca.sign(PROD, NODE, AT, NOW)
AS_NODE = server_name(NODE)
CLIENT = ca.sign(PROD, OPERATOR, ca.Hosts(), NOW)


def context(tmp_path, kind, own, trusted):
    made = ssl.SSLContext(kind)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    path = tmp_path / f"{own.cert.serial_number}.pem"
    path.write_bytes(ca.key_pem(own.key) + ca.cert_pem(own.cert))
    made.load_cert_chain(path)
    made.load_verify_locations(cadata="".join(ca.cert_pem(one.cert).decode() for one in trusted))
    made.verify_mode = ssl.CERT_REQUIRED
    return made


def shake(tmp_path, server, client, trusted=(PROD,), host=AS_NODE):
    """A whole handshake of TLS 1.3, without a socket; the server's view of the client's name."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = context(tmp_path, ssl.PROTOCOL_TLS_SERVER, server, trusted).wrap_bio(up, down, server_side=True)
    other = context(tmp_path, ssl.PROTOCOL_TLS_CLIENT, client, trusted).wrap_bio(down, up, server_hostname=host)
    done = set()
    for _ in range(8):
        for side in (other, one):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
        if len(done) == 2:
            return dict(one.getpeercert()["subjectAltName"])["URI"]
    raise AssertionError("the handshake does not end")


def forged(authority, name):
    """Signed by an authority that may not sign it, as a thief of its key would."""
    honest = ca.make_authority(name.cluster, NOW)
    body = ca.sign(honest, name, AT if name.role is Role.NODE else ca.Hosts(), NOW)
    builder = (
        x509.CertificateBuilder()
        .subject_name(body.cert.subject)
        .issuer_name(authority.cert.subject)
        .serial_number(x509.random_serial_number())
        .public_key(body.key.public_key())
        .not_valid_before(NOW - ca.BACKDATED)
        .not_valid_after(NOW + timedelta(days=1))
    )
    for extension in body.cert.extensions:
        if extension.oid != x509.AuthorityKeyIdentifier.oid:
            builder = builder.add_extension(extension.value, extension.critical)
    return ca.Signed(body.key, builder.sign(authority.key, hashes.SHA256()))


def test_what_it_signs_is_taken_by_tls(tmp_path):
    assert shake(tmp_path, SERVER, CLIENT) == "resilver://prod/operator/ops"
    assert shake(tmp_path, SERVER, ca.sign(PROD, Name("prod", Role.NODE, "b"), AT, NOW)) == "resilver://prod/node/b"


@pytest.mark.parametrize(
    ("server", "client", "why"),
    [
        (SERVER, ca.sign(OTHER, OPERATOR, ca.Hosts(), NOW), "unable to get local issuer|signature failure"),
        (forged(STAGING, NODE), CLIENT, "permitted subtree violation"),
        (SERVER, forged(STAGING, OPERATOR), "permitted subtree violation"),
        (SERVER, forged(CLIENT, OPERATOR), "issuer|CA|certificate verify failed"),
        (CLIENT, CLIENT, "purpose|Hostname mismatch"),
        (ca.sign(PROD, Name("prod", Role.NODE, "b"), AT, NOW), CLIENT, "Hostname mismatch"),
        (ca.sign(OLD, NODE, AT, NOW), ca.sign(OLD, OPERATOR, ca.Hosts(), NOW - timedelta(days=100)), "expired"),
    ],
    ids=["authority", "cluster-server", "cluster-client", "party-signs", "operator-serves", "another-node", "expired"],
)
def test_tls_refuses(tmp_path, server, client, why):
    with pytest.raises(ssl.SSLError, match=why):
        shake(tmp_path, server, client, (PROD, STAGING, OLD))


async def test_grpc_takes_it_and_keeps_to_the_constraint():
    trusted = ca.cert_pem(PROD.cert) + ca.cert_pem(STAGING.cert)
    server = aio.server()
    credentials = grpc.ssl_server_credentials(
        [(ca.key_pem(SERVER.key), ca.cert_pem(SERVER.cert))], trusted, require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    codes = []
    for own in (CLIENT, forged(STAGING, OPERATOR)):
        mine = grpc.ssl_channel_credentials(trusted, ca.key_pem(own.key), ca.cert_pem(own.cert))
        options = [("grpc.ssl_target_name_override", server_name(NODE))]
        async with aio.secure_channel(f"127.0.0.1:{port}", mine, options) as channel:
            with pytest.raises(aio.AioRpcError) as caught:
                await channel.unary_unary("/nobody/Answers")(b"", timeout=10)
            codes.append(caught.value.code())
    await server.stop(0)
    assert codes == [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE]


def test_it_ends_with_its_authority_and_begins_before_now():
    short = ca.make_authority("prod", NOW, days=30)
    cert = ca.sign(short, NODE, AT, NOW).cert
    assert cert.not_valid_after_utc == short.cert.not_valid_after_utc
    assert cert.not_valid_before_utc < NOW
    with pytest.raises(Invalid, match="ended on"):
        ca.sign(short, NODE, AT, NOW + timedelta(days=31))


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: ca.make_authority("10.0.0.1", NOW), "cannot be constrained"),
        (lambda: ca.make_authority("a..b", NOW), "empty label"),
        (lambda: ca.make_authority("pr/od", NOW), "is no name"),
        (lambda: ca.make_authority("prod", NOW, days=0), "1 to 36500 days"),
        (lambda: ca.sign(PROD, NODE, AT, NOW, days=900), "1 to 825 days"),
        (lambda: ca.sign(PROD, OPERATOR, AT, NOW), "operators only dial"),
        (lambda: ca.sign(PROD, Name("test", Role.NODE, "a"), AT, NOW), "signs for 'prod'"),
        (lambda: ca.parse_hosts(["10.0.0.1"], []), "give it with --ip"),
        (lambda: ca.parse_hosts(["a b"], []), "no DNS name"),
        (lambda: ca.parse_hosts(["coordinator.prod.Resilver.internal"], []), "who somebody is"),
        (lambda: ca.parse_hosts([], ["a.example"]), "no address"),
        (lambda: ca.parse_hosts([f"h{n}" for n in range(65)], []), "at most 64"),
    ],
)
def test_what_is_wrong_is_named(work, words):
    with pytest.raises(Invalid, match=words):
        work()


# ---------------------------------------------------------------- files


@pytest.fixture
def directory(tmp_path):
    ca_files.create(tmp_path / "ca", PROD)
    return tmp_path / "ca"


def states(path, now=NOW):
    return [seen.state(now, WITHIN) for seen in ca_show.look(path, now)]


def test_keys_are_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        authority = ca_files.create(tmp_path / "new" / "ca", PROD)
        place = ca_files.issue(authority, NODE, SERVER)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").rglob("*")}
    assert modes == {
        "ca": 0o700,
        "ca.crt": 0o644,
        "ca.key": 0o600,
        "node": 0o700,
        "a": 0o700,
        "tls.crt": 0o644,
        "tls.key": 0o600,
    }
    assert states(place) == ["GOOD"]


def test_nothing_is_overwritten(directory):
    authority = ca_files.load(directory)
    place = ca_files.issue(authority, NODE, SERVER)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(Invalid, match="has a certificate already"):
        ca_files.issue(authority, NODE, ca.sign(PROD, NODE, AT, NOW))
    with pytest.raises(Invalid, match="is not empty"):
        ca_files.create(directory, OTHER)
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    ca_files.renew(authority, NODE, renewed := ca.sign(PROD, NODE, AT, NOW))
    assert ca_files.party(authority, NODE).cert == renewed.cert
    assert [one.name for one in place.parent.iterdir()] == ["a"]


class Killed(BaseException):
    pass


class Dying:
    """Ends the work at its n-th call of the system that could separate two things, from now on."""

    def __init__(self, patch, at):
        self.left = at
        for name in ("fsync", "open", "fchmod"):
            patch.setattr(ca_files.os, name, self.counted(getattr(os, name)))
        for name in ("mkdir", "rename"):
            patch.setattr(ca_files.Path, name, self.counted(getattr(ca_files.Path, name)))
        patch.setattr(ca_files.shutil, "rmtree", self.counted(ca_files.shutil.rmtree))

    def counted(self, real):
        def call(*arguments, **named):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return real(*arguments, **named)

        return call


def begun(root, what):
    """What is there before, and what is then done to it."""
    if what == "create":
        return lambda: ca_files.create(root / "ca", PROD)
    authority = ca_files.create(root / "ca", PROD)
    new = ca.sign(PROD, NODE, AT, NOW)
    if what == "issue":
        return lambda: ca_files.issue(authority, NODE, new)
    ca_files.issue(authority, NODE, SERVER)
    return lambda: ca_files.renew(authority, NODE, new)


def check_whole(root, what):
    """Nothing, the old pair or the new, each whole; and what was left is in nobody's way."""
    if not (root / "ca").exists():
        assert what == "create"
        return
    found = states(root / "ca")
    assert set(found) == {"GOOD"}
    assert len(found) == {"create": 1, "issue": len(found), "renew": 2}[what]
    again = ca_files.renew if len(found) == 2 else ca_files.issue
    again(ca_files.load(root / "ca"), NODE, ca.sign(PROD, NODE, AT, NOW))
    assert {one.name for one in (root / "ca" / "node").iterdir()} == {"a"}


@pytest.mark.parametrize("what", ["create", "issue", "renew"])
def test_a_crash_at_any_call_leaves_the_old_or_the_new(tmp_path, monkeypatch, what):
    for at in range(200):
        root = tmp_path / str(at)
        root.mkdir()
        work = begun(root, what)
        try:
            with monkeypatch.context() as patch:
                Dying(patch, at)
                work()
        except Killed:
            check_whole(root, what)
            continue
        assert at > 8, "hardly anything was counted"
        return
    raise AssertionError("it never came to an end")


def test_two_at_once(directory, monkeypatch):
    monkeypatch.setattr(ca_files, "LOCK_TIMEOUT_S", 0.1)
    with (
        ca_files.locked(directory),
        pytest.raises(Exception, match="another resilver certs"),
        ca_files.locked(directory),
    ):
        pass
    with ca_files.locked(directory):
        pass


def test_an_authority_whose_key_is_another_ones(directory):
    (directory / "ca.key").write_bytes(ca.key_pem(OTHER.key))
    with pytest.raises(Damaged, match="put the two back together"):
        ca_files.load(directory)
    with pytest.raises(Invalid, match="there is no authority"):
        ca_files.load(directory / "node")


# ---------------------------------------------------------------- looking


def place_with(tmp_path, signed, trusted=(PROD,), key=None, mode=0o600):
    place = tmp_path / "tls"
    place.mkdir()
    (place / "tls.crt").write_bytes(ca.cert_pem(signed.cert))
    (place / "tls.key").write_bytes(ca.key_pem((key or signed).key))
    (place / "tls.key").chmod(mode)
    (place / "ca.crt").write_bytes(b"".join(ca.cert_pem(one.cert) for one in trusted))
    return place


def brought(*alternatives, usages=()):
    """A certificate that somebody else's tool has made, signed by a trusted authority."""
    key = ca.new_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(PROD.cert.subject)
        .serial_number(1)
        .public_key(key.public_key())
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=90))
    )
    names = [x509.UniformResourceIdentifier(one) if "://" in one else x509.DNSName(one) for one in alternatives]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return ca.Signed(key, builder.sign(PROD.key, hashes.SHA256()))


CLIENT_AUTH, SERVER_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
A = ("resilver://prod/node/a", "a.node.prod.resilver.internal")
OPS = "resilver://prod/operator/ops"


@pytest.mark.parametrize(
    ("names", "usages", "words"),
    [
        (A, (), None),
        (A, (CLIENT_AUTH, SERVER_AUTH), None),
        ((OPS,), (CLIENT_AUTH,), None),
        ((), (), "names no party"),
        (("resilver://prod/king/a",), (), "king"),
        ((A[0], "resilver://prod/node/b"), (), "more than one party"),
        (A[:1], (), "lacks the DNS name a.node.prod.resilver.internal"),
        ((*A, "b.node.prod.resilver.internal"), (), "another party's"),
        ((OPS, A[1]), (CLIENT_AUTH,), "another party's"),
        (A, (SERVER_AUTH,), "does not let it be a client"),
        (A, (CLIENT_AUTH,), "does not let it be a server"),
        ((OPS,), (CLIENT_AUTH, SERVER_AUTH), "lets it be a server"),
        ((OPS,), (), "could be a server"),
    ],
)
def test_show_tells_what_is_wrong_with_one_that_was_brought(tmp_path, names, usages, words):
    seen = ca_show.look(place_with(tmp_path, brought(*names, usages=usages)), NOW)[0]
    assert seen.state(NOW, WITHIN) == ("UNUSABLE" if words else "GOOD")
    assert (words or "") in " ".join(seen.problems)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: place_with(path, SERVER, key=CLIENT), "key of another certificate"),
        (lambda path: place_with(path, SERVER, trusted=(OTHER,)), "none of the authorities"),
        (lambda path: place_with(path, SERVER, mode=0o644), "used by others"),
        (lambda path: place_with(path, ca.sign(PROD, NODE, AT, NOW + timedelta(days=2))), "clock right"),
    ],
    ids=["key", "authority", "mode", "early"],
)
def test_show_finds(tmp_path, make, words):
    seen = ca_show.look(make(tmp_path), NOW)[0]
    assert seen.state(NOW, WITHIN) == "UNUSABLE"
    assert words in " ".join(seen.problems)


def test_show_finds_a_file_that_is_missing(tmp_path):
    place = place_with(tmp_path, SERVER)
    for name, words in (("tls.key", "no tls.key"), ("ca.crt", "No such file")):
        content = (place / name).read_bytes()
        (place / name).unlink()
        assert words in " ".join(ca_show.look(place, NOW)[0].problems)
        (place / name).write_bytes(content)
    (place / "tls.crt").write_bytes(b"no certificate")
    with pytest.raises(Invalid, match="holds no certificate"):
        ca_show.look(place, NOW)


def test_show_tells_how_long(tmp_path):
    place = place_with(tmp_path, SERVER)
    for days, expected in ((0, "GOOD"), (75, "GOOD"), (77, "ENDING"), (90, "ENDED"), (200, "ENDED")):
        assert states(place, NOW + timedelta(days=days)) == [expected]
    assert ca_show.look(place, NOW)[0].days_left(NOW) == 90


def test_a_key_that_tls_here_does_not_take_is_no_authority_of_ours(tmp_path):
    ca_files.create(tmp_path / "ca", PROD)
    pem = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "ca" / "ca.key").write_bytes(pem)
    with pytest.raises(Damaged):
        ca_files.load(tmp_path / "ca")
