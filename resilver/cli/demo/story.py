"""What happens in the demo, one act after the other, and the proofs at the end."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from resilver.cli.demo.ground import (
    BLOCK,
    VOLUME_BYTES,
    data_blocks,
    failed,
    file_system_is_clean,
    make_volume,
    overwrite,
    prepare,
    sha256,
)
from resilver.cli.demo.processes import CLUSTER, OPERATOR, Cluster
from resilver.cli.words import size
from resilver.names import Name, Role
from resilver.tls import server_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from resilver.cli.demo.cleanup import Cleanup
    from resilver.cli.demo.ground import Ground

NODES: Final = ("a", "b", "c")
VOLUME: Final = "vm1"
ROUNDS: Final = 3
CHANGED_PERCENT: Final = 1
OWN_BLOCKS: Final = 64
WAIT_S: Final = 30.0
POLL_S: Final = 0.2
COMMAND_TIMEOUT_S: Final = 90.0
SEED: Final = 20_070_612
"""The same data and the same blocks every time, so that two runs can be compared."""


class Story:
    """The demo, from an empty directory to the proofs. Whatever it makes is undone by the cleanup."""

    def __init__(self, console: Console, cleanup: Cleanup) -> None:
        self._console = console
        self._cleanup = cleanup
        self._seed = random.Random(SEED)  # noqa: S311  # test data, not secrets
        self._ground: Ground = prepare(cleanup)
        self.cluster = Cluster(self._ground.base, cleanup)
        self._changed_bytes = 0
        self._free_blocks: list[int] = []

    def tell(self) -> None:
        """All acts. Raises DemoFailed if something does not turn out as it must."""
        self._act("A cluster: one coordinator, three agents, one volume")
        self._begin()
        self._act("The first mirror: a has the data, b and c are empty")
        self._resilver("resync", VOLUME)
        self._act("Node c goes down; meanwhile the volume changes and takes consistency points")
        self._change_without_c()
        self._act("Somebody writes to b's copy: b diverges. And c comes back")
        own = self._diverge()
        self._act("What is wrong, and what would be done")
        self._resilver("status")
        self._resilver("plan", "--all")
        self._act("Bring all back")
        self._resilver("resync", "--all")
        self._act("Proofs")
        self._prove(own)

    def _begin(self) -> None:
        say = self._console.print
        say(f"disks        {self._ground.kind}, in {self._ground.base}")
        for node in NODES:
            self._ground.image(node).parent.mkdir(parents=True)
        say(f"volume {VOLUME}   {make_volume(self._ground.image('a'), self._ground.base, self._seed)}")
        self._free_blocks = data_blocks(self._ground.image("a"))
        self._seed.shuffle(self._free_blocks)
        say(f"certificates in {self.cluster.make_certificates()}: programs and command speak TLS 1.3, each by its name")
        say(f"store        {self.cluster.start_store()}")
        self.cluster.start_coordinator()
        say(f"coordinator  c1 on {self.cluster.coordinator}")
        for node in NODES:
            self.cluster.start_agent(node, self._ground.image(node))
            control, stream = self.cluster.agent_ports[node]
            say(f"agent        {node} on 127.0.0.1:{control}, blocks on 127.0.0.1:{stream}")
        self._wait("all agents report", lambda: self._reachable() == set(NODES))

    def _change_without_c(self) -> None:
        self.cluster.stop("c")
        self._wait("c is seen to be away", lambda: self._reachable() == {"a", "b"})
        self._console.print("agent c is stopped")
        count = VOLUME_BYTES * CHANGED_PERCENT // 100 // BLOCK
        for number in range(ROUNDS):
            share = count // ROUNDS + (number < count % ROUNDS)
            written = overwrite(self._ground.image("a"), self._take(share), self._seed)
            self._changed_bytes += written
            self._console.print(f"{size(written)} written on a, in {share} scattered blocks of 4 KiB inside its files")
            self._resilver("snapshot", VOLUME, "--note", f"demo, change {number + 1}")
        self._resilver("resync", VOLUME, "--to", "b")

    def _diverge(self) -> str:
        """Writes to the secondary b; the digest of what b then has."""
        image = self._ground.image("b")
        written = overwrite(image, self._take(OWN_BLOCKS), self._seed)
        own = sha256(image)
        self._console.print(f"{size(written)} written straight into b's copy, which nobody may: {image}")
        self.cluster.start_agent("c", self._ground.image("c"))
        self._wait("c is back", lambda: self._reachable() == set(NODES))
        # A plan examines every replica, so that the status that is shown next knows what was written to b.
        self._ask("plan", "--all")
        self._wait("b is seen to have diverged", lambda: self._states().get("b") == "DIVERGED")
        return own

    def _prove(self, own: str) -> None:
        say = self._console.print
        digests = {node: sha256(self._ground.image(node)) for node in NODES}
        for node, digest in digests.items():
            clean = file_system_is_clean(self._ground.image(node))
            verdict = {True: "   e2fsck: clean", False: "   e2fsck: DAMAGED", None: ""}[clean]
            say(f"sha256 {node}   {digest}{verdict}")
            if clean is False:
                raise failed(f"the file system on {node} is damaged")
        if len(set(digests.values())) != 1:
            raise failed("the three copies differ")
        say("the three live copies are identical", style="bold green")
        self._resilver("preserved")
        self._prove_kept(own)
        self._figures()

    def _prove_kept(self, own: str) -> None:
        kept = [one for one in self._ask("preserved", VOLUME)["preserved"] if one["node"] == "b" and one["live"]]
        if not kept:
            raise failed("what b had of its own was not preserved")
        path = self._ground.base / "b-own.img"
        self._resilver("export", kept[0]["id"][:8], "--node", "b", "--to", str(path))
        if sha256(path) != own:
            raise failed("the preserved copy is not what b had")
        self._console.print("the copy that came out is, byte for byte, what b had", style="bold green")

    def _figures(self) -> None:
        runs = self._ask("resyncs", VOLUME)["resyncs"]
        # Newest first or last, c went through two: the first mirror, and the one that counts here.
        last = max((run for run in runs if run["node"] == "c"), key=lambda run: run["create_time"] or "")
        moved, wire = last["done_bytes"] or 0, last["wire_bytes"] or 0
        rows = [
            ("changed while c was down", self._changed_bytes),
            ("moved to bring c back", moved),
            ("  of it on the wire", wire),
            ("sent again", last["resent_bytes"] or 0),
            ("the volume", VOLUME_BYTES),
        ]
        self._console.print()
        for name, count in rows:
            share = f"{100 * count / VOLUME_BYTES:6.2f} % of the volume"
            self._console.print(f"{name:<26} {size(count):>10}   {share}")

    def closing(self) -> None:
        """What to try next, with the real addresses."""
        at = self.cluster.coordinator
        agent = f"127.0.0.1:{self.cluster.agent_ports['b'][0]}"
        self._act("Try next")
        files = self.cluster.tls(OPERATOR)
        ask = f"grpcurl -cacert {files['ca']} -cert {files['cert']} -key {files['key']}"
        known, node = server_name(Name(CLUSTER, Role.COORDINATOR, "c1")), server_name(Name(CLUSTER, Role.NODE, "b"))
        lines = [
            f"export RESILVER_COORDINATOR={at}",
            "export " + " ".join(f"RESILVER_TLS_{key.upper()}={path}" for key, path in files.items()),
            "resilver status --watch",
            f"resilver explain {VOLUME}",
            f"resilver history {VOLUME}",
            f"resilver elect {VOLUME} --dry-run",
            f"resilver certs show {self._ground.base / 'ca'}",
            f"alias ask='{ask}'",
            f"ask -authority {known} {at} list",
            f"ask -authority {known} {at} resilver.v1.Coordinator/ListVolumes",
            f"ask -authority {known} -d '{{\"all\": true}}' {at} resilver.v1.Coordinator/PlanResync",
            f"ask -authority {node} {agent} resilver.v1.Agent/GetAgent   # refused: agents obey coordinators alone",
        ]
        for line in lines:
            self._console.print(f"  {line}", soft_wrap=True)

    def stay(self) -> None:
        """Keeps the cluster until Ctrl-C. Who kills a part of it, to see, is told how to start it again."""
        place = self._ground.base
        self._console.print(f"\nThe cluster stays until Ctrl-C. Its files and logs: {place}", soft_wrap=True)
        told: set[str] = set()
        while True:
            for program in self.cluster.programs.values():
                if program.ended and program.name not in told:
                    told.add(program.name)
                    self._console.print(f"{program.name} has ended; to start it again: {program.line}", soft_wrap=True)
            time.sleep(1)  # until Ctrl-C

    def logs(self) -> str:
        """The end of every program's log, for when something failed."""
        return "\n".join(f"{name}:\n{program.log_end()}" for name, program in self.cluster.programs.items())

    # The command, as an operator would use it.

    def _resilver(self, *arguments: str) -> None:
        """Runs the command on this terminal; raises DemoFailed if it does not end with 0."""
        self._console.print(f"\n$ resilver {shlex.join(arguments)}", style="bold", soft_wrap=True)
        done = subprocess.run(self._command(*arguments), check=False, timeout=COMMAND_TIMEOUT_S)
        if done.returncode != 0:
            raise failed(f"resilver {' '.join(arguments)} ended with {done.returncode}")

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """What the command answers in JSON; empty if it does not."""
        done = subprocess.run(
            self._command(*arguments, "-o", "json"),
            capture_output=True,
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )
        try:
            found = json.loads(done.stdout)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _command(self, *arguments: str) -> list[str]:
        program = [sys.executable, "-P", "-m", "resilver.cli.main"]
        who = [word for key, path in self.cluster.tls(OPERATOR).items() for word in (f"--tls-{key}", str(path))]
        return [*program, "--coordinator", self.cluster.coordinator, *who, "--timeout", "60s", *arguments]

    def _reachable(self) -> set[str]:
        return {node["name"] for node in self._ask("nodes").get("nodes", []) if node["reachable"]}

    def _states(self) -> dict[str, str]:
        volumes = self._ask("status", VOLUME).get("volumes", [])
        return {replica["node"]: replica["state"] for volume in volumes for replica in volume["replicas"]}

    def _wait(self, what: str, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not reached():
            self.cluster.check()
            if time.monotonic() > deadline:
                raise failed(f"waited {WAIT_S:g} s in vain until {what}")
            time.sleep(POLL_S)

    def _take(self, count: int) -> list[int]:
        """Blocks of the volume's files that were not written yet."""
        taken, self._free_blocks = self._free_blocks[:count], self._free_blocks[count:]
        return taken

    def _act(self, title: str) -> None:
        self._console.print()
        self._console.print(f"=== {title}", style="bold cyan")
