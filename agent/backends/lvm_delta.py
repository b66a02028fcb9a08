"""Delta maps of thin volumes, from the pool's metadata: no data is read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from agent.delta import DeltaMap
from agent.disk import thin
from agent.disk.lvm import Lv
from agent.disk.thin import Chunks, Pool

Int64s = npt.NDArray[np.int64]
Step = Callable[[str], None]


def between(pool: Pool, base: Lv | None, target: Lv, step: Step) -> DeltaMap:
    """What differs; without a base, what is mapped in the target. Exact in chunks of the pool."""
    if base is None:
        return to_map(thin.mapped(pool, target.thin_id, step), 0, target.size_bytes)
    if base.uuid == target.uuid:
        return DeltaMap.of(target.size_bytes, ())
    return to_map(thin.delta(pool, base.thin_id, target.thin_id, step), base.size_bytes, target.size_bytes)


def to_map(chunks: Chunks, base_bytes: int, target_bytes: int) -> DeltaMap:
    """Chunks as bytes of the target. The base reads as zero beyond its end, whatever the pool still maps there: a
    volume that was made smaller and larger again has its old chunks back, which others do not have.
    """
    starts = chunks.begins * chunks.chunk_bytes
    ends = starts + chunks.lengths * chunks.chunk_bytes
    within, beyond = min(base_bytes, target_bytes), target_bytes
    left = _clipped(starts, ends, chunks.kinds, 0, within)
    right = _clipped(starts, ends, chunks.kinds, within, beyond)
    keep = left[2] != thin.SAME
    mapped = right[2] != thin.LEFT_ONLY
    starts = np.concatenate([left[0][keep], right[0][mapped]])
    ends = np.concatenate([left[1][keep], right[1][mapped]])
    zeros = np.concatenate([left[2][keep] == thin.LEFT_ONLY, np.zeros(int(mapped.sum()), np.bool_)])
    return _joined(target_bytes, starts, ends, zeros)


def _clipped(
    starts: Int64s, ends: Int64s, kinds: npt.NDArray[np.int8], low: int, high: int
) -> tuple[Int64s, Int64s, npt.NDArray[np.int8]]:
    starts, ends = np.maximum(starts, low), np.minimum(ends, high)
    inside = starts < ends
    return starts[inside], ends[inside], kinds[inside]


def _joined(capacity: int, starts: Int64s, ends: Int64s, zeros: npt.NDArray[np.bool_]) -> DeltaMap:
    """Neighbours of one kind are one range."""
    if len(starts):
        begins = np.ones(len(starts), np.bool_)
        begins[1:] = (starts[1:] != ends[:-1]) | (zeros[1:] != zeros[:-1])
        first = np.flatnonzero(begins)
        last = np.append(first[1:], len(starts)) - 1
        starts, ends, zeros = starts[first], ends[last], zeros[first]
    made = DeltaMap(capacity, starts, ends - starts, zeros)
    made.check()
    return made
