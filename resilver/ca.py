"""A small certificate authority for one cluster: its certificate, and what it signs.

The rules:

* Keys are EC P-256: what gRPC's BoringSSL, Python's OpenSSL and etcd's Go all take. BoringSSL refuses Ed25519 in TLS.
* The authority may sign for its own cluster alone: a critical name constraint allows the URIs of that cluster, so that
  whoever trusts two authorities while one follows the other, or two clusters, is not lied to by the wrong one. It signs
  no further authority (path length 0).
* A party's certificate is as `tls.py` wants it: one URI that says who it is, for who is dialled the DNS name of that,
  and hosts beside it only if they were asked for. Nodes and coordinators are both servers and clients; operators and
  viewers are clients only.
* A certificate ends before the authority that signed it does, and begins an hour ago, for clocks that are behind.
* The authority lasts ten years, because replacing it touches every machine. A party's certificate lasts 90 days: there
  is no revocation list, so this is how long a stolen key is good for; and renewing needs no restart.

Nothing here touches a file: `ca_files.py` keeps what is made here.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from resilver.config_rules import NAME, NAME_RULE
from resilver.errors import Invalid
from resilver.names import Name, Role, only_name
from resilver.tls import SUFFIX, server_name

AUTHORITY_DAYS: Final = 3650
LEAF_DAYS: Final = 90
DAYS_MAX: Final = 36_500
LEAF_DAYS_MAX: Final = 825
"""Some TLS libraries distrust a certificate that lasts longer, whoever signed it."""
HOSTS_MAX: Final = 64
BACKDATED: Final = timedelta(hours=1)
_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS: Final = re.compile(rf"(?=.{{1,253}}\Z)(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")
SERVERS: Final = frozenset({Role.NODE, Role.COORDINATOR})

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Hosts:
    """Where a party is dialled, beside its name: for other programs, because ours look at the name alone."""

    dns: tuple[str, ...] = ()
    ip: tuple[IpAddress, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.dns or self.ip)


@dataclass(frozen=True, slots=True)
class Signed:
    """A private key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    cert: x509.Certificate


def parse_hosts(dns: Sequence[str], ip: Sequence[str]) -> Hosts:
    """Each one once; raises `Invalid("INVALID_FIELD")` that names the option."""
    for name in dns:
        if name.lower().endswith(f".{SUFFIX}"):
            raise _invalid("dns", f"{name[:80]!r} is below {SUFFIX}, where names say who somebody is: leave it out")
        if _DNS.fullmatch(name) is None or _is_ip(name):
            what = "an address: give it with --ip" if _is_ip(name) else "no DNS name, such as a.example.org"
            raise _invalid("dns", f"{name[:80]!r} is {what}")
    addresses = []
    for text in ip:
        try:
            addresses.append(ipaddress.ip_address(text))
        except ValueError:
            raise _invalid("ip", f"{text[:80]!r} is no address, such as 10.0.0.11 or fd00::b") from None
    if len(dns) + len(ip) > HOSTS_MAX:
        raise _invalid(
            "dns", f"{len(dns) + len(ip)} hosts are named, with --ip; at most {HOSTS_MAX} go into a certificate"
        )
    return Hosts(tuple(dict.fromkeys(name.lower() for name in dns)), tuple(dict.fromkeys(addresses)))


def check_cluster(cluster: str) -> str:
    """A cluster that a name constraint can be about: the host of its parties' URIs."""
    if NAME.fullmatch(cluster) is None:
        raise _invalid("cluster", f"{cluster[:80]!r} is no name: {NAME_RULE}")
    if _is_ip(cluster) or "" in cluster.split("."):
        raise _invalid("cluster", f"{cluster!r} cannot be constrained to: an address, or a name with an empty label")
    return cluster


def check_days(days: int, days_max: int) -> int:
    if not 1 <= days <= days_max:
        raise _invalid("days", f"{days} cannot be: a certificate lasts 1 to {days_max} days")
    return days


