"""What an agent was told of a replica, and keeps beside it: the volume's record, and the grant if it has one."""

from __future__ import annotations

from typing import TypeVar

from agent.backends.image_kept import stamp_of
from agent.backends.image_layout import GRANT_FILE, RECORD_FILE, Layout
from agent.disk.durable import disk_errors, read_json, remove_file, write_json
from agent.stored import typed
from resilver.errors import Damaged
from resilver.volume import Grant, VolumeRecord

T = TypeVar("T")


def save_record(layout: Layout, record: VolumeRecord) -> None:
    value = {name: getattr(record, name) for name in VolumeRecord.__slots__}
    write_json(layout.root / RECORD_FILE, {**value, "newest_cp": str(record.newest_cp)})


def load_record(layout: Layout, volume_id: str = "") -> VolumeRecord | None:
    """The record of the volume, `volume_id` being that of the data. Of another volume together with its data it is a
    whole replica of that, which counts as foreign; beside other data it is damaged.
    """
    path = layout.root / RECORD_FILE
    record = _kept(layout, RECORD_FILE, VolumeRecord)
    if record is not None and record.volume != layout.volume and record.volume_id != volume_id:
        said = f"{path} is damaged: it is of volume {record.volume}, and does not belong to {layout.volume}"
        raise Damaged("IO_ERROR", said, path=str(path))
    return record


def save_grant(layout: Layout, grant: Grant | None) -> None:
    """Keeps it; without one, the one that was kept is removed."""
    path = layout.root / GRANT_FILE
    if grant is None:
        remove_file(path)
    else:
        write_json(path, {name: getattr(grant, name) for name in Grant.__slots__})


def load_grant(layout: Layout) -> Grant | None:
    return _kept(layout, GRANT_FILE, Grant)


def _kept(layout: Layout, name: str, kind: type[T]) -> T | None:
    """The value in a file, read again whenever it is another file; None if it is not there."""
    path = layout.root / name

    def read(_: str) -> T | None:
        value = read_json(path)
        return None if value is None else typed(path, value, kind)

    with disk_errors(path):
        stamp = stamp_of(str(path))
    return layout.kept.read(name, stamp, read)
