"""Certificates for tests: those that the command makes, and every wrong one that it would never make."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from resilver import ca, ca_files
from resilver.config import Tls
from resilver.names import Name, Role
from resilver.tls import server_name

SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def files_of(place: Path) -> Tls:
    return Tls(ca=str(place / ca_files.CA_CERT), cert=str(place / ca_files.CERT), key=str(place / ca_files.KEY))


class Authority:
    """A cluster's authority in a directory, as `resilver certs init` makes it."""

    def __init__(self, directory: Path, cluster: str = "test", *, also: ca.Signed | None = None) -> None:
        """`also`: another authority that everybody trusts as well."""
        self.cluster = cluster
        more = () if also is None else (also.cert,)
        self.held = ca_files.create(directory, ca.make_authority(cluster, ca.utc_now()), more)

    def issue(self, role: Role, name: str) -> Tls:
        """A party's files; those that it has, if it has some."""
        party = Name(self.cluster, role, name)
        place = self.held.place(party)
        if not place.exists():
            ca_files.issue(self.held, party, ca.sign(self.held.own, party, ca.Hosts(), ca.utc_now()))
        return files_of(place)

    def renew(self, role: Role, name: str) -> None:
        party = Name(self.cluster, role, name)
        ca_files.renew(self.held, party, ca.sign(self.held.own, party, ca.Hosts(), ca.utc_now()))

    def toml(self, role: Role, name: str) -> str:
        files = self.issue(role, name)
        return f'[tls]\nca = "{files.ca}"\ncert = "{files.cert}"\nkey = "{files.key}"\n'


def brought_along() -> ca.Signed:
    """An authority that may sign for anybody, as one has it that was there before us."""
    key, now = ca.new_key(), datetime.now(UTC)
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "brought along")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(own)
        .serial_number(x509.random_serial_number())
        .public_key(key.public_key())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    return ca.Signed(key, builder.sign(key, hashes.SHA256()))


def forged(
    place: Path,
    *uris: str,
    by: ca.Signed | None,
    trusted: bytes,
    dns: tuple[str, ...] = (),
    usages: tuple[x509.ObjectIdentifier, ...] = (SERVER, CLIENT),
    begins: timedelta = timedelta(hours=-1),
    ends: timedelta = timedelta(hours=1),
) -> Tls:
    """A certificate that says whatever the caller likes; signed by itself where `by` is None."""
    key, now = ca.new_key(), datetime.now(UTC)
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, place.name)])
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    names += [x509.DNSName(one) for one in dns]
    builder = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(own if by is None else by.cert.subject)
        .serial_number(x509.random_serial_number())
        .public_key(key.public_key())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    cert = builder.sign(key if by is None else by.key, hashes.SHA256())
    place.mkdir(parents=True)
    for name, content in (
        (ca_files.CA_CERT, trusted),
        (ca_files.CERT, ca.cert_pem(cert)),
        (ca_files.KEY, ca.key_pem(key)),
    ):
        (place / name).write_bytes(content)
    return files_of(place)


def channel(target: str, files: Tls | None, role: Role, name: str = "any", *, cluster: str = "test") -> grpc.Channel:
    """A channel as a stranger would make it, to whoever has that name; plaintext without files."""
    options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
    options.append(("grpc.min_reconnect_backoff_ms", 50))
    if files is None:
        return grpc.insecure_channel(target, options)
    options.append(("grpc.ssl_target_name_override", server_name(Name(cluster, role, name))))
    trusted, cert, key = (Path(path).read_bytes() if path else None for path in (files.ca, files.cert, files.key))
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(trusted, key, cert), options)
