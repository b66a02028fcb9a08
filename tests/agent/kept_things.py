"""Each thing that an agent keeps in a small file: the old one, the new one, and what is seen of either."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from agent.delta import DeltaMap, DeltaRange
from agent.disk.durable import append_log, read_json, read_log, remove_file, rewrite_log, write_json
from agent.identity import Identity, Remembered
from agent.stream.journal import Journal
from agent.stream.mapfile import JournalKey, load_map, save_map
from agent.tickets import Ticket, Tickets
from resilver.errors import ResilverError
from resilver.volume import Order

MIB = 1 << 20
CHUNKS = 128  # of which the records do not fit into a block
DELTA = DeltaMap.of(CHUNKS * MIB, [DeltaRange(0, CHUNKS * MIB)])
LESS = DeltaMap.of(CHUNKS * MIB, [DeltaRange(0, MIB)])
DIGEST = blake3(b"chunk").digest()


class Kept(ABC):
    """One thing that is kept. `seen` is a value that tells what there is: `old` or `new`, to whoever holds it open."""

    old: Any
    new: Any
    calls_min = 2

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def begin(self) -> None:
        """Keeps the old one."""

    @abstractmethod
    def change(self) -> None:
        """Keeps the new one instead."""

    @abstractmethod
    def seen(self) -> Any: ...

    def open(self) -> None:  # noqa: B027 - most have nothing to open
        """As a process does that starts."""

    def close(self) -> None:  # noqa: B027 - as above
        """As the end of a process does."""


class Value(Kept):
    old, new = {"n": 1}, {"n": 2}

    @property
    def path(self) -> Path:
        return self.directory / "value.json"

    def begin(self) -> None:
        write_json(self.path, self.old)

    def change(self) -> None:
        write_json(self.path, self.new)

    def seen(self) -> Any:
        return read_json(self.path)


class FirstValue(Value):
    old, new = None, {"n": 2}

    def begin(self) -> None:
        remove_file(self.path)


class NoValue(Value):
    old, new = {"n": 1}, None
    calls_min = 1  # it needs no room but for the directory

    def change(self) -> None:
        remove_file(self.path)


class Log(Kept):
    old, new = [1], [1, 2]

    def begin(self) -> None:
        remove_file(self.directory / "log")
        append_log(self.directory / "log", {"n": 1})

    def change(self) -> None:
        if self.seen() != self.new:
            append_log(self.directory / "log", {"n": 2, "more": "than a block " * 400})

    def seen(self) -> Any:
        return [value["n"] for value in read_log(self.directory / "log")]


class ShorterLog(Kept):
    """A log is replaced by one with less in it."""

    old, new = list(range(200)), list(range(100, 200))

    def begin(self) -> None:
        rewrite_log(self.directory / "log", ({"n": n} for n in self.old))

    def change(self) -> None:
        rewrite_log(self.directory / "log", ({"n": n} for n in self.new))

    def seen(self) -> Any:
        return [value["n"] for value in read_log(self.directory / "log")]


class Map(Kept):
    old, new = JournalKey.of("b", "t", LESS), JournalKey.of("b", "t", DELTA)

    def begin(self) -> None:
        save_map(self.directory / "map.bin", "b", "t", LESS)

    def change(self) -> None:
        save_map(self.directory / "map.bin", "b", "t", DELTA)

    def seen(self) -> Any:
        found = load_map(self.directory / "map.bin")
        return None if found is None else found[0]


class Records(Kept):
    """The journal: after a fault it takes nothing more, and another run opens it again."""

    old, new = [True] + [False] * (CHUNKS - 1), [True] * CHUNKS
    journal: Journal | None = None

    def begin(self) -> None:
        for path in self.directory.iterdir():
            path.unlink()
        self.open()
        self._append([0])
        self.close()

    def open(self) -> None:
        self.close()
        self.journal = Journal.open(self.directory, JournalKey.of("b", "t", DELTA), DELTA)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    def change(self) -> None:
        if self.journal is None:
            self.open()
        try:
            self._append(list(range(1, CHUNKS)))
        except ResilverError:
            assert self.seen() == self.old, "what may not be on the disk is not called done"
            self.close()
            raise

    def _append(self, numbers: list[int]) -> None:
        assert self.journal is not None
        self.journal.append_many(numbers, [DIGEST] * len(numbers))

    def seen(self) -> Any:
        if self.journal is None:
            self.open()
        assert self.journal is not None
        return self.journal.done.tolist()


class NewJournal(Records):
    """With its map, where there was none."""

    old, new = [False] * CHUNKS, [False] * CHUNKS

    def begin(self) -> None:
        self.close()
        for path in self.directory.iterdir():
            path.unlink()

    def open(self) -> None:
        if (self.directory / "map.bin").exists():
            super().open()

    def change(self) -> None:
        self.close()
        super().open()

    def seen(self) -> Any:
        if self.journal is None:
            super().open()
        return super().seen()


class State(Kept):
    """state_dir."""

    identity: Identity | None = None

    @property
    def state(self) -> Identity:
        if self.identity is None:
            self.identity = Identity(self.directory, "test", "a")
        return self.identity

    def open(self) -> None:
        self.close()
        assert self.state

    def close(self) -> None:
        if self.identity is not None:
            self.identity.close()
            self.identity = None


def order(term: int, leader: str = "L") -> Order:
    return Order("test", "S", term, leader, "vm1")


class Pinned(State):
    """A state_dir that has obeyed a term already."""

    obeyed: int

    def begin(self) -> None:
        (self.directory / "identity.json").unlink(missing_ok=True)
        self.open()
        self.state.admit(order(self.obeyed))
        self.close()


class Term(Pinned):
    """An order of a higher term is not obeyed unless the term is on the disk."""

    old, new = 3, 5
    obeyed = 3

    def change(self) -> None:
        self.state.admit(order(5))
        on_disk = read_json(self.directory / "identity.json")
        assert on_disk is not None
        assert on_disk["term"] == 5, "it was obeyed, so it is kept"

    def seen(self) -> Any:
        state = self.state
        with pytest.raises(ResilverError):
            state.admit(order(2))
        with pytest.raises(ResilverError):
            state.admit(order(state.pin.term, "another"))
        return state.pin.term


class Store(Pinned):
    """A store is adopted: its terms count anew."""

    old, new = ("S", 7), ("S2", 0)
    obeyed = 7

    def change(self) -> None:
        self.state.adopt_store("S2")

    def seen(self) -> Any:
        return self.state.pin.store_id, self.state.pin.term


class Place(State):
    """Where a volume's data was seen."""

    old, new = Remembered("fs", "tip-1", "v"), Remembered("fs", "tip-2", "v")

    def begin(self) -> None:
        self.open()
        self.state.remember("vm1", self.old)
        self.close()

    def change(self) -> None:
        self.state.remember("vm1", self.new)

    def seen(self) -> Any:
        return self.state.remembered("vm1")


