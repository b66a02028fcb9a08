"""What is free in a thin pool. A full one holds up every volume in it; full metadata may cost the pool.

Nothing is begun that would take the pool's data into the reserve, or leave less than a tenth of its metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from agent.delta import DeltaMap
from agent.disk.thin import Pool, PoolStatus
from resilver.errors import Refused

METADATA_RESERVE: Final = 0.1
METADATA_WARN: Final = 0.8
_MARGIN_MIN_BYTES: Final = 16 << 20
_METADATA_MARGIN_BLOCKS: Final = 32
_MAPPINGS_IN_BLOCK: Final = 60  # of 252 at most; half full, and again for what is shared no longer
_TIMEOUT: Final = Path("/sys/module/dm_thin_pool/parameters/no_space_timeout")


def needed(delta: DeltaMap, chunk_bytes: int, resumed_bytes: int) -> tuple[int, int]:
    """Bytes and blocks of metadata that receiving a delta takes: every chunk that it touches, and a margin."""
    first, last = delta.offsets // chunk_bytes, -(-(delta.offsets + delta.lengths) // chunk_bytes)
    # Of a zero range only the chunks at its ends are written.
    touched = np.where(delta.zeros, np.minimum(last - first, 2), last - first)
    chunks = max(0, int(touched.sum()) - resumed_bytes // chunk_bytes)
    spread = min(chunks, len(delta))
    return (
        chunks * chunk_bytes + max(chunks * chunk_bytes // 100, _MARGIN_MIN_BYTES),
        chunks // _MAPPINGS_IN_BLOCK + spread + _METADATA_MARGIN_BLOCKS,
    )


def free_of(pool: Pool, status: PoolStatus, ratio: float, least: int) -> tuple[int, int]:
    """Free bytes of data, and those that are never used up."""
    total = status.data_total * pool.lv.chunk_bytes
    return (status.data_total - status.data_used) * pool.lv.chunk_bytes, max(least, int(total * ratio))


def check(pool: Pool, reserve: tuple[float, int], need: int, need_metadata: int, what: str) -> None:
    """NO_SPACE if that would pass the reserve, or if the pool takes no writes at all."""
    if not pool.lv.zeroes:
        raise Refused("NOT_SUPPORTED", _no_zeroes(pool), next_command=f"lvchange -Z y {pool.lv.full_name}")
    status = pool.status()
    if status.mode != "rw" or status.needs_check:
        how = "needs_check" if status.needs_check else status.mode
        raise Refused("NO_SPACE", f"thin pool {pool.lv.full_name} is {how}: it takes no writes until it is not")
    free, kept = free_of(pool, status, *reserve)
    if free - need < kept:
        raise Refused(
            "NO_SPACE",
            f"{what} needs {need:,} bytes above the reserve of {kept:,}, and {free:,} are free in thin pool "
            f"{pool.lv.full_name}; free {need + kept - free:,} more there, or extend it",
            need_bytes=str(need),
            free_bytes=str(free),
            reserve_bytes=str(kept),
        )
    left = status.metadata_total - status.metadata_used - need_metadata
    if left < status.metadata_total * METADATA_RESERVE:
        raise Refused(
            "NO_SPACE",
            f"{what} may take {need_metadata} blocks of the metadata of thin pool {pool.lv.full_name}, of which "
            f"{status.metadata_used} of {status.metadata_total} are used, and a tenth must stay free",
            next_command=f"lvextend --poolmetadatasize +SIZE {pool.lv.full_name}",
        )


def problems(pool: Pool, status: PoolStatus) -> tuple[str, ...]:
    """What an operator should know of the pool."""
    name = pool.lv.full_name
    found = [] if pool.lv.zeroes else [_no_zeroes(pool)]
    if status.mode != "rw" or status.needs_check:
        found.append(f"thin pool {name} is {'needs_check' if status.needs_check else status.mode}: it takes no writes")
    if status.metadata_used > status.metadata_total * METADATA_WARN:
        share = status.metadata_used * 100 // status.metadata_total
        found.append(f"the metadata of thin pool {name} is {share} % full: lvextend --poolmetadatasize +SIZE {name}")
    if status.queues_when_full:
        found.append(
            f"thin pool {name}, if it becomes full, holds writes up {_holds_up()} instead of refusing them: "
            f"lvchange --errorwhenfull y {name}"
        )
    return tuple(found)


def _no_zeroes(pool: Pool) -> str:
    name = pool.lv.full_name
    return (
        f"thin pool {name} does not clear new blocks, so what was never written reads as anything: lvchange -Z y {name}"
    )


def _holds_up() -> str:
    try:
        seconds = int(_TIMEOUT.read_text())
    except (OSError, ValueError):
        return "for a time"
    return f"for {seconds} s" if seconds else "for ever"
