"""What an offline look at replicas prints and a comparison reads: JSON that carries all that an election needs.

The classes of `resilver/volume.py` field by field, a CP as `"3-42"`; fields that a newer version added are passed over.
A replica that could not be read is there too, without a report: it may have anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from resilver.lineage import ConsistencyPoint
from resilver.volume import ReplicaReport

FORMAT: Final = 1
BYTES_MAX: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Inspection:
    """One replica as it was found; without a `report`, `reason` and `message` say why."""

    node: str
    volume: str
    time_ms: int
    report: ReplicaReport | None = None
    reason: str = ""
    message: str = ""


def dump(inspections: Iterable[Inspection]) -> str:
    """The JSON document, indented."""
    plain = _each_cp([msgspec.to_builtins(one) for one in inspections], _cp_to_text)
    return json.dumps({"format": FORMAT, "replicas": plain}, indent=2, ensure_ascii=False) + "\n"


def load(document: bytes) -> tuple[Inspection, ...]:
    """Reads what `dump` wrote. Raises ValueError with a sentence for anything else."""
    if len(document) > BYTES_MAX:
        raise ValueError(f"it is larger than {BYTES_MAX >> 20} MiB")
    try:
        return _loaded(msgspec.json.decode(document))
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def _loaded(value: Any) -> tuple[Inspection, ...]:
    if not isinstance(value, dict) or "replicas" not in value:
        raise ValueError("it is not what `resilver inspect -o json` prints")
    if value.get("format") != FORMAT:
        raise ValueError(f"it is of format {value.get('format')}, and this version reads format {FORMAT}")
    return msgspec.convert(_each_cp(value["replicas"], _cp_from_text), tuple[Inspection, ...])


def _each_cp(node: Any, turn: Callable[[Any], Any]) -> Any:
    if isinstance(node, dict):
        return {
            name: turn(value) if name in ("cp", "newest_cp") else _each_cp(value, turn) for name, value in node.items()
        }
    return [_each_cp(value, turn) for value in node] if isinstance(node, list | tuple) else node


def _cp_to_text(value: Any) -> Any:
    return str(ConsistencyPoint(value["epoch"], value["sequence"]))


def _cp_from_text(value: Any) -> Any:
    cp = ConsistencyPoint.parse(str(value))
    return {"epoch": cp.epoch, "sequence": cp.sequence}
