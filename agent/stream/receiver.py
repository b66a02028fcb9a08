"""The target's side of the block stream: fetches what a stage lacks, from whoever has it.

The rules:

* The journal says what is done; everything else of the map is fetched. Zero ranges are made here and ask nobody.
* A chunk is written only after its digest has been checked, and journaled only after a sync (`flusher.py`).
* All sources at once (`lane.py`), the faster giving more. `lanes.py` says which is left and when the run ends without
  one. What was received by then is journaled, so that the next run goes on there.
* An error of the stage's own disk ends the run as it is; after a failed sync nothing more is journaled.

In memory: for each of at most four lanes a buffer of 4 MiB and a window of requests; one mark's records, one byte for
each chunk.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent.backends.base import Stage
from agent.delta import DeltaMap
from agent.stream.counters import Counters, Meter
from agent.stream.flusher import Flusher
from agent.stream.frame import NO_DIGEST, Hello
from agent.stream.journal import Journal
from agent.stream.lane import Desk
from agent.stream.lanes import Lanes
from agent.stream.link import SourceAddress
from agent.stream.readback import check_map, verify
from agent.stream.rounds import IDLE_TIMEOUT_S, SILENCE_TIMEOUT_S
from agent.stream.sources import SourceProblem, Sources
from agent.stream.throttle import Throttle
from agent.stream.work import Stopped, Work
from resilver.errors import ResilverError

__all__ = ["Counters", "Received", "SourceAddress", "SourceProblem", "Stopped", "receive", "verify"]


@dataclass(frozen=True, slots=True)
class Received:
    """A transfer that has everything; `problems` are those of the sources on the way, the last one of each."""

    counters: Counters
    problems: tuple[SourceProblem, ...]


def receive(
    stage: Stage,
    delta: DeltaMap,
    journal: Journal,
    sources: Sequence[SourceAddress],
    hello: Hello,
    *,
    on_progress: Callable[[Counters], None],
    stop: threading.Event,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    silence_timeout_s: float = SILENCE_TIMEOUT_S,
    throttle: Throttle | None = None,
) -> Received:
    """Brings the stage to the target; returns when all of it is on the disk and journaled.

    Stopped if `stop` is set. With no source left: the one reason that all of them gave, SOURCE_DAMAGED if damage was
    among several, NO_SOURCE otherwise. Errors of the stage pass through. `on_progress` is called from this thread.
    """
    check_map(delta, journal)
    work, flusher = Work(journal.table, journal.done), Flusher(stage, journal)
    meter = Meter(
        [source.node for source in sources],
        done_bytes=journal.done_bytes,
        total_bytes=delta.data_bytes,
        clock=time.monotonic,
    )
    desk = Desk(
        stage,
        work,
        flusher,
        meter,
        Sources(sources),
        throttle or Throttle(),
        hello,
        capacity_bytes=delta.capacity_bytes,
        silence_timeout_s=silence_timeout_s,
    )
    try:
        _make_zeros(desk, stop)
        lanes = Lanes(
            desk,
            sources,
            left_bytes=delta.data_bytes - journal.done_bytes,
            on_progress=on_progress,
            stop=stop,
            idle_timeout_s=idle_timeout_s,
        )
        lanes.run()
        flusher.finish()
    except ResilverError:
        # What has been received is true, whatever ended the run. A sync that failed is not tried again.
        with contextlib.suppress(ResilverError):
            flusher.finish()
        raise
    finally:
        flusher.close()
        on_progress(meter.read())
    return Received(meter.read(), desk.sources.problems)


def _make_zeros(desk: Desk, stop: threading.Event) -> None:
    for chunk in desk.work.zero_chunks():
        if stop.is_set():
            raise Stopped
        desk.stage.zero(chunk.offset, chunk.length)
        desk.flusher.add(chunk.number, NO_DIGEST, 0)
