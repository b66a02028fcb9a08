"""Who this agent is and whom it obeys: what stands in state_dir.

* One agent for each state_dir, held by a lock on `lock`; `boot` is a new UUID at every start.
* The agent is pinned to the first store whose leader it met. Another store's orders are `WRONG_STORE` until
  `adopt_store` names it; another cluster's are `CLUSTER_MISMATCH`.
* The highest (term, leader_id) is on the disk before an order of it is obeyed. A lower term, or the same one of another
  leader, is `STALE_TERM`: a deposed coordinator is never obeyed, also not after a restart.
* For each volume the file system and the tip that its data had are remembered, so that an absent disk is LOST and never
  taken for an empty one.

Methods block on the disk and may be called from several threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from agent.backends.image_kept import Kept, stamp_of
from agent.disk.durable import disk_error, disk_errors, make_own_dir, open_own, read_json, write_json
from agent.stored import typed
from resilver.errors import Damaged, Forbidden, Invalid, Refused, Superseded
from resilver.telemetry import marked

if TYPE_CHECKING:
    from pathlib import Path

    from agent.disk.durable import Json
    from resilver.volume import Order

_BELONGS: Final = "give this agent a state_dir of its own"


@dataclass(frozen=True, slots=True)
class Pin:
    """Whom this agent obeys: empty and 0 before it met the first leader."""

    cluster: str
    store_id: str = ""
    term: int = 0
    leader_id: str = ""


@dataclass(frozen=True, slots=True)
class Remembered:
    """Where a volume's data was seen last. `tip` is empty for data that was never mirrored."""

    file_system_id: str
    tip: str
    volume_id: str = ""


@dataclass(frozen=True, slots=True)
class _Owner:
    node: str


class Identity:
    """The open state_dir. Raises `Invalid("CONFIG_INVALID")` if it is in use or belongs to another cluster."""

    def __init__(self, state_dir: Path, cluster: str, node: str) -> None:
        self.boot: Final = str(uuid.uuid4())
        self.state_dir: Final = state_dir
        self._mutex = threading.Lock()
        self._kept: Final = Kept()
        _make(state_dir)
        self._lock_fd = _locked(state_dir)
        try:
            self._pin = self._load(cluster, node)
            marked(term=self._pin.term or None)
        except BaseException:
            self.close()
            raise

    @property
    def pin(self) -> Pin:
        return self._pin

    def close(self) -> None:
        """Lets another agent have the state_dir; closing twice is no error."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def admit(self, order: Order) -> None:
        """Returns if the giver of the order may be obeyed; its term is then on the disk."""
        if order.cluster != self._pin.cluster:
            raise Forbidden(
                "CLUSTER_MISMATCH",
                f"this agent belongs to cluster {self._pin.cluster}, and the order comes from cluster {order.cluster}",
                cluster=self._pin.cluster,
            )
        self.meet(order.store_id, order.term, order.leader_id)

    def meet(self, store_id: str, term: int, leader_id: str) -> None:
        """As `admit`, for a leader of this cluster; the first one pins its store."""
        with self._mutex:
            pin = self._pin
            if pin.store_id and store_id != pin.store_id:
                raise Refused(
                    "WRONG_STORE",
                    f"this agent belongs to store {pin.store_id}, and the coordinator speaks for another one; "
                    "if the store was replaced on purpose, adopt the new one",
                    next_command=f"resilver store adopt {store_id}",
                    store_id=pin.store_id,
                )
            if term < pin.term:
                raise Superseded(
                    "STALE_TERM", f"term {term} is over: this agent has obeyed term {pin.term}", term=str(pin.term)
                )
            if term == pin.term and leader_id != pin.leader_id:
                raise Superseded(
                    "STALE_TERM",
                    f"term {term} belongs to leader {pin.leader_id}, not to {leader_id}",
                    term=str(pin.term),
                )
            if (store_id, term, leader_id) != (pin.store_id, pin.term, pin.leader_id):
                self._save(replace(pin, store_id=store_id, term=term, leader_id=leader_id))

    def adopt_store(self, store_id: str) -> None:
        """Takes on another store by an operator's act; its terms count anew. Nothing happens if it is ours already."""
        with self._mutex:
            if store_id != self._pin.store_id:
                self._save(replace(self._pin, store_id=store_id, term=0, leader_id=""))

    def remembered(self, volume: str) -> Remembered | None:
        """Where the volume's data was; None if none was ever seen here. Read again whenever it is another file."""
        path = self._volume_file(volume)
        with disk_errors(path):
            stamp = stamp_of(str(path))
        return self._kept.read(volume, stamp, lambda _: self._read_remembered(volume, path))

    def _read_remembered(self, volume: str, path: Path) -> Remembered | None:
        value = read_json(path)
        if value is None:
            return None
        if value.get("volume", volume) != volume:
            said = f"{path} is damaged: it is of volume {value['volume']}, and does not belong to {volume}"
            raise Damaged("IO_ERROR", said, path=str(path))
        return typed(path, value, Remembered)

    def remember(self, volume: str, remembered: Remembered) -> None:
        """Written before anything is reported of the data; the same again costs nothing."""
        if self.remembered(volume) == remembered:
            return
        write_json(
            self._volume_file(volume),
            {
                "volume": volume,
                "file_system_id": remembered.file_system_id,
                "tip": remembered.tip,
                "volume_id": remembered.volume_id,
            },
        )

    def _volume_file(self, volume: str) -> Path:
        return self.state_dir / "volumes" / f"{volume}.json"

    def _save(self, pin: Pin) -> None:
        write_json(
            self.state_dir / "identity.json",
            {
                "cluster": pin.cluster,
                "node": self._node,
                "store_id": pin.store_id,
                "term": pin.term,
                "leader_id": pin.leader_id,
            },
        )
        self._pin = pin
        marked(term=pin.term or None)

    def _load(self, cluster: str, node: str) -> Pin:
        self._node = node
        path = self.state_dir / "identity.json"
        value: Json | None = read_json(path)
        if value is None:
            self._save(Pin(cluster))
            return self._pin
        pin, owner = typed(path, value, Pin), typed(path, value, _Owner)
        if pin.term and not (pin.store_id and pin.leader_id):
            raise Damaged("IO_ERROR", f"{path} is damaged: it names a term, and not whose it is", path=str(path))
        for word, theirs, mine in (("cluster", pin.cluster, cluster), ("node", owner.node, node)):
            if theirs != mine:
                raise Invalid(
                    "CONFIG_INVALID",
                    f"state_dir {self.state_dir} belongs to {word} {theirs}, and the configuration says {mine}; "
                    f"{_BELONGS}",
                    field="state_dir",
                )
        return pin


def _make(state_dir: Path) -> None:
    try:
        make_own_dir(state_dir / "volumes")
    except (NotADirectoryError, PermissionError) as error:
        said = f"state_dir {state_dir}: {error.strerror}; name a directory that this user can write to, or a new one"
        raise Invalid("CONFIG_INVALID", said, field="state_dir") from error
    except OSError as error:
        raise disk_error(error, state_dir) from error


def _locked(state_dir: Path) -> int:
    """A descriptor that holds the lock of a state_dir until it is closed, also by a kill."""
    with disk_errors(state_dir):
        fd = open_own(state_dir / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        by = f" by the agent with pid {holder}" if holder else " by another agent"
        raise Invalid(
            "CONFIG_INVALID", f"state_dir {state_dir} is in use{by}; {_BELONGS}", field="state_dir"
        ) from error
    with contextlib.suppress(OSError):  # the lock holds; the number is for whoever reads it
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