class Serving(Kept):
    """A source's tickets: one that is not on the disk is not honoured."""

    old, new = {"r1"}, {"r1", "r2"}
    tickets: Tickets | None = None

    def begin(self) -> None:
        remove_file(self.directory / "tickets.json")
        self.open()
        self._keep("r1")

    def open(self) -> None:
        self.tickets = Tickets(self.directory / "tickets.json")

    def change(self) -> None:
        self._keep("r2")

    def _keep(self, resync_id: str) -> None:
        if self.tickets is None:
            self.open()
        assert self.tickets is not None
        self.tickets.keep(Ticket("secret", resync_id, "vm1", "b", "", "t", 600))

    def seen(self) -> Any:
        if self.tickets is None:
            self.open()
        assert self.tickets is not None
        return {ticket.resync_id for ticket in self.tickets.live()}

    def close(self) -> None:
        self.tickets = None


class ServedNoMore(Serving):
    """A resync's tickets are ended."""

    old, new = {"r1", "r2"}, {"r1"}

    def begin(self) -> None:
        super().begin()
        self._keep("r2")

    def change(self) -> None:
        self._keep("r1")
        assert self.tickets is not None
        self.tickets.drop("r2")


KINDS = (
    Value,
    FirstValue,
    NoValue,
    Log,
    ShorterLog,
    Map,
    Records,
    NewJournal,
    Term,
    Store,
    Place,
    Serving,
    ServedNoMore,
)
