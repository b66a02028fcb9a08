"""Where an authority and what it has signed lie, and how they come to lie there.

::

    DIR/                   0700
        ca.crt             the authority's own certificate; after it, others that the cluster trusts as well
        ca.key             0600: its key, the one thing here that must never leave this machine
        node/a/            0700, one directory for each party, to be copied whole to its machine
            ca.crt         whom it trusts: a copy of the above
            tls.crt        its certificate
            tls.key        0600: its key

The names within a party's directory are those of a Kubernetes secret of type `kubernetes.io/tls`, so a configuration is
the same with an authority of one's own.

The rules:

* A directory is made under another name, each file fsynced, read back and checked, then it is renamed into place; a
  renewed one changes places with the old one in one step. So a key and its certificate belong together after any crash.
* Nothing is overwritten but by `renew`, and nothing is by a name that is there already.
* One command works in a directory at a time (a lock on the directory itself, waited for with a bound).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from resilver import ca
from resilver.errors import Damaged, Invalid, Unavailable
from resilver.names import Name, Role

CA_CERT: Final = "ca.crt"
CA_KEY: Final = "ca.key"
CERT: Final = "tls.crt"
KEY: Final = "tls.key"
KEY_MODE: Final = 0o600
CERT_MODE: Final = 0o644
DIR_MODE: Final = 0o700
FILE_BYTES_MAX: Final = 1 << 20
LOCK_TIMEOUT_S: Final = 10.0
_STAGED: Final = ".new-"
_AT_FDCWD: Final = -100
_EXCHANGE: Final = 2

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]


@dataclass(frozen=True, slots=True)
class Authority:
    """A directory of ours. `trusted` begins with the authority's own certificate."""

    directory: Path
    own: ca.Signed
    trusted: tuple[x509.Certificate, ...]

    @property
    def cluster(self) -> str:
        return ca.cluster_of(self.own.cert)

    def place(self, name: Name) -> Path:
        return self.directory / name.role.value / name.name


def create(directory: Path, authority: ca.Signed, also_trusted: tuple[x509.Certificate, ...] = ()) -> Authority:
    """Puts a new authority into a directory, which is not there yet or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise Invalid(
            "INVALID_FIELD",
            f"{directory} is not empty: an authority is never put over what is there; name another directory",
            next_command=f"resilver certs show {directory}",
            field="dir",
        )
    trusted = (authority.cert, *(one for one in also_trusted if one != authority.cert))
    _make_dir(directory.parent)
    files = {CA_CERT: b"".join(map(ca.cert_pem, trusted)), CA_KEY: ca.key_pem(authority.key)}
    staged = _stage(directory, files)
    try:
        load(staged)
        staged.rename(directory)
    except OSError:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _fsync_dir(directory.parent)
    return Authority(directory, authority, trusted)


def load(directory: Path) -> Authority:
    """Reads an authority back; Invalid if there is none, Damaged if its key is not its certificate's."""
    if not (directory / CA_KEY).exists():
        raise Invalid(
            "INVALID_FIELD",
            f"there is no authority in {directory}: make one, or say with --dir where it is",
            next_command=f"resilver certs init --cluster NAME --dir {directory}",
            field="dir",
        )
    key = read_key(directory / CA_KEY)
    trusted = read_certs(directory / CA_CERT)
    own = next((one for one in trusted if ca.same_key(key, one)), None)
    if own is None or not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Damaged(
            "IO_ERROR",
            f"no certificate in {directory / CA_CERT} is of the key in {directory / CA_KEY}: put the two back together "
            "from a backup",
            path=str(directory),
        )
    return Authority(directory, ca.Signed(key, own), (own, *(one for one in trusted if one != own)))


def issue(authority: Authority, name: Name, signed: ca.Signed) -> Path:
    """Puts a party's new directory in its place; Invalid if there is one."""
    place = authority.place(name)
    if place.exists():
        raise Invalid(
            "INVALID_FIELD",
            f"{name.role.value} {name.name} has a certificate already, in {place}",
            next_command=f"resilver certs renew {name.role.value} {name.name} --dir {authority.directory}",
            field="name",
        )
    _make_dir(place.parent)
    staged = _staged_party(authority, name, signed)
    # Nobody else makes it under the lock; over a directory that has something in it this fails.
    staged.rename(place)
    _fsync_dir(place.parent)
    return place


