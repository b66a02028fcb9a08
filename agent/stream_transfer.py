"""The transfer of a volume whose file system writes its own deltas: one stream, from its first byte to its last.

The base is checked by what the file system itself calls it, which travels with the data. Between the end of the stream
and the commit the stage may wait for days (the live copy is in use): such a run needs no source.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.backends.base import StreamOrigin
from agent.basecheck import check_lineages
from agent.disk.durable import write_json
from agent.lineages import lineage_to_json
from agent.runfile import StagePlace
from agent.stream.frame import Hello
from agent.stream.spool import Spool
from agent.stream.stream_receiver import receive_stream
from agent.transfer import LINEAGE_FILE, SOURCES_SILENT_MAX_S, lineage_left_in, stream_of
from resilver.errors import Damaged, Refused
from resilver.volume import ResyncState

if TYPE_CHECKING:
    from agent.backends.base import StreamBackend, StreamStage
    from agent.peers import Offer
    from agent.stream.counters import Counters
    from agent.transfer import Desk
    from resilver.lineage import Lineage
    from resilver.volume import ReplicaReport


class StreamTransfer:
    """See `agent.transfer.Transfer`."""

    def __init__(self, desk: Desk, backend: StreamBackend) -> None:
        self._desk = desk
        self._backend = backend
        self._stage: StreamStage | None = None
        self._origin: StreamOrigin | None = None
        self._spool_bytes_max = 0

    @property
    def stage(self) -> StreamStage:
        assert self._stage is not None, "prepared first"
        return self._stage

    def prepare(self, report: ReplicaReport) -> Lineage:
        desk, backend, wanted = self._desk, self._backend, self._desk.wanted
        lineage = self._resumed()
        if lineage is None:
            offer = desk.ask(lambda source: desk.peers.fetch(source, desk.request(), desk.stop))
            lineage, self._origin = offer.lineage, _origin_of(offer)
            if wanted.base:
                check_lineages(wanted.base, report.lineage, lineage)
        origin = self._origin
        assert origin is not None, "known by now"
        desk.may_replace(report, lineage)
        desk.tell(total_bytes=origin.stream_bytes, range_count=0)
        if self._stage is None or not self._stage.complete:
            if wanted.base:
                desk.on_worker(lambda: backend.check_base(wanted.base, origin.native_base))
            need = desk.on_worker(lambda: backend.check_stream_space(origin.stream_bytes))
            self._spool_bytes_max = min(desk.spool_max_bytes, max(report.free_bytes - report.reserve_bytes - need, 0))
        if self._stage is None:
            desk.place = StagePlace(origin=origin)
            stage = self._open(origin)
            write_json(stage.directory / LINEAGE_FILE, lineage_to_json(lineage))
        return lineage

    def restore(self, report: ReplicaReport) -> None:
        del report
        native = self._desk.on_worker(lambda: self._backend.native_id(self._desk.wanted.target))
        self._open(StreamOrigin(native, native, ()))

    def move(self) -> None:
        desk, origin = self._desk, self._origin
        assert origin is not None, "prepared first"
        wanted, replica = desk.wanted, desk.replica
        if not self.stage.complete:
            desk.tell(state=ResyncState.TRANSFERRING)
            receive_stream(
                self.stage,
                Spool(self.stage.directory, self._spool_bytes_max),
                origin,
                [stream_of(source, desk.peers.tls) for source in wanted.sources],
                Hello(wanted.ticket, wanted.resync_id, replica.volume, wanted.target, replica.node),
                formats=self._backend.formats(),
                on_progress=self._count,
                stop=desk.stop,
                idle_timeout_s=SOURCES_SILENT_MAX_S,
                throttle=desk.throttle,
            )
            desk.tell(total_bytes=desk.progress.done_bytes)
        desk.tell(state=ResyncState.VERIFYING)
        self.stage.verify(desk.stop, on_share=desk.advanced)

    def close(self) -> None:
        if self._stage is not None:
            self._stage.close()

    def _count(self, counters: Counters) -> None:
        """How long a stream will be is an estimate: one that proves too short grows with what comes."""
        total = self._desk.progress.total_bytes
        if total is not None and counters.done_bytes > total:
            self._desk.tell(total_bytes=counters.done_bytes)
        self._desk.count(counters)

    def _open(self, origin: StreamOrigin) -> StreamStage:
        wanted = self._desk.wanted
        made = self._desk.on_worker(lambda: self._backend.open_stream_stage(wanted.base, wanted.target, origin))
        self._stage = made
        return made

    def _resumed(self) -> Lineage | None:
        """What an earlier run of this pair has left, if it is whole."""
        place = self._desk.place
        if place is None or place.origin is None:
            return None
        stage = self._open(place.origin)
        lineage = lineage_left_in(stage.directory, self._desk.wanted.target) if stage.resumed else None
        if lineage is None:
            stage.close()
            self._stage = None
            return None
        self._origin = place.origin
        return lineage


def _origin_of(offer: Offer) -> StreamOrigin:
    if offer.origin is None:
        raise Refused("BACKEND_MISMATCH", "the source tells ranges, and this node's file system wants a stream")
    if not offer.origin.native_target:
        raise Damaged("SOURCE_DAMAGED", "the source does not say what its file system calls the target")
    return offer.origin