def make_authority(cluster: str, now: datetime, *, days: int = AUTHORITY_DAYS) -> Signed:
    """A new authority of a cluster, signed by itself."""
    check_cluster(cluster)
    check_days(days, DAYS_MAX)
    key = new_key()
    # Two authorities of one cluster are told apart by their subjects, while one follows the other.
    subject = _subject(cluster, f"Resilver CA {secrets.token_hex(4)}")
    builder = (
        _builder(key.public_key(), now, now + timedelta(days=days), subject=subject, issuer=subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(
            x509.NameConstraints([x509.UniformResourceIdentifier(cluster)], excluded_subtrees=None), critical=True
        )
    )
    return Signed(key, builder.sign(key, hashes.SHA256()))


def sign(
    authority: Signed,
    name: Name,
    hosts: Hosts,
    now: datetime,
    *,
    days: int = LEAF_DAYS,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> Signed:
    """A certificate for a party, for a new key unless one is given."""
    check_days(days, LEAF_DAYS_MAX)
    cluster = cluster_of(authority.cert)
    if name.cluster != cluster:
        raise _invalid("cluster", f"{name} is of another cluster: this authority signs for {cluster!r}")
    if hosts and name.role not in SERVERS:
        raise _invalid("dns", f"and --ip are for those who are dialled; {name.role.value}s only dial")
    until = min(now + timedelta(days=days), authority.cert.not_valid_after_utc)
    if not authority.cert.not_valid_before_utc <= now < until:
        raise Invalid(
            "INVALID_FIELD",
            f"the authority of {cluster} ended on {authority.cert.not_valid_after_utc:%Y-%m-%d}, or has not begun yet",
            next_command=f"resilver certs init --cluster {cluster} --dir NEW_DIRECTORY",
            field="dir",
        )
    key = key or new_key()
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if name.role in SERVERS:
        usages.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
    alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(name))]
    known_as = [server_name(name)] if name.role in SERVERS else []
    alternatives += [x509.DNSName(one) for one in (*known_as, *hosts.dns)]
    alternatives += [x509.IPAddress(one) for one in hosts.ip]
    subject = _subject(cluster, name.name, name.role)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = (
        _builder(key.public_key(), now, until, subject=subject, issuer=authority.cert.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(issuer_id, critical=False)
    )
    return Signed(key, builder.sign(authority.key, hashes.SHA256()))


def constrained_to(authority: x509.Certificate) -> str | None:
    """The one cluster whose parties an authority may sign for; None for any other authority."""
    try:
        found = authority.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or ()
    except x509.ExtensionNotFound:
        return None
    allowed = [one.value for one in found if isinstance(one, x509.UniformResourceIdentifier)]
    return allowed[0] if len(allowed) == 1 else None


def cluster_of(authority: x509.Certificate) -> str:
    """The cluster that an authority of ours signs for; Invalid for an authority that is not."""
    cluster = constrained_to(authority)
    if cluster is None:
        raise Invalid("INVALID_FIELD", "the authority was not made by resilver certs init: it is for no one cluster")
    return cluster


def name_of(cert: x509.Certificate) -> Name:
    """The party that a certificate names; ValueError if it names none, or several."""
    return only_name(_alternatives(cert).get_values_for_type(x509.UniformResourceIdentifier))


def hosts_of(cert: x509.Certificate) -> Hosts:
    """The hosts alone, without the names below `resilver.internal`."""
    dns = tuple(one for one in dns_of(cert) if not one.lower().endswith(f".{SUFFIX}"))
    return Hosts(dns, tuple(_addresses(_alternatives(cert))))


def dns_of(cert: x509.Certificate) -> list[str]:
    return _alternatives(cert).get_values_for_type(x509.DNSName)


def is_authority(cert: x509.Certificate) -> bool:
    try:
        return bool(cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except x509.ExtensionNotFound:
        return False


def signed_by(cert: x509.Certificate, issuers: Sequence[x509.Certificate]) -> bool:
    """Whether one of these has signed the certificate itself."""
    for issuer in issuers:
        try:
            cert.verify_directly_issued_by(issuer)
        except (InvalidSignature, ValueError, TypeError):
            continue
        return True
    return False


def same_key(key: PrivateKeyTypes, cert: x509.Certificate) -> bool:
    return _public_der(key.public_key()) == _public_der(cert.public_key())


def fingerprint(cert: x509.Certificate) -> str:
    """SHA-256 of the certificate, as `openssl x509 -fingerprint -sha256` prints it."""
    return cert.fingerprint(hashes.SHA256()).hex(":").upper()


def key_fingerprint(cert: x509.Certificate) -> str:
    """SHA-256 of the public key: it stays when a certificate is renewed with its key."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(_public_der(cert.public_key()))
    return digest.finalize().hex(":").upper()


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def cert_pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def utc_now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _builder(
    public: ec.EllipticCurvePublicKey, now: datetime, until: datetime, *, subject: x509.Name, issuer: x509.Name
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .public_key(public)
        .not_valid_before(now - BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _subject(cluster: str, common: str, role: Role | None = None) -> x509.Name:
    """For a person's eyes; only the URI says who somebody is."""
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster)]
    if role is not None:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value))
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(cert: x509.Certificate) -> x509.SubjectAlternativeName:
    try:
        return cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return x509.SubjectAlternativeName([])


def _addresses(names: x509.SubjectAlternativeName) -> list[IpAddress]:
    """Addresses alone: a network is for constraints, and no host."""
    found = names.get_values_for_type(x509.IPAddress)
    return [one for one in found if isinstance(one, ipaddress.IPv4Address | ipaddress.IPv6Address)]


def _public_der(public: object) -> bytes:
    return public.public_bytes(  # type: ignore[attr-defined, no-any-return]  # every kind of public key has it
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _invalid(option: str, why: str) -> Invalid:
    return Invalid("INVALID_FIELD", f"--{option}: {why}", field=option)