def renew(authority: Authority, name: Name, signed: ca.Signed) -> Path:
    """Puts a party's renewed directory in the place of the one that is there."""
    place = authority.place(name)
    staged = _staged_party(authority, name, signed)
    if _libc.renameat2(_AT_FDCWD, os.fsencode(staged), _AT_FDCWD, os.fsencode(place), _EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(place))
    _fsync_dir(place.parent)
    shutil.rmtree(staged)
    _fsync_dir(place.parent)
    return place


def party(authority: Authority, name: Name) -> ca.Signed:
    """What was issued to a party; Invalid if nothing was."""
    place = authority.place(name)
    if not (place / CERT).exists():
        raise Invalid(
            "INVALID_FIELD",
            f"no certificate was issued to {name.role.value} {name.name} from {authority.directory}",
            next_command=f"resilver certs issue {name.role.value} {name.name} --dir {authority.directory}",
            field="name",
        )
    key, cert = read_key(place / KEY), read_certs(place / CERT)[0]
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not ca.same_key(key, cert):
        raise Damaged("IO_ERROR", f"{place / KEY} is not the key of {place / CERT}", path=str(place))
    return ca.Signed(key, cert)


def parties(authority: Authority) -> list[tuple[Role, str]]:
    """Everybody who was issued a certificate, by role and name."""
    found = []
    for role in Role:
        above = authority.directory / role.value
        if above.is_dir():
            found += [(role, one.name) for one in sorted(above.iterdir()) if not one.name.startswith(".")]
    return found


def read_certs(path: Path) -> list[x509.Certificate]:
    """The certificates in a PEM file, in their order."""
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise _unreadable(path, "holds no certificate in PEM") from error


def read_key(path: Path) -> PrivateKeyTypes:
    """A private key without a passphrase, in PEM."""
    try:
        return serialization.load_pem_private_key(_read(path), password=None)
    except TypeError as error:
        raise _unreadable(path, "is a key with a passphrase, which no daemon can ask for") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unreadable(path, "holds no private key in PEM") from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The directory to oneself; Unavailable if another command has it for longer than the bound."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        load(directory)
        raise
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unavailable("DEADLINE", f"another resilver certs works in {directory}; try again") from None
                time.sleep(0.05)  # flock itself has no deadline
        yield
    finally:
        os.close(descriptor)


def _staged_party(authority: Authority, name: Name, signed: ca.Signed) -> Path:
    place = authority.place(name)
    files = {
        CA_CERT: b"".join(map(ca.cert_pem, authority.trusted)),
        CERT: ca.cert_pem(signed.cert),
        KEY: ca.key_pem(signed.key),
    }
    staged = _stage(place, files)
    # Read back before it counts: what is wrong now would be found by a daemon that does not start.
    cert = read_certs(staged / CERT)[0]
    if (
        not ca.same_key(read_key(staged / KEY), cert)
        or ca.name_of(cert) != name
        or not ca.signed_by(cert, [authority.own.cert])
    ):
        raise Damaged("IO_ERROR", f"{staged} does not hold what was written; nothing was changed", path=str(staged))
    return staged


def _stage(target: Path, files: Mapping[str, bytes]) -> Path:
    """A directory beside the target with these files, all on the disk."""
    staged = target.with_name(f"{_STAGED}{target.name}")
    if staged.exists():
        shutil.rmtree(staged)  # of a command that was killed
    staged.mkdir(mode=DIR_MODE)
    for name, content in files.items():
        mode = KEY_MODE if name.endswith(".key") else CERT_MODE
        descriptor = os.open(staged / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            # Whatever the umask takes away from a certificate, a key has no more than this.
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _fsync_dir(staged)
    return staged


def _make_dir(path: Path) -> None:
    """A directory and its missing parents, private, each on the disk before the next."""
    if path.is_dir():
        return
    _make_dir(path.parent)
    path.mkdir(mode=DIR_MODE, exist_ok=True)
    _fsync_dir(path.parent)


def _fsync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}") from error
    if len(content) > FILE_BYTES_MAX:
        raise _unreadable(path, "is larger than any certificate or key")
    return content


def _unreadable(path: Path, why: str) -> Invalid:
    return Invalid("INVALID_FIELD", f"{path} {why}", path=str(path))
