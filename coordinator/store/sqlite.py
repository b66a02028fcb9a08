"""One file as the store, for one coordinator at a time: the embedded default.

The rules:

* Leadership is a lock (flock) on a side file. The kernel frees it when its holder dies, so there is no lease to run
  out; a standby that waits for the lock is a standby like any other.
* A reign must find, at every renewal and commit, that lock file and database are still the files it opened: whoever
  removes or replaces them has let somebody else in.
* The lock is taken and freed by the one thread that also writes, so that it never goes while a write is under way.
* synchronous=EXTRA with a rollback journal: what was committed survives a power cut, and one file is the whole store.
* A call that takes longer than `TIMEOUT_S` is a hung disk. If it was a commit, the reign ends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from coordinator.store.base import ANY_REVISION, Health, Leader, Reign, Stored, Write
from coordinator.store.encoding import (
    LEADER,
    STORE_ID,
    TERM,
    Encoded,
    boottime_s,
    changed,
    decode,
    decode_leader,
    decode_store_id,
    decode_term,
    encode,
    encode_all,
    encode_leader,
    lost,
    new_leader,
    new_store_id,
)
from resilver.errors import Conflict, Invalid, ResilverError, Unavailable

TIMEOUT_S: Final = 10.0
INTRODUCTION_TRIES_MAX: Final = 20
INTRODUCTION_S: Final = 0.05
APPLICATION_ID: Final = 0x52534C56
"""`RSLV` in the file's header tells this database from any other."""

_SCHEMA: Final = (
    "CREATE TABLE own (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE records (key TEXT PRIMARY KEY, value TEXT NOT NULL, revision INTEGER NOT NULL)",
)
_CLUSTER: Final = "cluster"
_REVISION: Final = "revision"

T = TypeVar("T")


