"""A real cluster on this machine: etcd or sqlite, coordinators and agents as processes, the command as a process.

Nothing is shared with the code under test but its command lines, its configuration files and its API, as a user would
have them. What the operator does goes through the command; only waiting asks the coordinator itself, because a command
takes half a second of a core to start.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from resilver.cli.plainjson import plain, plain_list
from resilver.names import Role
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import coordinator_pb2_grpc
from tests.certificates import Authority, channel

DEADLINE_S = 60.0


WORKERS_MAX = 16
_ports_given: set[int] = set()


def free_port() -> int:
    """A port that nothing listens on, below those that the kernel gives to outgoing connections; each only once.

    Those who run tests beside each other have ports of their own: what one has been given, and does not listen on yet,
    would be free for another.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS_MAX
    for port in random.sample(range(lowest // 2 + worker, lowest, WORKERS_MAX), 100):
        with socket.socket() as probe:
            if port not in _ports_given and probe.connect_ex(("127.0.0.1", port)) != 0:
                _ports_given.add(port)
                return port
    raise AssertionError("a hundred ports, and something listens on each")


def wait_for(what: Callable[[], Any], why: str, deadline_s: float = DEADLINE_S, every_s: float = 0.1) -> Any:
    """The first true answer; fails with `why` after the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < end, f"{why}: not within {deadline_s:g} s"
        time.sleep(every_s)  # a bounded poll of other processes: they have no event that could be waited for


@dataclass(frozen=True)
class Ran:
    """What one run of the command ended with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def _plain_environment() -> dict[str, str]:
    """As a user has it: what a test's own import of ours has set is not handed on, but set by each process itself."""
    ours = {"GRPC_SSL_CIPHER_SUITES", "GRPC_VERBOSITY"}
    return {key: value for key, value in os.environ.items() if key not in ours}


@dataclass
class Process:
    """One daemon, its log in a file."""

    name: str
    command: list[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**_plain_environment(), **self.env}
            )

    @property
    def pid(self) -> int:
        assert self.running is not None
        return self.running.pid

    def send(self, number: int) -> None:
        assert self.running is not None
        self.running.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and waits until it is gone."""
        if self.running is not None:
            self.running.send_signal(signal.SIGCONT)
            self.running.kill()
            self.running.wait(10)
            self.running = None

    def stop(self) -> None:
        """SIGTERM; killed if it has not gone within 10 s."""
        if self.running is None:
            return
        self.running.send_signal(signal.SIGCONT)
        self.running.terminate()
        try:
            self.running.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self.running = None

    @property
    def alive(self) -> bool:
        return self.running is not None and self.running.poll() is None

    def memory_peak_bytes(self) -> int:
        """The largest resident set so far (VmHWM)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(row for row in status.splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


@dataclass
class Cluster:
    """Etcd (or sqlite), one coordinator, and agents; `directory` holds configs, logs and state.

    With an `authority` everybody has a certificate, and this process asks as the operator `test`.
    """

    directory: Path
    store: str = "etcd"
    name: str = "test"
    processes: dict[str, Process] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    paths: dict[tuple[str, str], Path] = field(default_factory=dict)
    etcd_url: str = ""
    """Of an etcd that the test keeps itself; empty if the cluster is to start one."""
    channels: dict[int, grpc.Channel] = field(default_factory=dict)
    lease_ttl_s: int = 10
    authority: Authority | None = None
    answering: str = ""
    """The coordinator that answered last: asked first, because another one may be stopped."""

    def host(self, name: str) -> str:
        """The address of what has that name; all are on this machine's loopback."""
        del name
        return "127.0.0.1"

    def within(self, name: str, command: list[str]) -> list[str]:
        """The command as it is started where `name` is; an operator's command has none."""
        del name
        return command

    def console(self, name: str) -> str:
        """Where this process asks a coordinator."""
        return f"{self.host(name)}:{self.ports[name]}"

    def process(self, name: str, *command: str, **env: str) -> Process:
        made = Process(name, self.within(name, list(command)), self.directory / f"{name}.log", env)
        self.processes[name] = made
        made.start()
        return made

    def start_etcd(self) -> str:
        client = self.ports.setdefault("etcd", free_port())
        peer = self.ports.setdefault("etcd-peer", free_port())
        data = self.directory / "etcd"
        self.process(
            "etcd", "etcd", "--name", "e1", "--data-dir", str(data),
            "--listen-client-urls", f"http://127.0.0.1:{client}", "--advertise-client-urls", f"http://127.0.0.1:{client}",
            "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", f"e1=http://127.0.0.1:{peer}", "--logger", "zap",
        )  # fmt: skip
        return f"etcd://127.0.0.1:{client}"

    def start_coordinator(self, name: str = "c1", extra: str = "") -> None:
        port = self.ports.setdefault(name, free_port())
        url = f"sqlite://{self.directory}/store.db"
        if self.store == "etcd":
            self.etcd_url = self.etcd_url or self.start_etcd()
            url = self.etcd_url
        config = self.directory / f"{name}.toml"
        config.write_text(
            f'name = "{name}"\ncluster = "{self.name}"\nlisten = "{self.host(name)}:{port}"\nstore = "{url}"\n'
            f'metrics_listen = "127.0.0.1:{self.ports.setdefault(name + "-metrics", free_port())}"\n'
            f'state_dir = "{self.directory}/{name}"\nlease_ttl_s = {self.lease_ttl_s}\n{extra}\n'
            + self.tls(Role.COORDINATOR, name)
        )
        self.process(name, sys.executable, "-m", "coordinator.app", "--config", str(config))

    def tls(self, role: Role, name: str) -> str:
        """The table of a configuration; empty without an authority."""
        return "" if self.authority is None else self.authority.toml(role, name)

    @property
    def coordinators(self) -> list[str]:
        return [name for name in self.ports if name in ("c1", "c2")]

    def image(self, node: str, volume: str) -> Path:
        """The live copy of a volume on a node."""
        return self.paths[node, volume]

    def records(self, node: str, volume: str) -> Path:
        """The directory of a volume's snapshots and records on a node."""
        live = self.paths[node, volume]
        return live.parent / ".resilver" / volume

    def snapshot_data(self, node: str, volume: str, snapshot: str) -> Path:
        """The bytes of one snapshot on a node."""
        return self.records(node, volume) / snapshot / "data"

    def agent_config(
        self,
        node: str,
        volumes: Mapping[str, Path],
        extra: str = "",
        volume_extra: str = "",
        *,
        backend: str = "image",
    ) -> Path:
        """Writes an agent's configuration and answers its path."""
        coordinators = ", ".join(f'"{self.host(name)}:{self.ports[name]}"' for name in self.coordinators)
        for what in ("", "-stream", "-metrics"):
            self.ports.setdefault(node + what, free_port())
        text = (
            f'node = "{node}"\ncluster = "{self.name}"\ncoordinators = [{coordinators}]\n'
            f'listen = "{self.host(node)}:{self.ports[node]}"\n'
            f'stream_listen = "{self.host(node)}:{self.ports[node + "-stream"]}"\n'
            f'metrics_listen = "127.0.0.1:{self.ports[node + "-metrics"]}"\n'
            f'state_dir = "{self.directory}/{node}"\n{extra}\n'
        )
        text += self.tls(Role.NODE, node)
        if "[space]" not in extra:
            text += "[space]\nreserve_ratio = 0.0\nreserve_min_bytes = 16777216\n"
        for volume, path in volumes.items():
            self.paths[node, volume] = path
            priority = 10 if node == "a" else 0
            text += f'[[volumes]]\nname = "{volume}"\nbackend = "{backend}"\npath = "{path}"\n'
            text += f"priority = {priority}\n{volume_extra}\n"
        config = self.directory / f"{node}.toml"
        config.write_text(text)
        return config

    def start_agent(
        self,
        node: str,
        volumes: Mapping[str, Path],
        extra: str = "",
        volume_extra: str = "",
        *,
        backend: str = "image",
    ) -> Process:
        config = self.agent_config(node, volumes, extra, volume_extra, backend=backend)
        return self.process(node, sys.executable, "-m", "agent.app", "--config", str(config))

    def restart(self, name: str) -> None:
        self.processes[name].start()

    def cli(self, *arguments: str, timeout_s: float = 100.0) -> Ran:
        """Runs the operator's command; adds `-o json` unless an output is named."""
        words = list(arguments) if "-o" in arguments else [*arguments, "-o", "json"]
        addresses = ",".join(f"{self.host(name)}:{self.ports[name]}" for name in self.coordinators)
        if self.authority is not None:
            mine = self.authority.issue(Role.OPERATOR, "test")
            words = ["--tls-ca", mine.ca, "--tls-cert", mine.cert, "--tls-key", mine.key, *words]
        done = subprocess.run(
            self.within("", [sys.executable, "-m", "resilver.cli.main", "--coordinator", addresses, *words]),
            capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr + done.stdout, done.stderr + done.stdout
        return Ran(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str, timeout_s: float = 100.0) -> Any:
        """The JSON of a run that must end with 0."""
        ran = self.cli(*arguments, timeout_s=timeout_s)
        assert ran.code == 0, f"{arguments}: exit {ran.code}\n{ran.out}\n{ran.err}"
        return ran.json

    def refused(self, *arguments: str, reason: str) -> Ran:
        """A run that must be refused: exit 3, and this reason first on stderr."""
        ran = self.cli(*arguments)
        assert ran.code == 3, f"{arguments}: exit {ran.code}\n{ran.out}\n{ran.err}"
        assert reason in ran.err.splitlines()[0], ran.err
        return ran

    def ask(self, method: str, request: Any) -> Any:
        """The leader's answer to one call; None while nobody leads, or if it is refused."""
        for name in sorted(self.coordinators, key=lambda name: (name != self.answering, name)):
            try:
                answer = self.ask_one(name, method, request)
            except grpc.RpcError:
                continue
            self.answering = name
            return answer
        return None

    def ask_one(self, name: str, method: str, request: Any) -> Any:
        """One coordinator's answer, or the error of the call, raised."""
        port = self.ports[name]
        if port not in self.channels:
            mine = None if self.authority is None else self.authority.issue(Role.OPERATOR, "test")
            self.channels[port] = channel(self.console(name), mine, Role.COORDINATOR)
        stub: Any = coordinator_pb2_grpc.CoordinatorStub(self.channels[port])
        return getattr(stub, method)(request, timeout=5.0)

    def volume(self, volume: str) -> dict[str, Any]:
        """The volume as `status -o json` has it; empty while nobody knows it."""
        answer = self.ask("ListVolumes", api.ListVolumesRequest(volumes=[volume], view=api.VOLUME_VIEW_BASIC))
        return plain(answer.volumes[0]) if answer and answer.volumes else {}

    def node(self, node: str) -> dict[str, Any]:
        """The node as `nodes -o json` has it; empty while nobody knows it."""
        answer = self.ask("ListNodes", api.ListNodesRequest())
        return next((plain(one) for one in answer.nodes if one.name == node), {}) if answer else {}

    def leader(self) -> str:
        """The coordinator that leads; empty while none does."""
        answer = self.ask("GetCluster", api.GetClusterRequest())
        return str(answer.leader) if answer else ""

    def resyncs(self, volume: str) -> list[dict[str, Any]]:
        """The resyncs as `resyncs -o json` has them, the newest first; empty while nobody leads."""
        answer = self.ask("ListResyncs", api.ListResyncsRequest(volume=volume))
        return plain_list(answer.resyncs) if answer else []

    def replicas(self, volume: str) -> dict[str, Any]:
        """The rows of `status`, by node; empty as `volume` is."""
        return {row["node"]: row for row in self.volume(volume).get("replicas", ())}

    def wait_state(self, volume: str, node: str, state: str) -> Any:
        """The replica's row once it is in that state and reachable."""

        def there() -> Any:
            row = self.replicas(volume).get(node, {})
            return row if row.get("reachable") and row["state"] == state else None

        return wait_for(there, f"{volume}/{node} is {state}")

    def wait_reachable(self, volume: str, *nodes: str) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            for node in nodes:
                if node in self.processes:
                    assert self.processes[node].alive, f"agent {node} has ended: {self.log(node)[-2000:]}"
            rows = self.replicas(volume)
            return rows if all(rows.get(node, {}).get("reachable") for node in nodes) else None

        return wait_for(there, f"{', '.join(nodes)} reachable for {volume}")

    def wait_away(self, volume: str, node: str) -> None:
        wait_for(lambda: not self.replicas(volume).get(node, {}).get("reachable", True), f"{node} is seen to be away")

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for each in self.channels.values():
            each.close()
        self.channels.clear()
        for process in reversed(list(self.processes.values())):
            process.stop()


@contextmanager
def cluster(directory: Path, store: str = "etcd") -> Iterator[Cluster]:
    """A cluster that ends with the block, whatever happens in it."""
    made = Cluster(directory, store)
    try:
        yield made
    finally:
        made.close()
