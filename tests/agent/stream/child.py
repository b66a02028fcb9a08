"""One side of a transfer as a process of its own, to be killed: `python -m` this module, `serve` or `receive`."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from agent.delta import DeltaMap, DeltaRange
from agent.stream.journal import Journal
from agent.stream.receiver import Counters, receive
from agent.stream.sender import BlockServer
from resilver.address import Address
from tests.agent.stream.support import HELLO, MIB, FileStage, at, authorize, open_journal, scattered


def delta_of(kind: str, size: int) -> DeltaMap:
    rows = [DeltaRange(0, size)] if kind == "sequential" else scattered(size // 16384, size=8192)
    return DeltaMap.of(size, rows)


def tell(**what: int) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def serve_file(path: str) -> None:
    server = BlockServer(Address("127.0.0.1", 0), authorize(Path(path)))
    server.start()
    tell(port=server.port)
    threading.Event().wait()


def receive_file(path: str, size: str, kind: str, port: str) -> None:
    stage = FileStage(Path(path), int(size))
    journal = Journal.load(stage.directory)
    if journal is None:
        journal = open_journal(stage, delta_of(kind, int(size)))
    tell(journaled=journal.done_bytes)

    def on_progress(counters: Counters) -> None:
        tell(done=counters.done_bytes, wire=counters.wire_bytes)

    receive(stage, journal.delta, journal, [at(int(port))], HELLO, on_progress=on_progress, stop=threading.Event())
    tell(complete=int(journal.complete), mib=int(size) // MIB)


if __name__ == "__main__":
    {"serve": serve_file, "receive": receive_file}[sys.argv[1]](*sys.argv[2:])