class SqliteStore:
    """A `Store` in one file. A lost file or a full disk is STORE_UNAVAILABLE; the file is never made anew meanwhile."""

    def __init__(self, path: Path, cluster: str, lease_ttl_s: int) -> None:
        self._path: Final = path
        self._lock_path: Final = path.with_name(path.name + ".lock")
        self._cluster: Final = cluster
        self._lease_ttl_s: Final = lease_ttl_s
        self._thread: Final = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        self._database: sqlite3.Connection | None = None
        self._inode = (0, 0)
        self._lock: int | None = None
        self._closed = False

    async def open(self) -> str:
        """As the protocol says; Invalid for a path that cannot be a store of this cluster."""
        return await self._run(self._open)

    async def campaign(self, name: str, address: str, *, above_term: int = 0) -> Reign | Leader:
        for _ in range(INTRODUCTION_TRIES_MAX):
            answer = await self._run(lambda: self._campaign(name, address, above_term))
            if answer is not None:
                return answer
            await asyncio.sleep(INTRODUCTION_S)
        raise self._unavailable("another process holds its lock and does not say who it is; see who has it open")

    async def renew(self, reign: Reign) -> Reign:
        return await self._run(lambda: self._renew(reign))

    async def resign(self, reign: Reign) -> None:
        await self._run(lambda: self._resign(reign))

    async def leader(self) -> Leader | None:
        return await self._run(self._leader)

    async def read_all(self) -> Mapping[str, Stored]:
        return await self._run(self._read_all)

    async def commit(self, reign: Reign, writes: Sequence[Write]) -> int:
        encoded = encode_all(writes)
        hung = Conflict("LEADERSHIP_LOST", f"a commit to {self._path} hangs and may yet be done: the reign ends")
        return await self._run(lambda: self._commit(reign, encoded), hung)

    async def health(self) -> Health:
        with contextlib.suppress(ResilverError):
            await self._run(self._read_revision)
            return Health("sqlite", 1, 1)
        return Health("sqlite", 0, 1)

    async def close(self) -> None:
        """Frees the lock; the database stays as it is. Closed already is closed."""
        if self._closed:
            return
        self._closed = True
        await self._run(self._close)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T], hung: ResilverError | None = None) -> T:
        """The work in the store's thread; `hung` is raised if it does not come back in time."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        done, _ = await asyncio.wait({future}, timeout=TIMEOUT_S)
        if not done:
            # What becomes of it is of no interest any more, and must not be reported as never retrieved.
            future.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise hung or self._unavailable(f"it hangs for {TIMEOUT_S:g} s already")
        try:
            return future.result()
        except (sqlite3.Error, _CommitFailed, OSError) as error:
            raise self._unavailable(getattr(error, "strerror", None) or str(error)) from error

    def _unavailable(self, why: str) -> Unavailable:
        return Unavailable("STORE_UNAVAILABLE", f"the store {self._path} cannot be used: {why}")

    # ------------------------------------------------------------ in the store's thread

    def _open(self) -> str:
        self._close_database()
        _make_file(self._path)
        try:
            database = sqlite3.connect(self._path, timeout=TIMEOUT_S / 2, isolation_level=None, check_same_thread=False)
            database.execute("PRAGMA journal_mode=DELETE")
            database.execute("PRAGMA synchronous=EXTRA")
            self._database = database
            if not self._is_initialised():
                self._initialise()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise _invalid(self._path, f"is no Resilver store ({error}); name another file") from error
        self._inode = _inode(self._path.stat())
        cluster = decode(_CLUSTER, self._own(_CLUSTER) or b"").get("cluster")
        if cluster != self._cluster:
            raise _invalid(
                self._path, f"belongs to cluster {cluster!r}, and this is {self._cluster!r}; name another file"
            )
        return decode_store_id(self._own(STORE_ID) or b"")

    def _is_initialised(self) -> bool:
        found = self._rows("PRAGMA application_id")[0][0]
        if found == APPLICATION_ID:
            return True
        if found == 0 and not self._rows("SELECT name FROM sqlite_master"):
            return False
        if self._rows("PRAGMA application_id")[0][0] == APPLICATION_ID:
            return True  # another process has made it between the two looks
        raise _invalid(self._path, "is a database of another program; name another file")

    def _initialise(self) -> None:
        with self._transaction():
            # Another process may have been faster.
            if self._is_initialised():
                return
            for statement in _SCHEMA:
                self._rows(statement)
            self._rows(f"PRAGMA application_id={APPLICATION_ID}")
            self._put_own(STORE_ID, encode(new_store_id()))
            self._put_own(_CLUSTER, encode({"cluster": self._cluster}))

    def _campaign(self, name: str, address: str, above_term: int) -> Reign | Leader | None:
        """None if another process has taken the lock and not yet written who it is."""
        self._check_database()
        begun_s = boottime_s()
        if self._lock is not None and not self._lock_is_in_place(self._lock):
            self._unlock()
        if self._lock is None:
            self._lock = self._try_lock(fcntl.LOCK_EX)
            if self._lock is None:
                return self._recorded()
        try:
            with self._transaction():
                term = max(decode_term(self._own(TERM)), above_term) + 1
                revision = self._next_revision()
                leader = new_leader(name, address, term)
                self._put_own(TERM, encode({"term": term}))
                self._put_own(LEADER, encode_leader(leader))
        except BaseException:
            self._unlock()
            raise
        return Reign(leader, revision, 0, begun_s + self._lease_ttl_s)

    def _renew(self, reign: Reign) -> Reign:
        begun_s = boottime_s()
        self._check_ours(reign)
        return replace(reign, ends_at=begun_s + self._lease_ttl_s)

    def _resign(self, reign: Reign) -> None:
        if self._lock is None or self._recorded() != reign.leader:
            return
        try:
            with self._transaction():
                self._rows("DELETE FROM own WHERE key = ?", LEADER)
        finally:
            self._unlock()

    def _leader(self) -> Leader | None:
        if self._lock is None:
            try:
                free = self._try_lock(fcntl.LOCK_SH)
            except FileNotFoundError:
                return None
            if free is not None:
                os.close(free)
                return None
        return self._recorded()

    def _read_all(self) -> dict[str, Stored]:
        rows = self._rows("SELECT key, value, revision FROM records ORDER BY key")
        return {key: Stored(decode(key, value.encode()), revision) for key, value, revision in rows}

    def _commit(self, reign: Reign, writes: Sequence[Encoded]) -> int:
        before = self._own(_REVISION)
        try:
            with self._transaction():
                self._check_ours(reign)
                for write in writes:
                    self._check_revision(write)
                revision = self._next_revision()
                for write in writes:
                    self._write(write, revision)
        except _CommitFailed as error:
            if self._own(_REVISION) == before:
                # Rolled back as a whole, as after a full disk: the reign can go on.
                raise self._unavailable(str(error)) from error
            raise Conflict(
                "LEADERSHIP_LOST", f"it is not known whether a commit was carried out ({error}): the reign ends"
            ) from error
        return revision

    def _check_revision(self, write: Encoded) -> None:
        if write.expected == ANY_REVISION:
            return
        rows = self._rows("SELECT revision FROM records WHERE key = ?", write.key)
        found = rows[0][0] if rows else 0
        if found != write.expected:
            raise changed(write.key, write.expected, found)

    def _write(self, write: Encoded, revision: int) -> None:
        if write.value is None:
            self._rows("DELETE FROM records WHERE key = ?", write.key)
        else:
            self._rows("REPLACE INTO records VALUES (?, ?, ?)", write.key, write.value.decode(), revision)

    def _check_ours(self, reign: Reign) -> None:
        """Raises LEADERSHIP_LOST unless this reign still holds the lock, and of these very files."""
        if self._lock is None or self._recorded() != reign.leader:
            raise lost(self._recorded())
        try:
            self._check_database()
        except (OSError, Unavailable) as error:
            raise Conflict("LEADERSHIP_LOST", f"{self._path} was removed or replaced: {error}") from error
        if not self._lock_is_in_place(self._lock):
            raise Conflict("LEADERSHIP_LOST", f"{self._lock_path} was removed or replaced: another process may lead")

    def _check_database(self) -> None:
        """A file that was replaced is another store, and writes to a removed one are lost."""
        if _inode(self._path.stat()) != self._inode:
            raise self._unavailable("it is not the file that was opened: it was replaced; restart the coordinator")

    def _read_revision(self) -> int:
        self._check_database()
        return int(decode(_REVISION, self._own(_REVISION) or b"{}").get("revision", 0))

    def _next_revision(self) -> int:
        revision = self._read_revision() + 1
        self._put_own(_REVISION, encode({"revision": revision}))
        return revision

    def _recorded(self) -> Leader | None:
        value = self._own(LEADER)
        return None if value is None else decode_leader(value)

    def _own(self, key: str) -> bytes | None:
        rows = self._rows("SELECT value FROM own WHERE key = ?", key)
        return rows[0][0].encode() if rows else None

    def _put_own(self, key: str, value: bytes) -> None:
        self._rows("REPLACE INTO own VALUES (?, ?)", key, value.decode())

    def _rows(self, statement: str, *values: str | int) -> list[tuple[Any, ...]]:
        assert self._database is not None, "a store is opened first"
        return self._database.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._rows("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._rows("ROLLBACK")
            raise
        try:
            self._rows("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._rows("ROLLBACK")
            raise _CommitFailed(str(error)) from error

    def _try_lock(self, kind: int) -> int | None:
        """The lock's descriptor, or None if somebody holds it. Only who wants to lead makes the file."""
        create = os.O_CREAT if kind == fcntl.LOCK_EX else 0
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CLOEXEC | create, 0o600)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if not self._lock_is_in_place(descriptor):
            # Its name was removed between the two calls: a lock on a file that nobody else can find.
            os.close(descriptor)
            return None
        return descriptor

    def _lock_is_in_place(self, descriptor: int) -> bool:
        try:
            return _inode(self._lock_path.stat()) == _inode(os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _close(self) -> None:
        self._unlock()
        self._close_database()

    def _close_database(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


def _inode(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


class _CommitFailed(Exception):
    """SQLite could not say that a commit was carried out."""


def _invalid(path: Path, why: str) -> Invalid:
    return Invalid("CONFIG_INVALID", f"store: {path} {why}", field="store")


def _make_file(path: Path) -> None:
    """An empty file for SQLite to fill, readable by its owner alone, and the directories above it."""
    if path.is_dir():
        raise _invalid(path, "is a directory; name a file in it, such as sqlite:///var/lib/resilver/store.db")
    try:
        _make_directory(path.parent)
        # Only if it is not there: to close any descriptor of a database would free the locks of this process on it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        why = f"cannot be made: {error.strerror}; name a file in a directory that this user can write"
        raise _invalid(path, why) from error
    if not os.access(path, os.R_OK | os.W_OK):
        raise _invalid(path, "cannot be read and written by this user; name another file, or change its owner")


def _make_directory(directory: Path) -> None:
    """Makes what is missing, and has each new name on disk before anything depends on it."""
    if directory.is_dir():
        return
    if directory.exists():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    _make_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
