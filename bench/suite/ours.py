"""Us: the block stream between two processes, from one image backend's snapshot into another one's stage.

What is measured is what an agent does to move a delta and to be certain of it: `receive` (requests, frames with their
digests, writes, syncs, the journal) and then `verify`, which reads back from the disk what came. Both stand among the
parts of each run. The stage is there before the clock starts, as the others' targets are; the control plane has no part
in it (`command.py` is for that), and neither has the commit.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec import to_builtins

from agent.backends.base import NewSnapshot
from agent.backends.image import ImageBackend
from agent.backends.image_layout import Layout
from agent.delta import DeltaMap
from agent.stream.connection import ServedSnapshot
from agent.stream.frame import Hello
from agent.stream.journal import Journal
from agent.stream.link import SourceAddress
from agent.stream.mapfile import JournalKey
from agent.stream.receiver import Counters, receive, verify
from agent.stream.sender import Authorize, BlockServer
from bench.suite.limit import rehearsal
from bench.suite.measure import Used
from bench.suite.workers import Pair, answer, orders
from resilver.address import Address
from resilver.config import Tls
from resilver.credentials import Credentials
from resilver.lineage import ConsistencyPoint

VOLUME: Final = "vm1"
_VOLUME_ID: Final = "6f0f3c8e-0d55-4a38-9e0e-8a4f6f0c4b51"
_MODULE: Final = "bench.suite.ours"


@dataclass(frozen=True)
class Replica:
    """One node's volume: its live copy is `vm1.img` in a directory of its own."""

    directory: Path

    @property
    def live(self) -> Path:
        return self.directory / f"{VOLUME}.img"

    @property
    def layout(self) -> Layout:
        return Layout(VOLUME, self.live, self.directory / ".resilver" / VOLUME)

    @property
    def backend(self) -> ImageBackend:
        return ImageBackend(VOLUME, self.live, self.layout.root, reserve_ratio=0.0, reserve_min_bytes=0)

    def data(self, snapshot: str) -> Path:
        return self.layout.data(snapshot)

    @property
    def staged(self) -> Path:
        return self.layout.tree / "data"

    def snapshot(self, name: str, sequence: int, parent: str = "") -> Path:
        """Takes a snapshot, and answers its data. Of the same bytes it may have the same id on two nodes."""
        new = NewSnapshot(name, _VOLUME_ID, ConsistencyPoint(1, sequence), parent, "e", 1)
        self.backend.take_snapshot(new)
        return self.data(name)


class Ours:
    """As a competitor."""

    name = "resilver, transfer and read-back"
    how = (
        "the agent's block stream between two processes: digests, journal, syncs; then every changed range is read back"
    )

    def __init__(
        self, source: Replica, target: Replica, base: str, goal: str, ranges: Path, *, tls: Sequence[Tls] = ()
    ) -> None:
        """`tls`: who the source is, and who the target; without it they speak in plaintext."""
        self._source, self._target = source, target
        self._tls = [to_builtins(files) for files in tls] or [None, None]
        self._base, self._goal, self._ranges = base, goal, ranges
        self._pair: Pair | None = None

    def missing(self) -> str:
        return ""

    def before(self) -> None:
        pair = self._pair = Pair(_MODULE)
        self._port = pair.serve.tell(directory=str(self._source.directory), tls=self._tls[0])["port"]
        size = self._source.data(self._goal).stat().st_size
        what = {"base": self._base, "target": self._goal, "size": size, "ranges": str(self._ranges)}
        pair.receive.tell(directory=str(self._target.directory), rehearse_from=self._port, tls=self._tls[1], **what)

    def run(self) -> Used:
        assert self._pair is not None, "before comes first"
        return self._pair.copy(self._port)

    def result(self) -> Path:
        return self._target.staged

    def after(self) -> None:
        if self._pair is not None:
            self._pair.close()
        self._pair = None
        self._target.backend.discard_stage()


def delta_of(ranges: Path, size_bytes: int) -> DeltaMap:
    """The map that `limit.save_ranges` has written down."""
    offsets, lengths = np.load(ranges)
    return DeltaMap(size_bytes, offsets, lengths, np.zeros(len(offsets), dtype=np.bool_))


def serving() -> None:
    """Serves every snapshot that is asked for, until its input ends."""
    for order in orders():
        backend = Replica(Path(order["directory"])).backend
        server = BlockServer(Address("127.0.0.1", 0), serving_of(backend), tls=credentials(order))
        server.start()
        answer(port=server.port)


def serving_of(backend: ImageBackend) -> Authorize:
    return lambda hello: ServedSnapshot(backend.open_reader(hello.target))


def receiving() -> None:
    """Is told the delta and opens a stage for it, is told the port and goes."""
    opened: dict[str, Any] = {}
    tls: Credentials | None = None
    for order in orders():
        if "directory" in order:
            backend, tls = Replica(Path(order["directory"])).backend, credentials(order)
            # A rehearsal, in a stage of its own, so that the program itself is in memory.
            rehearsed = prepared(backend, order, rehearsal(Path(order["ranges"])))
            moved(order["rehearse_from"], tls, **rehearsed)
            for each in ("journal", "stage"):
                rehearsed[each].close()
            backend.discard_stage()
            opened = prepared(backend, order, Path(order["ranges"]))
            answer()
            continue
        answer(**moved(order["port"], tls, **opened))


def credentials(order: dict[str, Any]) -> Credentials | None:
    """Who this process is, if it is anybody."""
    return Credentials(Tls(**order["tls"])) if order["tls"] else None


def prepared(backend: ImageBackend, order: dict[str, Any], ranges: Path) -> dict[str, Any]:
    """A stage for these ranges, and its journal."""
    delta = delta_of(ranges, order["size"])
    stage = backend.open_stage(order["base"], order["target"], order["size"])
    journal = Journal.open(stage.directory, JournalKey.of(order["base"], order["target"], delta), delta)
    return {"stage": stage, "delta": delta, "journal": journal}


def moved(port: int, tls: Credentials | None, stage: Any, delta: DeltaMap, journal: Journal) -> dict[str, float]:
    """The transfer and the read-back, and how long each took."""
    begun = time.perf_counter()
    received = receive(
        stage,
        delta,
        journal,
        [SourceAddress("a", "127.0.0.1", port, tls)],
        Hello("ticket", "resync", VOLUME, stage.target, "b"),
        on_progress=_unheard,
        stop=threading.Event(),
    )
    came = time.perf_counter()
    verify(stage, delta, journal)
    read_back = time.perf_counter()
    return {
        "transfer_s": came - begun,
        "readback_s": read_back - came,
        "stream_bytes": received.counters.wire_bytes,
        "resent_bytes": received.counters.resent_bytes,
    }


def _unheard(_counters: Counters) -> None:
    return None


if __name__ == "__main__":
    {"serve": serving, "receive": receiving}[sys.argv[1]]()
