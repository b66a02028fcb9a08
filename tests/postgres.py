"""A real PostgreSQL on a directory: made by initdb, filled and worked by pgbench, looked through afterwards.

It runs as `nobody`, because it refuses root, and listens on a socket in a directory of its own only.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = pwd.getpwnam("nobody")


def _programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return found[-1].parent if found else None


PROGRAMS = _programs()
needs_postgres = pytest.mark.skipif(
    PROGRAMS is None and not os.environ.get("CI"), reason="PostgreSQL is not installed (Debian: postgresql)"
)


def _run(program: str, *arguments: str | Path, timeout_s: float = 120.0) -> str:
    assert PROGRAMS is not None, "PostgreSQL is not installed"
    # By a program: to change the user itself Python would fork, and gRPC's threads do not outlive that.
    other = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups"]
    done = subprocess.run(
        [*other, str(PROGRAMS / program), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL,
        cwd="/", env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 0, f"{program} {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def _open_the_way(data: Path) -> None:
    """Temporary directories are private: `nobody` has to come through them."""
    for parent in data.absolute().parents:
        mode = parent.stat().st_mode & 0o7777
        if not mode & 0o001:
            parent.chmod(mode | 0o011)


def initialise(data: Path) -> None:
    """An empty cluster of databases."""
    data.mkdir()
    _open_the_way(data)
    os.chown(data, NOBODY.pw_uid, NOBODY.pw_gid)
    data.chmod(0o700)
    _run("initdb", "-D", data, "-U", "postgres", "--auth=trust", "--data-checksums", "--locale=C", "-E", "UTF8")


class Server:
    """A server that runs."""

    def __init__(self, sockets: Path) -> None:
        self._sockets = sockets

    def fill(self, scale: int = 1) -> None:
        _run("pgbench", "-h", self._sockets, "-U", "postgres", "-i", "-q", "-s", str(scale), "postgres")

    def work(self, transactions: int) -> None:
        _run(
            "pgbench", "-h", self._sockets, "-U", "postgres", "-n", "-c", "2", "-t", str(transactions // 2), "postgres"
        )

    def ask(self, sql: str) -> str:
        return _run("psql", "-h", self._sockets, "-U", "postgres", "-At", "-c", sql, "postgres").strip()

    def check(self) -> None:
        """Every relation and index holds together, and all of it can be read."""
        self.ask("create extension if not exists amcheck")
        _run("pg_amcheck", "-h", self._sockets, "-U", "postgres", "--heapallindexed", "-d", "postgres")
        _run("pg_dump", "-h", self._sockets, "-U", "postgres", "-f", "/dev/null", "postgres")

    def balanced(self) -> bool:
        """What every transaction of pgbench keeps: accounts, tellers and branches change by the same sum."""
        sums = self.ask(
            "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers),"
            " (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)"
        )
        return len(set(sums.split("|"))) == 1


@contextlib.contextmanager
def running(data: Path) -> Iterator[Server]:
    """A server on that directory; recovery from a crash is finished when the block begins."""
    _open_the_way(data)
    # In the snapshot of a server that ran on another node it names a process there, and here somebody else may be it.
    (data / "postmaster.pid").unlink(missing_ok=True)
    sockets = Path(tempfile.mkdtemp(prefix="pg-"))
    os.chown(sockets, NOBODY.pw_uid, NOBODY.pw_gid)
    options = f"-k {sockets} -c listen_addresses='' -c max_connections=10 -c shared_buffers=16MB"
    log = sockets / "log"
    try:
        try:
            _run("pg_ctl", "-D", data, "-l", log, "-w", "-t", "100", "-o", options, "start")
        except AssertionError as error:
            error.add_note(log.read_text() if log.exists() else "without a log")
            raise
        try:
            yield Server(sockets)
        finally:
            _run("pg_ctl", "-D", data, "-m", "fast", "-w", "-t", "100", "stop")
    finally:
        shutil.rmtree(sockets)
