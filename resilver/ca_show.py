"""What certificates say, and what is wrong with them: ours, and those that others have made.

A path is a certificate file, a party's directory (`tls.crt` with `tls.key` and `ca.crt` beside it, as a daemon is given
it), or the directory of an authority, which stands for everything in it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from resilver import ca, ca_files
from resilver.errors import Invalid, ResilverError
from resilver.names import Name, Role
from resilver.tls import SUFFIX, server_name

GOOD: Final = "GOOD"
ENDING: Final = "ENDING"
ENDED: Final = "ENDED"
UNUSABLE: Final = "UNUSABLE"


@dataclass(frozen=True, slots=True)
class Seen:
    """One certificate. `name` None: an authority, or one that names no party (`problems` says which)."""

    path: Path
    cert: x509.Certificate
    name: Name | None
    problems: tuple[str, ...] = ()

    @property
    def authority(self) -> bool:
        return ca.is_authority(self.cert)

    @property
    def until(self) -> datetime:
        return self.cert.not_valid_after_utc

    def days_left(self, now: datetime) -> int:
        """Whole days until it ends; negative once it has."""
        return (self.until - now) // timedelta(days=1)

    def state(self, now: datetime, within: timedelta) -> str:
        if self.until <= now:
            return ENDED
        if self.problems:
            return UNUSABLE
        return ENDING if self.until - now < within else GOOD


def look(path: Path, now: datetime) -> list[Seen]:
    """Every certificate that a path stands for; Invalid if there is none."""
    if not path.is_dir():
        return list(_in_file(path, now))
    if (path / ca_files.CERT).exists():
        return [_party(path, now)]
    if (path / ca_files.CA_CERT).exists():
        return [*_in_file(path / ca_files.CA_CERT, now), *_parties(path, now)]
    raise Invalid(
        "INVALID_FIELD",
        f"{path} has neither {ca_files.CERT} nor {ca_files.CA_CERT}: name a certificate, or a directory that has one",
        path=str(path),
    )


def _in_file(path: Path, now: datetime) -> Iterator[Seen]:
    """The first one with the chain that follows it; authorities each by itself."""
    certs = ca_files.read_certs(path)
    if ca.is_authority(certs[0]):
        yield from (Seen(path, one, None, tuple(_too_early(one, now))) for one in certs)
        return
    yield _leaf(path, certs[0], now)


def _parties(directory: Path, now: datetime) -> Iterator[Seen]:
    for role in Role:
        for place in sorted((directory / role.value).glob("*")):
            if not place.name.startswith("."):
                yield _party(place, now)


def _party(place: Path, now: datetime) -> Seen:
    """A directory as a daemon is given it: the three files must fit each other."""
    path = place / ca_files.CERT
    chain = ca_files.read_certs(path)
    return _leaf(path, chain[0], now, *_key_problems(place, chain[0]), *_chain_problems(place, chain))


def _leaf(path: Path, cert: x509.Certificate, now: datetime, *problems: str) -> Seen:
    try:
        name = ca.name_of(cert)
    except ValueError as error:
        return Seen(path, cert, None, (str(error), *_too_early(cert, now), *problems))
    wrong = (*_too_early(cert, now), *_usage_problems(cert, name.role), *_dns_problems(cert, name))
    return Seen(path, cert, name, (*wrong, *problems))


def _too_early(cert: x509.Certificate, now: datetime) -> Iterator[str]:
    if now < cert.not_valid_before_utc:
        yield f"it begins only on {cert.not_valid_before_utc:%Y-%m-%d %H:%M:%SZ}: is this machine's clock right?"


def _usage_problems(cert: x509.Certificate, role: Role) -> Iterator[str]:
    server = role in ca.SERVERS
    try:
        usages = set(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        if not server:
            yield f"it has no extended key usage, so it could be a server, which no {role.value} is"
        return
    if ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
        yield f"its extended key usage does not let it be a client, which a {role.value} is"
    if server and ExtendedKeyUsageOID.SERVER_AUTH not in usages:
        yield f"its extended key usage does not let it be a server, which a {role.value} is"
    if not server and ExtendedKeyUsageOID.SERVER_AUTH in usages:
        yield f"its extended key usage lets it be a server, which no {role.value} is"


def _dns_problems(cert: x509.Certificate, name: Name) -> Iterator[str]:
    """Whoever is dialled is known by a DNS name of ours, and has no other one of ours."""
    wanted = {server_name(name)} if name.role in ca.SERVERS else set()
    has = {one.lower() for one in ca.dns_of(cert) if one.lower().endswith(f".{SUFFIX}")}
    for missing in wanted - has:
        yield f"it lacks the DNS name {missing}, by which diallers know a {name.role.value}"
    for wrong in sorted(has - wanted):
        yield f"it has the DNS name {wrong}, which is another party's"


def _key_problems(place: Path, cert: x509.Certificate) -> Iterator[str]:
    path = place / ca_files.KEY
    try:
        mode = path.stat().st_mode
        key = ca_files.read_key(path)
    except FileNotFoundError:
        yield f"there is no {ca_files.KEY} beside it"
        return
    except ResilverError as error:
        yield error.message
        return
    if not ca.same_key(key, cert):
        yield f"{ca_files.KEY} beside it is the key of another certificate"
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        yield f"{ca_files.KEY} beside it can be used by others: chmod 600 {path}"


def _chain_problems(place: Path, chain: list[x509.Certificate]) -> Iterator[str]:
    """That a chain leads to a trusted authority is the handshake's to find; here it is looked at link by link."""
    path = place / ca_files.CA_CERT
    try:
        trusted = ca_files.read_certs(path)
    except ResilverError as error:
        yield error.message
        return
    at = chain[0]
    for _ in chain:
        if ca.signed_by(at, trusted):
            return
        above = next((one for one in chain[1:] if one != at and ca.signed_by(at, [one])), None)
        if above is None:
            break
        at = above
    yield f"none of the authorities in {ca_files.CA_CERT} beside it has signed it"
