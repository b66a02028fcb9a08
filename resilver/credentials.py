"""A party's key, certificate and CA, as their files say at this moment.

The rules:

* The files are looked at for each connection, by three calls of stat. What has changed is read, and taken on once it
  fits: the key is the certificate's, and the certificate names who it named before. Until then what was read last goes
  on, and the log says once why: files are replaced one after the other.
* TLS 1.3, and both ends show a certificate. Nothing of a session is kept for another one: each connection is checked.
* A key is never written anywhere: OpenSSL, which wants a file, is given one in memory.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog

from resilver.access import party_of
from resilver.errors import Forbidden, Invalid
from resilver.names import Name, Role, only_name
from resilver.tls import server_name

if TYPE_CHECKING:
    import socket

    from cryptography import x509

    from resilver.config import Tls

FILE_BYTES_MAX: Final = 1 << 20

_log: Final = structlog.get_logger(__name__)

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Held:
    """What the three files said together."""

    number: int
    ca: bytes
    cert: bytes
    key: bytes
    name: Name
    ends_at: datetime
    listening: ssl.SSLContext
    dialling: ssl.SSLContext


class Credentials:
    """Who this process is. Methods may be called from several threads."""

    def __init__(self, files: Tls) -> None:
        """Raises `Invalid("CONFIG_INVALID")` that names the key of [tls] whose file is wrong."""
        self._paths: Final = {"ca": Path(files.ca), "cert": Path(files.cert), "key": Path(files.key)}
        self._mutex: Final = threading.Lock()
        self._stamp = self._looked_at()
        self._held = self._read(1)

    @property
    def name(self) -> Name:
        return self._held.name

    @property
    def ends_at(self) -> datetime:
        """When the certificate expires."""
        return self._held.ends_at

    @property
    def number(self) -> int:
        """Grows whenever the files are taken on anew."""
        return self._current().number

    def check_name(self, name: Name) -> None:
        """`Invalid("CONFIG_INVALID")` unless the certificate is that party's; a line in the log if it has expired."""
        if self.name != name:
            raise _invalid("cert", self._paths["cert"], f"is of {self.name}; this process wants one of {name}")
        if self.ends_at <= datetime.now(UTC):
            _log.error("the certificate has expired: nobody will talk to this process", ended_at=str(self.ends_at))

    def channel(self) -> grpc.ChannelCredentials:
        held = self._current()
        return grpc.ssl_channel_credentials(held.ca, held.key, held.cert)

    def to_coordinator(self) -> str:
        """By what name a coordinator of this cluster is known."""
        return server_name(Name(self.name.cluster, Role.COORDINATOR, "any"))

    def to_node(self, node: str) -> str:
        """By what name that node of this cluster is known."""
        return server_name(Name(self.name.cluster, Role.NODE, node))

    def server(self) -> grpc.ServerCredentials:
        """For a port of gRPC, which asks for what the files say at each handshake."""
        first = self._current()
        told = first.number

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal told
            held = self._current()
            if held.number == told:
                return None
            told = held.number
            return _served(held)

        # None is how it is told that nothing has changed, which its types forget.
        fetcher: Any = renewed
        return grpc.dynamic_ssl_server_credentials(_served(first), fetcher, True)

    def accept(self, accepted: socket.socket, timeout_s: float) -> ssl.SSLSocket:
        """The server's side of a new connection, whose handshake is still to be made: see `greeted`."""
        accepted.settimeout(timeout_s)
        return self._current().listening.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)

    def dial(self, made: socket.socket, timeout_s: float) -> ssl.SSLSocket:
        """The dialler's side."""
        made.settimeout(timeout_s)
        return self._current().dialling.wrap_socket(made, do_handshake_on_connect=False)

    def _current(self) -> _Held:
        with self._mutex:
            stamp = self._looked_at()
            if stamp == self._stamp:
                return self._held
            # Also for files that do not fit: they are looked at again when one of them has changed again.
            self._stamp = stamp
            try:
                held = self._read(self._held.number + 1)
                if held.name != self._held.name:
                    raise _invalid("cert", self._paths["cert"], f"is of {held.name}, and was of {self._held.name}")
            except Invalid as error:
                _log.warning("new certificate files are not taken on yet", why=error.message)
                return self._held
            self._held = held
            _log.info("new certificate files are taken on", ends_at=str(held.ends_at))
            return held

    def _looked_at(self) -> Stamp:
        return stamp_of(self._paths.values())

    def _read(self, number: int) -> _Held:
        ca, cert, key = (_read_file(field, path) for field, path in self._paths.items())
        leaf = _leaf(self._paths["cert"], cert)
        try:
            name = only_name(_uris(leaf))
        except ValueError as error:
            raise _invalid("cert", self._paths["cert"], str(error)) from error
        listening, dialling = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        dialling.check_hostname = False  # who is dialled is known by its name: see `party_of`
        listening.num_tickets = 0
        for context in (listening, dialling):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.verify_mode = ssl.CERT_REQUIRED
            # What is sent has ends of its own, so that an end without a word takes nothing away; and whoever stops to
            # listen, as a server does that is told to end, can still say why.
            context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
            try:
                context.load_verify_locations(cadata=ca.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise _invalid("ca", self._paths["ca"], f"holds no certificates as PEM: {error}") from error
            _load(context, cert, key, self._paths["key"])
        return _Held(number, ca, cert, key, name, leaf.not_valid_after_utc, listening, dialling)


def credentials_of(files: Tls, name: Name) -> Credentials | None:
    """Those of [tls], which must be that party's; None without."""
    if not files.on:
        return None
    tls = Credentials(files)
    tls.check_name(name)
    return tls


def stamp_of(paths: Iterable[Path]) -> Stamp:
    """What tells that one of these files has changed; of one that is away it is that."""
    found = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def greeted(connection: ssl.SSLSocket, cluster: str, node: str = "") -> Name:
    """Makes the handshake, within the socket's timeout, and answers which node the other is.

    Raises OSError if there is no handshake, `Unauthenticated` or `Forbidden` if it is no node of that cluster, or,
    where one is named, another one than `node`.
    """
    connection.do_handshake()
    alternatives: Any = (connection.getpeercert() or {}).get("subjectAltName", ())
    name = party_of((value for kind, value in alternatives if kind == "URI"), cluster, {Role.NODE})
    if node and name.name != node:
        raise Forbidden("ROLE_NOT_ALLOWED", f"{name} answered where {node} was dialled")
    return name


def _read_file(field: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _invalid(field, path, f"cannot be read: {error.strerror or error}") from error
    if len(content) > FILE_BYTES_MAX:
        raise _invalid(field, path, f"is larger than {FILE_BYTES_MAX} bytes: this is no PEM file of certificates")
    return content


def _leaf(path: Path, cert: bytes) -> x509.Certificate:
    from cryptography import x509  # noqa: PLC0415 - only who has a certificate needs it

    try:
        return x509.load_pem_x509_certificates(cert)[0]
    except ValueError as error:
        raise _invalid("cert", path, f"holds no certificate as PEM: {error}") from error


def _uris(leaf: x509.Certificate) -> list[str]:
    from cryptography import x509  # noqa: PLC0415 - as above

    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return list(found.get_values_for_type(x509.UniformResourceIdentifier))


def _load(context: ssl.SSLContext, cert: bytes, key: bytes, path: Path) -> None:
    descriptor = os.memfd_create("resilver", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=True) as file:  # noqa: PTH123 - a descriptor, no path
        file.write(cert + b"\n" + key)
        file.flush()
        try:
            # A key with a password is refused, not asked for at a terminal that nobody looks at.
            context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=lambda: "")
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or str(error)
            raise _invalid("key", path, f"is not the key of tls.cert, or no PEM without a password ({why})") from error


def _served(held: _Held) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(held.key, held.cert)], held.ca)


def _invalid(field: str, path: Path, why: str) -> Invalid:
    return Invalid("CONFIG_INVALID", f"tls.{field}: {path} {why}", field=f"tls.{field}")
