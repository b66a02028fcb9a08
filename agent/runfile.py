"""A run as it stands in state_dir: its order, how far it was, and when that was."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import msgspec

from agent.backends.base import StreamOrigin
from agent.peers import Source
from agent.stored import checked
from resilver.errors import Invalid
from resilver.volume import Order, Progress

if TYPE_CHECKING:
    from agent.disk.durable import Json


@dataclass(frozen=True, slots=True)
class RunOrder:
    """What a Receive orders. `replaces_lost`: the data to be replaced was LOST already when it came, so that a disk
    which is only not mounted at the moment is not taken for it.
    """

    order: Order
    resync_id: str
    base: str
    target: str
    ticket: str
    sources: tuple[Source, ...]
    replace_own_data: bool = False
    replace_unrelated: bool = False
    priority: int = 0
    replaces_lost: bool = False


@dataclass(frozen=True, slots=True)
class StagePlace:
    """By what, beside base and target, a stage is opened again: the size of a volume of blocks, or a stream's ends."""

    capacity_bytes: int = 0
    origin: StreamOrigin | None = None


@dataclass(frozen=True, slots=True)
class SavedRun:
    """`place` is known once a stage has been made, None before."""

    wanted: RunOrder
    progress: Progress
    place: StagePlace | None
    time_ms: int


def run_to_json(saved: SavedRun) -> Json:
    value = asdict(saved)
    value["progress"]["state"] = saved.progress.state.value
    return value


def run_from_json(value: Json) -> SavedRun | None:
    """The run; None for anything that is not one, such as the file of another version."""
    try:
        return msgspec.convert(checked(value), SavedRun)
    except (TypeError, ValueError, Invalid):
        return None
