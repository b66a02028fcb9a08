"""A small network of machines that are network namespaces: a switch in the middle, and everything that can befall it.

* A namespace has no name: it lives as long as a process in it, and each such process dies with the one that started it.
  So nothing is left behind, whatever ends a test, and no two runs can meet. The host's own network is not touched.
* A cut is a rule in the switch: what one machine sends to another one is lost, and nobody is told.
* A machine can be reached from outside by its console, a Unix socket whose connections are made from within it: also
  while it is cut from all others.
* Weather (delay, loss, another order) is `tc netem` where the kernel has it, else `weather.py`, the switch then.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

MTU_BYTES = 9000
COMMAND_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 5.0
BUFFER_BYTES = 64 << 10
TOOLS = ("ip", "tc", "nft", "nsenter", "setpriv", "unshare")
_CLONE_NEWNET = 0x40000000
_SIOCETHTOOL, _ETHTOOL_STXCSUM = 0x8946, 0x17

needs_network = pytest.mark.skipif(
    os.geteuid() != 0 or not all(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for tool in TOOLS),
    reason=f"only root can make network namespaces, with {', '.join(TOOLS)}",
)


_ROOT = Path(__file__).parents[2]
_CUTS = """
table bridge cuts {
    set pairs { type ifname . ifname; }
    chain forward {
        type filter hook forward priority 0;
        meta iifname . meta oifname @pairs drop
    }
}
"""


class NoSuchThing(RuntimeError):
    """The kernel lacks what was asked for."""


class Namespace:
    """A network namespace, and the process that keeps it."""

    def __init__(self) -> None:
        self._keeper = subprocess.Popen(
            ["unshare", "--net", "--", "setpriv", "--pdeathsig", "KILL", "--", "cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.write(b"\n")
        self._keeper.stdin.flush()
        assert self._keeper.stdout.read(1), "no network namespace was made"
        self.pid: int = self._keeper.pid
        self.within = ThreadPoolExecutor(1, initializer=_enter, initargs=(self.pid,))
        """A thread that is in it: a socket that it makes is of this namespace, wherever it is used."""

    def command(self, *words: str) -> list[str]:
        """The command in this namespace, without a process between; it dies with the thread that starts it."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", "setpriv", "--pdeathsig", "KILL", "--", *words]

    def run(self, *words: str, feed: str = "") -> str:
        """Runs a tool and answers its output; its errors go into the exception."""
        done = subprocess.run(
            self.command(*words), input=feed, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
        if "Specified qdisc kind is unknown" in done.stderr:
            raise NoSuchThing(done.stderr)
        if done.returncode != 0:
            raise RuntimeError(f"{words}: {done.stdout}{done.stderr}\n{feed}")
        return done.stdout

    def ip(self, *lines: str) -> None:
        self.run("ip", "-batch", "-", feed="\n".join(lines))

    def close(self) -> None:
        self.within.shutdown(wait=True)
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            if pipe is not None:
                pipe.close()
        self._keeper.kill()
        self._keeper.wait(10)


@dataclass(frozen=True)
class Weather:
    """What befalls each frame between two machines, once. `reorder` of them overtake all others, undelayed."""

    delay_ms: float = 40.0
    jitter_ms: float = 20.0
    loss: float = 0.03
    reorder: float = 0.25


@dataclass
class Network:
    """The machines by name; `hub` is the switch's own namespace, from which all of them are always in reach."""

    hub: Namespace
    machines: dict[str, Namespace] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    _cuts: set[tuple[str, str]] = field(default_factory=set)
    _raining: bool = False
    _switch: subprocess.Popen[bytes] | None = None

    # Who reaches whom.

    def cut(self, ones: Iterable[str], others: Iterable[str]) -> None:
        """Nothing passes between any of the ones and any of the others, until it is healed."""
        others = tuple(others)
        self._cuts |= {pair for one in ones for other in others for pair in ((one, other), (other, one))}
        self._rule()

    def heal(self) -> None:
        """As if nothing had been: no cut, every link up and as fast as it can be, fair weather."""
        self._cuts.clear()
        self._rule()
        self.calm()
        self.hub.ip(*(f"link set dev {name} up" for name in self.machines))
        for name in self.machines:
            self.fast(name)

    def unplug(self, name: str) -> None:
        self.hub.ip(f"link set dev {name} down")

    def plug(self, name: str) -> None:
        self.hub.ip(f"link set dev {name} up")

    def _rule(self) -> None:
        pairs = ", ".join(f'"{one}" . "{other}"' for one, other in sorted(self._cuts))
        lines = ["flush set bridge cuts pairs", *([f"add element bridge cuts pairs {{ {pairs} }}"] if pairs else ())]
        self.hub.run("nft", "-f", "-", feed="\n".join(lines))

    # How well.

    def slow(self, name: str, bytes_s: int) -> None:
        """A machine gets no more than that."""
        rate = ("rate", f"{bytes_s}bps", "burst", "128kb", "latency", "100ms")
        self.hub.run("tc", "qdisc", "replace", "dev", name, "root", "tbf", *rate)

    def fast(self, name: str) -> None:
        if "tbf" in self.hub.run("tc", "qdisc", "show", "dev", name):
            self.hub.run("tc", "qdisc", "del", "dev", name, "root")

    def came_to(self, name: str) -> int:
        """The bytes that the switch has passed on to a machine."""
        fields = self.hub.run("cat", "/proc/net/dev").split(f" {name}:", 1)[1].split()
        return int(fields[8])

    def rain(self, weather: Weather, seed: int = 1) -> None:
        """Every frame from one machine to another one takes that, until `calm`."""
        assert not self._raining, "one weather at a time"
        self._raining = True
        netem = (
            "netem", "delay", f"{weather.delay_ms:g}ms", f"{weather.jitter_ms:g}ms",
            "loss", f"{weather.loss:%}", "reorder", f"{weather.reorder:%}", "limit", "100000",
        )  # fmt: skip
        with contextlib.suppress(NoSuchThing):
            for name in self.machines:
                self.hub.run("tc", "qdisc", "replace", "dev", name, "root", *netem)
            return
        self.hub.ip(*(f"link set dev {name} nomaster" for name in self.machines))
        words = (seed, weather.delay_ms, weather.jitter_ms, weather.loss, weather.reorder, *self.machines)
        module = ("-m", "tests.partitions.weather")
        self._switch = subprocess.Popen(
            self.hub.command(sys.executable, *module, *map(str, words)), stdout=subprocess.PIPE, cwd=_ROOT
        )
        assert self._switch.stdout is not None
        assert self._switch.stdout.readline(), "the weather did not begin"

    def calm(self) -> None:
        if not self._raining:
            return
        self._raining = False
        if self._switch is None:
            for name in self.machines:
                self.hub.run("tc", "qdisc", "del", "dev", name, "root")
            return
        self._switch.kill()
        self._switch.wait(10)
        assert self._switch.stdout is not None
        self._switch.stdout.close()
        self._switch = None
        self.hub.ip(*(f"link set dev {name} master switch" for name in self.machines))

    def close(self) -> None:
        self.calm()
        for namespace in (*self.machines.values(), self.hub):
            namespace.close()


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """Machines `10.77.0.1` and on, each with its one link to the switch; all of it is gone at the end of the block."""
    made = Network(Namespace())
    try:
        made.hub.ip("link set lo up", f"link add switch mtu {MTU_BYTES} type bridge", "link set switch up")
        for number, name in enumerate(names, start=1):
            machine = made.machines[name] = Namespace()
            made.addresses[name] = f"10.77.0.{number}"
            link = f"mtu {MTU_BYTES} type veth peer name eth0 mtu {MTU_BYTES} netns {machine.pid}"
            made.hub.ip(f"link add name {name} {link}", f"link set dev {name} master switch up")
            machine.ip("link set lo up", f"addr add {made.addresses[name]}/24 dev eth0", "link set eth0 up")
            # Whole frames with their checksums: what they pass by is not always a network card.
            machine.within.submit(_whole_frames, "eth0").result(COMMAND_TIMEOUT_S)
        made.hub.run("nft", "-f", "-", feed=_CUTS)
        yield made
    finally:
        made.close()


class Console:
    """A Unix socket by which a port of a machine is reached from outside, as if by somebody who sits before it."""

    def __init__(self, machine: Namespace, address: tuple[str, int]) -> None:
        self._machine = machine
        self._address = address
        # A name that is in no directory goes with whoever holds it.
        name = f"resilver-console-{uuid.uuid4()}"
        self.target: str = f"unix-abstract:{name}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0{name}")
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while True:
                client, _ = self._listener.accept()
                try:
                    connecting = self._machine.within.submit(socket.create_connection, self._address, CONNECT_TIMEOUT_S)
                    server = connecting.result()
                    server.settimeout(None)
                except OSError:
                    client.close()
                    continue
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=_pass, args=pair, daemon=True).start()


def _pass(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(BUFFER_BYTES):
            target.sendall(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def _enter(pid: int) -> None:
    """The calling thread, and no other, goes into the network namespace of that process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{pid}/ns/net").open("rb") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def _whole_frames(link: str) -> None:
    value = array.array("B", struct.pack("II", _ETHTOOL_STXCSUM, 0))
    request = struct.pack("16sP16x", link.encode(), value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, request)
