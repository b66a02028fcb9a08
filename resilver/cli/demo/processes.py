"""The demo's programs: started in sessions of their own, stopped one by one, their output in files.

Each has a certificate, of an authority that is made for the demo and removed with it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from resilver import ca, ca_files
from resilver.cli.demo.ground import failed
from resilver.names import Name, Role

if TYPE_CHECKING:
    from resilver.cli.demo.cleanup import Cleanup

STOP_TIMEOUT_S: Final = 5.0
START_TIMEOUT_S: Final = 20.0
LOG_LINES: Final = 12
POLL_S: Final = 0.05
CLUSTER: Final = "demo"
OPERATOR: Final = Name(CLUSTER, Role.OPERATOR, "you")


class Program:
    """One started program. Stopping it is added to the cleanup before it is started."""

    def __init__(self, name: str, command: list[str], base: Path, cleanup: Cleanup) -> None:
        self.name = name
        self.log = base / f"{name}.log"
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        cleanup.add(f"stop {name}", self.stop)

    def start(self) -> None:
        # setpriv: should this process be killed outright, its children still are told to end.
        setpriv = shutil.which("setpriv")
        guard = [setpriv, "--pdeathsig", "TERM"] if setpriv else []
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*guard, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the demo; it stops the others in the right order.
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def stop(self) -> None:
        """Asks it to end, then ends it."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # It may have children of its own; the session is ours alone.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_TIMEOUT_S)

    @property
    def pid(self) -> int:
        assert self._process is not None, "asked for the pid of a program that runs"
        return self._process.pid

    @property
    def line(self) -> str:
        """The command line that starts it."""
        return shlex.join(self._command)

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    def check(self) -> None:
        """Raises DemoFailed if it has ended by itself."""
        if self._process is not None and self.ended:
            raise failed(f"{self.name} ended by itself, with {self._process.returncode}; its log says why")

    def log_end(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return "(no output)"
        return "\n".join(f"  {line}" for line in lines[-LOG_LINES:]) or "(no output)"


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that were free a moment ago, each once."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for_port(program: Program, port: int) -> None:
    """Returns when the program listens; raises DemoFailed if it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        program.check()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if time.monotonic() > deadline:
            raise failed(f"{program.name} does not listen after {START_TIMEOUT_S:g} s; its log may say why")
        time.sleep(POLL_S)  # until a deadline: nothing tells of a port that is listened at


class Cluster:
    """The programs of the demo, and the addresses under which they are."""

    def __init__(self, base: Path, cleanup: Cleanup) -> None:
        self._base = base
        self._cleanup = cleanup
        self.programs: dict[str, Program] = {}
        ports = free_ports(9)
        self.etcd_port, self._etcd_peer_port, self.coordinator_port = ports[:3]
        self.agent_ports = dict(zip("abc", zip(ports[3:6], ports[6:9], strict=True), strict=True))
        self.store = ""

    def make_certificates(self) -> Path:
        """An authority, and what it signs for everybody: where they are."""
        now = ca.utc_now()
        authority = ca_files.create(self._base / "ca", ca.make_authority(CLUSTER, now))
        nodes = [Name(CLUSTER, Role.NODE, node) for node in self.agent_ports]
        for name in (Name(CLUSTER, Role.COORDINATOR, "c1"), *nodes, OPERATOR):
            ca_files.issue(authority, name, ca.sign(authority.own, name, ca.Hosts(), now))
        return authority.directory

    def tls(self, name: Name) -> dict[str, Path]:
        """The files of a party, by their keys in [tls]."""
        place = self._base / "ca" / name.role.value / name.name
        return {"ca": place / ca_files.CA_CERT, "cert": place / ca_files.CERT, "key": place / ca_files.KEY}

    def _tls_table(self, role: Role, name: str) -> str:
        files = self.tls(Name(CLUSTER, role, name))
        return "[tls]\n" + "".join(f'{key} = "{path}"\n' for key, path in files.items())

    @property
    def coordinator(self) -> str:
        return f"127.0.0.1:{self.coordinator_port}"

    def start_store(self) -> str:
        """An etcd where there is one, else the coordinator's own sqlite; which, in words."""
        binary = shutil.which("etcd")
        if binary is None:
            self.store = f"sqlite://{self._base / 'store.db'}"
            return "sqlite (etcd is not installed)"
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self._etcd_peer_port}"
        arguments = {
            "name": "demo",
            "data-dir": str(self._base / "etcd"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"demo={peer}",
        }
        self._start("etcd", [binary, *(f"--{key}={value}" for key, value in arguments.items())], self.etcd_port)
        self.store = f"etcd://127.0.0.1:{self.etcd_port}"
        return f"etcd on 127.0.0.1:{self.etcd_port}"

    def start_coordinator(self) -> None:
        config = self._base / "coordinator.toml"
        config.write_text(
            f'name = "c1"\ncluster = "{CLUSTER}"\nlisten = "{self.coordinator}"\nmetrics_listen = "127.0.0.1:0"\n'
            f'state_dir = "{self._base / "c1"}"\nstore = "{self.store}"\nlease_ttl_s = 10\n'
            + self._tls_table(Role.COORDINATOR, "c1")
        )
        self._start("c1", _module("coordinator.app", config), self.coordinator_port)

    def start_agent(self, node: str, image: Path) -> None:
        control, stream = self.agent_ports[node]
        config = self._base / f"{node}.toml"
        config.write_text(
            f'node = "{node}"\ncluster = "{CLUSTER}"\ncoordinators = ["{self.coordinator}"]\n'
            f'listen = "127.0.0.1:{control}"\nstream_listen = "127.0.0.1:{stream}"\nmetrics_listen = "127.0.0.1:0"\n'
            # Volumes of a real installation on this machine are none of ours.
            f'state_dir = "{self._base / node}"\ninclude = []\n'
            f"{self._tls_table(Role.NODE, node)}"
            f"[space]\nreserve_ratio = 0.0\nreserve_min_bytes = {64 << 20}\n"
            f'[[volumes]]\nname = "vm1"\nbackend = "image"\npath = "{image}"\n'
        )
        self._start(node, _module("agent.app", config), control)

    def stop(self, name: str) -> None:
        self.programs[name].stop()

    def check(self) -> None:
        for program in self.programs.values():
            program.check()

    def _start(self, name: str, command: list[str], port: int) -> None:
        program = self.programs.get(name)
        if program is None:
            program = self.programs[name] = Program(name, command, self._base, self._cleanup)
        program.start()
        wait_for_port(program, port)


def _module(module: str, config: Path) -> list[str]:
    # -P: a folder called `agent` in the present directory is not ours.
    return [sys.executable, "-P", "-m", module, "--config", str(config)]
