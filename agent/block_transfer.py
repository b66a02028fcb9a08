"""The transfer of a volume of blocks: a delta map, a journal of what is done, any source for any range.

What a stage is to become stands in the stage: the map and the journal, and the lineage beside them. A run that finds
all three asks no source for them again, and does not need the base there.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from agent.basecheck import check_lineages, compare, digest_ranges, pick_blocks
from agent.disk.durable import write_json
from agent.lineages import lineage_to_json
from agent.runfile import StagePlace
from agent.stream.frame import Hello
from agent.stream.journal import Journal
from agent.stream.mapfile import JournalKey
from agent.stream.receiver import receive, verify
from agent.transfer import LINEAGE_FILE, SOURCES_SILENT_MAX_S, lineage_left_in, stream_of
from resilver.volume import ResyncState

if TYPE_CHECKING:
    from agent.backends.base import BlockBackend, Stage
    from agent.delta import DeltaRange
    from agent.peers import Offer
    from agent.transfer import Desk
    from resilver.lineage import Lineage
    from resilver.volume import ReplicaReport


class BlockTransfer:
    """See `agent.transfer.Transfer`."""

    def __init__(self, desk: Desk, backend: BlockBackend) -> None:
        self._desk = desk
        self._backend = backend
        self._stage: Stage | None = None
        self._journal: Journal | None = None

    @property
    def stage(self) -> Stage:
        assert self._stage is not None, "prepared first"
        return self._stage

    def prepare(self, report: ReplicaReport) -> Lineage:
        desk = self._desk
        lineage = self._resumed()
        if lineage is not None:
            desk.may_replace(report, lineage)
            return lineage
        offer = desk.ask(lambda source: desk.peers.fetch(source, desk.request(), desk.stop))
        desk.may_replace(report, offer.lineage)
        desk.tell(total_bytes=offer.delta.data_bytes, range_count=len(offer.delta))
        if desk.wanted.base:
            check_lineages(desk.wanted.base, report.lineage, offer.lineage)
            self._compare_sample(report)
        desk.on_worker(lambda: self._backend.check_space(offer.delta))
        self._begin(offer)
        return offer.lineage

    def restore(self, report: ReplicaReport) -> None:
        tip = report.lineage.tip
        assert tip is not None, "checked by the run"
        self._open(tip.size_bytes)

    def move(self) -> None:
        desk, journal = self._desk, self._journal
        assert journal is not None, "prepared first"
        delta = journal.delta
        desk.on_worker(lambda: self._backend.check_space(delta, resumed_bytes=journal.done_bytes))
        desk.tell(state=ResyncState.TRANSFERRING)
        wanted, replica = desk.wanted, desk.replica
        receive(
            self.stage,
            delta,
            journal,
            [stream_of(source, desk.peers.tls) for source in wanted.sources],
            Hello(wanted.ticket, wanted.resync_id, replica.volume, wanted.target, replica.node),
            on_progress=desk.count,
            stop=desk.stop,
            idle_timeout_s=SOURCES_SILENT_MAX_S,
            throttle=desk.throttle,
        )
        desk.tell(state=ResyncState.VERIFYING)
        verify(self.stage, delta, journal, stop=desk.stop, on_share=desk.advanced)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        if self._stage is not None:
            self._stage.close()

    def _open(self, size_bytes: int) -> Stage:
        wanted = self._desk.wanted
        made = self._desk.on_worker(lambda: self._backend.open_stage(wanted.base, wanted.target, size_bytes))
        self._stage = made
        return made

    def _begin(self, offer: Offer) -> None:
        wanted, delta = self._desk.wanted, offer.delta
        self._desk.place = StagePlace(delta.capacity_bytes)
        stage = self._open(delta.capacity_bytes)
        write_json(stage.directory / LINEAGE_FILE, lineage_to_json(offer.lineage))
        self._journal = Journal.open(stage.directory, JournalKey.of(wanted.base, wanted.target, delta), delta)

    def _resumed(self) -> Lineage | None:
        """What an earlier run of this pair has left, if it is whole."""
        place = self._desk.place
        if place is None:
            return None
        stage = self._open(place.capacity_bytes)
        lineage = lineage_left_in(stage.directory, self._desk.wanted.target) if stage.resumed else None
        journal = self._journal_left() if lineage is not None else None
        if journal is None:
            stage.close()
            self._stage = None
            return None
        self._journal = journal
        self._desk.tell(total_bytes=journal.delta.data_bytes, range_count=len(journal.delta))
        self._desk.received_before(done_bytes=journal.done_bytes)
        return lineage

    def _journal_left(self) -> Journal | None:
        wanted = self._desk.wanted
        journal = Journal.load(self.stage.directory)
        if journal is not None and (journal.key.base, journal.key.target) != (wanted.base, wanted.target):
            journal.close()
            return None
        return journal

    def _compare_sample(self, report: ReplicaReport) -> None:
        desk, backend, base = self._desk, self._backend, self._desk.wanted.base
        record = report.lineage.find(base)
        size_bytes = record.size_bytes if record is not None else 0
        blocks, mine = desk.replica.reader.call(lambda: _sample(backend, base, size_bytes))
        theirs = desk.ask(lambda source: desk.peers.digests(source, desk.request(), base, blocks, desk.stop))
        compare(base, blocks, mine, theirs)


def _sample(backend: BlockBackend, base: str, size_bytes: int) -> tuple[list[DeltaRange], list[bytes]]:
    blocks = pick_blocks(size_bytes, backend.delta_map("", base), random.Random())  # noqa: S311 - no secret
    return blocks, digest_ranges(backend, base, blocks)
