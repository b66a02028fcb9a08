"""Reports and lineages in pages, and back; what is in a page is `wire.py`'s.

* A replica's lineage travels in pages of at most 500 records and half a MiB, tip first. The first page holds the
  report, the others its volume's name alone. Beyond 20,000 records the oldest are left out: a lineage may end anywhere.
* Several replicas may travel in one message, each whole in one page: a message costs more than what is in it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from resilver.fields import check_count, check_number, invalid
from resilver.lineage import Lineage, Snapshot
from resilver.v1 import agent_pb2, volume_pb2
from resilver.volume import ReplicaReport
from resilver.wire import report_from_proto, report_to_proto, snapshot_from_proto, snapshot_to_proto, time_from_proto

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

PAGE_RECORDS_MAX: Final = 500
PAGE_BYTES_MAX: Final = 512 << 10
PAGES_TOGETHER_MAX: Final = 100
REPORTS_KNOWN_MAX: Final = 10_000
LINEAGE_RECORDS_MAX: Final = 20_000


def lineage_of(records: Sequence[Snapshot], field: str = "records") -> Lineage:
    """The lineage that records from the wire form, tip first."""
    check_count(records, field, LINEAGE_RECORDS_MAX)
    try:
        return Lineage(tuple(records))
    except ValueError as error:
        raise invalid(field, f"form no lineage: {error}") from error


def record_pages(lineage: Lineage) -> list[list[volume_pb2.SnapshotRecord]]:
    """The records in pages of at most 500 and half a MiB, tip first; none for an empty lineage."""
    pages: list[list[volume_pb2.SnapshotRecord]] = []
    page_bytes = 0
    for snapshot in lineage.records[:LINEAGE_RECORDS_MAX]:
        record = snapshot_to_proto(snapshot)
        record_bytes = record.ByteSize() + 8
        if not pages or len(pages[-1]) == PAGE_RECORDS_MAX or page_bytes + record_bytes > PAGE_BYTES_MAX:
            pages.append([])
            page_bytes = 0
        pages[-1].append(record)
        page_bytes += record_bytes
    return pages


def report_pages(report: ReplicaReport, *, node: str = "") -> list[agent_pb2.ReplicaPage]:
    """The report in messages of less than 1 MiB each, to be sent in order."""
    pages = [agent_pb2.ReplicaPage(records=records) for records in record_pages(report.lineage)]
    pages = pages or [agent_pb2.ReplicaPage()]
    pages[0].replica.CopyFrom(report_to_proto(report, node=node))
    for page in pages[1:]:
        page.replica.volume = report.volume
    pages[-1].last = True
    return pages


def bodies_of(
    reports: Iterable[ReplicaReport], *, node: str = "", together_max: int = PAGES_TOGETHER_MAX
) -> Iterator[Mapping[str, agent_pb2.ReplicaPage | agent_pb2.ReplicaPages]]:
    """What messages tell the reports, each of another volume, in order: those of one page share one while they fit."""
    held: list[agent_pb2.ReplicaPage] = []
    held_bytes = 0
    for report in reports:
        pages = report_pages(report, node=node)
        size = pages[0].ByteSize() + 8
        if held and (len(pages) > 1 or len(held) >= together_max or held_bytes + size > PAGE_BYTES_MAX):
            yield _body(held)
            held, held_bytes = [], 0
        if len(pages) > 1:
            yield from ({"replica": page} for page in pages)
        else:
            held += pages
            held_bytes += size
    if held:
        yield _body(held)


def _body(pages: list[agent_pb2.ReplicaPage]) -> Mapping[str, agent_pb2.ReplicaPage | agent_pb2.ReplicaPages]:
    return {"replica": pages[0]} if len(pages) == 1 else {"pages": agent_pb2.ReplicaPages(pages=pages)}


class ReportAssembler:
    """Puts the pages of one sender together again. One report at a time; a first page begins anew.

    A report that came in one page is remembered by its digest. Most say again what was said before, with another time
    and another amount of free space: of those only these two are read.
    """

    def __init__(self) -> None:
        self._report: ReplicaReport | None = None
        self._records: list[Snapshot] = []
        self._known: dict[str, tuple[bytes, ReplicaReport]] = {}

    def add(self, page: agent_pb2.ReplicaPage) -> ReplicaReport | None:
        """The whole report with its last page, None before; after an error only a first page is taken."""
        report, records = self._report, self._records
        self._report, self._records = None, []
        if is_whole(page):
            return self._whole(page)
        if page.replica.presence != volume_pb2.PRESENCE_UNSPECIFIED:
            report, records = report_from_proto(page.replica), []
        elif report is None:
            raise invalid("replica.presence", "is missing in the first page of a report")
        elif page.replica.volume != report.volume:
            raise invalid("replica.volume", f"is {page.replica.volume[:80]!r} in a report of {report.volume}")
        check_count(page.records, "records", PAGE_RECORDS_MAX)
        first = len(records)
        records += [snapshot_from_proto(record, f"records[{first + at}]") for at, record in enumerate(page.records)]
        check_count(records, "records", LINEAGE_RECORDS_MAX)
        if page.last:
            return replace(report, lineage=lineage_of(records))
        if not page.records:
            raise invalid("records", "are missing in a page that is not the last")
        self._report, self._records = report, records
        return None

    def _whole(self, page: agent_pb2.ReplicaPage) -> ReplicaReport:
        """A report of one page."""
        replica = page.replica
        free_bytes = check_number(replica.free_bytes, "replica.free_bytes")
        examine_time_ms = time_from_proto(replica.examine_time, "replica.examine_time")
        digest = _digest_of_the_rest(page)
        known = self._known.pop(replica.volume, None)
        if known is None or known[0] != digest:
            check_count(page.records, "records", PAGE_RECORDS_MAX)
            records = [snapshot_from_proto(record, f"records[{at}]") for at, record in enumerate(page.records)]
            known = digest, report_from_proto(replica, lineage_of(records))
        while len(self._known) >= REPORTS_KNOWN_MAX:
            del self._known[next(iter(self._known))]
        self._known[replica.volume] = known
        return replace(known[1], free_bytes=free_bytes, examine_time_ms=examine_time_ms)


def is_whole(page: agent_pb2.ReplicaPage) -> bool:
    """Whether a report has no other page."""
    return page.last and page.replica.presence != volume_pb2.PRESENCE_UNSPECIFIED


def _digest_of_the_rest(page: agent_pb2.ReplicaPage) -> bytes:
    """Of everything in a page but what each report has anew, which is taken out and put back."""
    replica = page.replica
    free_bytes, time = replica.free_bytes, replica.examine_time
    seconds, nanos = time.seconds, time.nanos
    replica.free_bytes = time.seconds = time.nanos = 0
    digest = hashlib.sha256(page.SerializeToString(deterministic=True)).digest()
    replica.free_bytes, time.seconds, time.nanos = free_bytes, seconds, nanos
    return digest
