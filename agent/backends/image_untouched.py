"""Whether a snapshot's data still is what its record was written beside."""

from __future__ import annotations

from pathlib import Path

from agent.backends.image_layout import load_stored
from resilver.errors import Damaged


def check_untouched(directory: Path) -> None:
    """Raises Damaged if a snapshot's data is not what its record was written beside: cut short, or written to since.

    The time of its last write is compared with the one in the record, whatever the clock said before and after; whole
    seconds are enough, because copying programs may keep no more. Records of older versions have none: theirs must not
    be older than the data. Whoever copies the directory by hand and does not keep its times may be told so too; a full
    copy sets that right.
    """
    data, record = directory / "data", directory / "record.json"
    try:
        found, recorded_ns = data.stat(), record.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return  # whoever opens it says what is gone
    stored = load_stored(directory)
    size_bytes, written_ns = stored.snapshot.size_bytes, stored.data_mtime_ns
    if written_ns:
        untouched = found.st_mtime_ns in {written_ns, written_ns - written_ns % 1_000_000_000}
    else:
        untouched = found.st_mtime_ns <= recorded_ns
    if found.st_size == size_bytes and untouched:
        return
    what = "was written to after it was taken" if found.st_size == size_bytes else f"is not {size_bytes} bytes long"
    raise Damaged("BASE_MISMATCH", f"{data} {what}: it is not that snapshot any more", path=str(data))
