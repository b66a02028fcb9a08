"""A real etcd on free loopback ports, with members that can be killed, stopped and started again.

Each member keeps its data under the directory given; `close` kills what is left. Nothing here waits without a bound.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

START_TIMEOUT_S = 30.0


def available() -> bool:
    return shutil.which("etcd") is not None


@dataclass
class Member:
    name: str
    client: int
    peer: int
    process: subprocess.Popen[bytes] | None = None


@dataclass(frozen=True)
class Secured:
    """Files with which clients are served by TLS alone, and must show a certificate; those of a client beside them."""

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path

    @property
    def server(self) -> list[str]:
        return [
            f"--cert-file={self.cert}",
            f"--key-file={self.key}",
            f"--trusted-ca-file={self.ca}",
            "--client-cert-auth",
        ]

    @property
    def client(self) -> list[str]:
        return [f"--cacert={self.ca}", f"--cert={self.client_cert}", f"--key={self.client_key}"]

    def context(self) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=self.ca)
        made.load_cert_chain(self.client_cert, self.client_key)
        return made


@dataclass
class Etcd:
    """A cluster of one or three members. Killing one is SIGKILL, stopping one is SIGSTOP."""

    directory: Path
    members: list[Member] = field(default_factory=list)
    secured: Secured | None = None
    options: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        return "http" if self.secured is None else "https"

    @property
    def endpoints(self) -> list[str]:
        return [f"127.0.0.1:{member.client}" for member in self.members]

    @property
    def url(self) -> str:
        """As the coordinator's configuration writes it."""
        return "etcd://" + ",".join(self.endpoints)

    def start(self, index: int) -> None:
        """Starts a member, also again; `wait` tells when it answers."""
        member = self.members[index]
        log = (self.directory / f"{member.name}.log").open("ab")
        command = [
            "etcd",
            f"--name={member.name}",
            f"--data-dir={self.directory / member.name}",
            f"--listen-client-urls={self.scheme}://127.0.0.1:{member.client}",
            f"--advertise-client-urls={self.scheme}://127.0.0.1:{member.client}",
            f"--listen-peer-urls=http://127.0.0.1:{member.peer}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{member.peer}",
            "--initial-cluster=" + ",".join(f"{one.name}=http://127.0.0.1:{one.peer}" for one in self.members),
            "--heartbeat-interval=50",
            "--election-timeout=500",
            # The machine of a test may be slow to sync, and nothing here outlives it.
            "--unsafe-no-fsync",
            "--logger=zap",
            "--log-level=warn",
            *(self.secured.server if self.secured else []),
            *self.options,
        ]
        with log:
            member.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait(self, index: int) -> None:
        """Until the member answers and knows a leader."""
        deadline = time.monotonic() + START_TIMEOUT_S
        member = self.members[index]
        while True:
            with contextlib.suppress(OSError, urllib.error.URLError):
                url = f"{self.scheme}://127.0.0.1:{member.client}/health"
                context = self.secured.context() if self.secured else None
                with urllib.request.urlopen(url, timeout=1, context=context) as answer:
                    if b'"true"' in answer.read():
                        return
            assert member.process is not None
            if member.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"etcd did not start:\n{(self.directory / f'{member.name}.log').read_text()}")
            time.sleep(0.05)

    def kill(self, index: int) -> None:
        process = self.members[index].process
        if process is not None:
            process.kill()
            process.wait()
            self.members[index].process = None

    def stop(self, index: int) -> None:
        self._signal(index, signal.SIGSTOP)

    def go_on(self, index: int) -> None:
        self._signal(index, signal.SIGCONT)

    def leading(self) -> int:
        """The index of the member that leads."""
        lines = self.etcdctl("endpoint", "status", "--write-out=simple").splitlines()
        return next(index for index, line in enumerate(lines) if line.split(", ")[4] == "true")

    def etcdctl(self, *arguments: str, stdin: str = "") -> str:
        """What etcdctl prints, asked of all members that run."""
        endpoints = ",".join(
            endpoint for endpoint, member in zip(self.endpoints, self.members, strict=True) if member.process
        )
        return subprocess.run(
            ["etcdctl", f"--endpoints={endpoints}", *(self.secured.client if self.secured else []), *arguments],
            check=True,
            capture_output=True,
            input=stdin,
            text=True,
            timeout=20,
            env={**os.environ, "ETCDCTL_API": "3"},
        ).stdout

    def close(self) -> None:
        for index in range(len(self.members)):
            self.kill(index)

    def _signal(self, index: int, number: signal.Signals) -> None:
        process = self.members[index].process
        assert process is not None
        process.send_signal(number)


@contextlib.contextmanager
def running(directory: Path, count: int = 1, *options: str, secured: Secured | None = None) -> Iterator[Etcd]:
    """A cluster that answers, until the end of the block."""
    ports = _free_ports(2 * count)
    members = [Member(f"m{index}", ports[2 * index], ports[2 * index + 1]) for index in range(count)]
    etcd = Etcd(directory, members, secured, options)
    try:
        for index in range(count):
            etcd.start(index)
        for index in range(count):
            etcd.wait(index)
        yield etcd
    finally:
        etcd.close()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
