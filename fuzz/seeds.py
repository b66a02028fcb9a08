"""Makes what the corpora begin with, out of our own encoders: `python -m fuzz.seeds`. Names are `seed-*`.

Beside them stand `real-*`, which were recorded from real tools and kernels, and `found-*`: inputs that broke something
once. This program touches neither.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import zstandard

from agent.delta import DeltaMap, DeltaRange
from agent.disk.durable import sealed, sealed_line
from agent.lineages import lineage_to_json, record_to_json
from agent.peers import Source
from agent.runfile import RunOrder, SavedRun, StagePlace, run_to_json
from agent.stream import frame as frames
from agent.stream.frame import Hello, Kind, StreamEnd, StreamWish, Welcome
from agent.stream.journal import JOURNAL_FILE, MAP_FILE, Journal
from agent.stream.mapfile import JournalKey, save_map
from coordinator import records
from coordinator.core.audited import AuditEntry
from coordinator.core.cluster import ClusterEvent, NodeView, VolumeEntry
from coordinator.core.events import Volume
from fuzz.target import CORPORA, fresh
from fuzz.targets_wire import REQUESTS, VALUES
from resilver import wire, wire_pages
from resilver.errors import error_for
from resilver.inspection import Inspection, dump
from resilver.lineage import ConsistencyPoint, Lineage, Origin, Snapshot
from resilver.v1 import agent_pb2, coordinator_pb2, volume_pb2
from resilver.volume import (
    Grant,
    LiveCopy,
    LiveState,
    Order,
    Presence,
    PreservedCopy,
    Progress,
    ReplicaReport,
    ResyncState,
    SourceShare,
    VolumeRecord,
)

_MS: Final = 1_795_400_000_000
_OLD: Final = Snapshot("s0", ConsistencyPoint(3, 41), "", epoch_id="e3", create_time_ms=_MS, size_bytes=4 << 20)
_NEW: Final = Snapshot("s1", ConsistencyPoint(3, 42), "s0", epoch_id="e3", create_time_ms=_MS + 60_000, note="hourly")
_LINEAGE: Final = Lineage((_NEW, _OLD))
_VOLUME: Final = VolumeRecord("vm1", "v1", 3, "e3", "a", ("a", "b", "c"), ConsistencyPoint(3, 42), "s1")
_ORDER: Final = Order("prod", "store1", 7, "leader1", "vm1", "v1", 3, "e3", "s0")
_PRESERVED: Final = PreservedCopy(
    "p1", "/data/.resilver/vm1/preserved/p1/data", "s0", _OLD.cp, True, _MS, 4 << 20, 4096
)
_PROGRESS: Final = Progress(
    "r1", "vm1", ResyncState.TRANSFERRING, 1 << 20, 3, 1 << 19, 1 << 19, 0, (SourceShare("a", 1 << 19, 1000),)
)
_REPORT: Final = ReplicaReport(
    "vm1",
    Presence.PRESENT,
    "v1",
    _LINEAGE,
    LiveCopy(LiveState.MODIFIED, "/data/vm1.img", 4 << 20, 1 << 20, "s1", True, ("qemu pid 12",), 3, 4096),
    _VOLUME,
    Grant("v1", 3, "e3"),
    "image",
    free_bytes=1 << 30,
    preserved=(_PRESERVED,),
    problems=("a snapshot was left out",),
    examine_time_ms=_MS,
    others=(Snapshot("g1", origin=Origin.ADOPTED, note="auto-1"),),
)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _fields(value: Any) -> dict[str, Any]:
    found = {name: getattr(value, name) for name in type(value).__slots__}
    return {name: str(each) if isinstance(each, ConsistencyPoint) else each for name, each in found.items()}


def _stored() -> dict[str, Any]:
    return {**record_to_json(_NEW), "volume_id": "v1", "table": ""}


def _stream() -> Iterator[tuple[str, bytes]]:
    wish = StreamWish(("btrfs-2", "btrfs-1"), 1 << 20, "ab" * 32, "1-abc")
    plain = Hello("t1", "r1", "vm1", "s1", "b")
    wishing = Hello("t1", "r1", "vm1", "s1", "b", wish)
    data = b"block" * 800
    whole = [
        frames.encode_hello(plain),
        frames.encode_welcome(Welcome(4 << 20)),
        frames.encode_request([(0, 4096), (8192, 1 << 20)]),
        frames.encode(Kind.DATA, data, offset=0),
        frames.encode(Kind.DATA, data, offset=8192, compress=True),
        frames.encode_zero(4096, 4096),
        frames.encode(Kind.WAIT),
        frames.encode_error(error_for("BASE_GONE", "the base is gone")),
        frames.encode_end(StreamEnd(4096, "ab" * 32)),
        frames.encode(Kind.BYE),
    ]
    yield "frames", b"".join(whole)
    yield from (("frames", one) for one in whole[:3])
    for kind, body in ((4, data), (5, b""), (1, b'{"ticket":"t"}'), (3, bytes(16))):
        yield "frames_sealed", struct.pack("<BBHQQ", kind, 0, 0, 0, len(body)) + body + b"\0\1\3"
    yield "packed", zstandard.ZstdCompressor(level=1).compress(data)
    yield "packed", zstandard.ZstdCompressor(level=19).compress(bytes(1 << 20))
    bomb = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    yield "packed", bomb.compress(bytes(8 << 20)) + bomb.flush()
    yield "hello", frames.msgspec.json.encode(plain)
    yield "hello", frames.msgspec.json.encode(wishing)
    yield "groups", bytes([10, 20, 30, 0, 1, 2, 3, 4]) + data
    yield "groups", bytes([11, 20, 30, 0, 1, 2, 3, 4]) + bytes(90) + data
    yield "error_frame", _json({"reason": "BASE_GONE", "message": "the base is gone"})
    delta = DeltaMap.of(
        4 << 20, (DeltaRange(0, 4096), DeltaRange(8192, 3 << 20), DeltaRange(3 << 20 | 8192, 4096, True))
    )
    with fresh("seeds") as directory:
        save_map(directory / MAP_FILE, "s0", "s1", delta)
        body = (directory / MAP_FILE).read_bytes()[:-32]
        yield "map_file", body
        kept = Journal.open(directory, JournalKey.of("s0", "s1", delta), delta)
        kept.append_many([0, 1], [b"d" * 32, b"e" * 32])
        kept.close()
        yield "journal", struct.pack("<H", len(body)) + body + (directory / JOURNAL_FILE).read_bytes()


def _files() -> Iterator[tuple[str, bytes]]:
    yield "record", _json(_stored())
    yield "preserved", _json(_fields(_PRESERVED))
    yield "volume", _json(_fields(_VOLUME))
    yield "grant", _json(_fields(Grant("v1", 3, "e3")))
    image = {
        "resync_id": "r1", "old_tip": "s0", "new_tip": "s1", "new_inode": 77, "made_target": True,
        "keeps": [["s9", "p9"]], "live_pid": "p1", "spare_of": "", "undoing": False,
    }  # fmt: skip
    yield "commit", _json(image)
    lvm = {key: value for key, value in image.items() if key not in {"new_inode", "spare_of"}}
    yield "commit", _json({**lvm, "old": "u1-2", "old_name": "vm1.r-1", "next": "u3-4"})
    zfs = {
        "mode": "replace", "resync_id": "r1", "volume_id": "v1", "old_tip": "s0", "new_tip": "s1", "new_guid": "12",
        "record": json.dumps(_stored()), "name": "resilver-3-42-s1", "head_guid": "1", "stage_guid": "2", "on": "",
        "promotes": False, "kept": "tank/vm1.resilver/kept-p1", "keeps": True, "mounted": True,
        "readonly_was": "inherit", "properties": {"compression": "lz4"}, "recorded": False,
    }  # fmt: skip
    yield "commit", _json(zfs)
    yield "native", _json({"uuid": "u1", "received_uuid": "", "ctransid": 12, "time_ns": _MS * 1_000_000})
    yield "native", _json({"lv": "aBc-12", "name": "vm1.r-1"})
    plan = {"base": "s0", "target": "s1", "native_base": "1", "native_target": "2", "whole": True}
    yield "native", _json({**plan, "stream_format": "plain", "digest": "ab", "outline": "cd", "block_bytes_max": 4096})
    yield "zfs_record", json.dumps(_stored(), separators=(",", ":")).encode()
    state = {"s1": _stored(), "s0": {**record_to_json(_OLD), "volume_id": "v1", "table": ""}}
    lines = [{"records": [record_to_json(_OLD)]}, {"records": [], "natives": {"s0": "12"}}]
    yield "lineage_state", _json({"records": state, "lines": lines, "commit": image})
    yield "lineage_state", _json({"records": {"s1": _stored()}, "lines": lines})
    yield "log", b"".join(map(sealed_line, lines)) + b'{"format": 1, "torn'
    yield "identity", _json({"cluster": "prod", "node": "a", "store_id": "st1", "term": 7, "leader_id": "l1"})
    yield "identity", _json({"file_system_id": "f1", "tip": "s1", "volume_id": "v1"})
    ticket = {
        "secret": "t1", "resync_id": "r1", "volume": "vm1", "target_node": "b", "base": "s0", "target": "s1",
        "lifetime_s": 3600, "ends_at": 1_800_003_600.5,
    }  # fmt: skip
    yield "tickets", _json({"tickets": [ticket, {**ticket, "resync_id": "r2"}]})
    wanted = RunOrder(_ORDER, "r1", "s0", "s1", "t1", (Source("a", "h:1", "h:2"),))
    yield "run", _json(run_to_json(SavedRun(wanted, _PROGRESS, StagePlace(4 << 20), _MS)))
    yield "run", _json(lineage_to_json(_LINEAGE))
    yield "limits", _json({"receive": {"bytes_s": 50 << 20, "ends_at": 1e12}, "send": {"bytes_s": 0, "ends_at": 1.5}})
    hook = {"volume": "vm1", "before": [], "after": ["/bin/true"], "timeout_s": 30.0, "env": {"PATH": "/bin"}}
    yield "leftovers", _json({"record": "/state/hooks/x.json", "hooks": [{**hook, "uid": None}]})
    yield "leftovers", _json({"mounts": ["/mnt/vm1"]})
    yield "leftovers", _json({"node": "a", "format": "plain", "native_base": "", "native_target": "g"})
    yield "sealed", _json({"a": [1, 2.5, None, "\u00e9"], "b": {"c": True}})
    yield "sealed", sealed({"a": 1})


def _others() -> Iterator[tuple[str, bytes]]:
    root = Path(__file__).parent.parent / "deploy"
    for path in sorted(root.rglob("agent*.toml")):
        yield "agent_toml", path.read_bytes()
    for path in sorted(root.rglob("coordinator*.toml")):
        yield "coordinator_toml", path.read_bytes()
    volumes = '[[volumes]]\nname = "vm1"\nbackend = "image"\npath = "/data/vm1.img"\nkeep_last = 4\ngroup = "g"\n'
    hooks = '[volumes.hooks]\nbefore = ["/bin/true"]\nafter = ["/bin/true"]\ntimeout_s = 5\n'
    yield "agent_toml", f'cluster = "c"\ncoordinators = ["127.0.0.1:7400"]\ninsecure = true\n{volumes}{hooks}'.encode()
    yield "agent_toml", f'{volumes}[[volumes]]\nname = "z"\nbackend = "zfs"\npath = "tank/z"\n'.encode()
    etcd = '[etcd]\nca = "/ca"\nusername = "u"\npassword_file = "/p"\n'
    yield "coordinator_toml", f'name = "x"\ncluster = "c"\nstore = "etcd://127.0.0.1:2379"\n{etcd}'.encode()
    for word in ("[::1]:7400", "host:1", ":7401", "etcd://h1:2379,h2", "sqlite:///var/lib/x.db", "resilver://c/node/a"):
        yield "words", word.encode()
    yield (
        "inspection",
        dump([Inspection("a", "vm1", _MS, _REPORT), Inspection("b", "vm1", _MS, None, "IO_ERROR", "x")]).encode(),
    )
    entry = VolumeEntry(_VOLUME, _MS, bases={"b": "s0"}, removed=("d",))
    node = NodeView("a", "b1", "h:1", "h:2", "0.1", ("vm1",), last_heard_ms=_MS)
    event = ClusterEvent(3, _MS, "resync.started", "vm1", "b", "r1", "it began")
    entry_of_audit = AuditEntry(9, _MS, "StartResync", "operator/x", "10.0.0.1", ("vm1",), request="q1")
    kept = [Volume("vm1", entry), node, event, entry_of_audit]
    yield "store_records", _json({records.key_of(one): records.to_json(one) for one in kept})
    leader = {"name": "x", "address": "h:1", "term": 4, "leader_id": "l", "version": "0.1"}
    yield "store_value", _json(leader)
    yield "store_value", _json({"store_id": "st1", "term": 3})


def _wire() -> Iterator[tuple[str, bytes]]:
    values: dict[type[Any], Any] = {
        volume_pb2.ConsistencyPoint: wire.cp_to_proto(_NEW.cp),
        volume_pb2.SnapshotRecord: wire.snapshot_to_proto(_NEW),
        volume_pb2.VolumeRecord: wire.record_to_proto(_VOLUME),
        volume_pb2.Grant: wire.grant_to_proto(Grant("v1", 3, "e3")),
        volume_pb2.LiveCopy: wire.live_to_proto(_REPORT.live),
        volume_pb2.PreservedCopy: wire.preserved_to_proto(_PRESERVED),
        volume_pb2.ResyncProgress: wire.progress_to_proto(_PROGRESS),
        agent_pb2.OrderHeader: wire.order_to_proto(_ORDER),
    }
    for at, (kind, _read, _write) in enumerate(VALUES):
        yield "wire_values", bytes([at]) + values.get(kind, kind()).SerializeToString()
    hello = agent_pb2.ReportRequest(boot="b1", seq=1)
    hello.hello.node, hello.hello.cluster, hello.hello.address, hello.hello.stream_address = "a", "prod", "h:1", "h:2"
    hello.hello.volumes.append("vm1")
    bodies = [
        hello,
        *(agent_pb2.ReportRequest(boot="b1", seq=2, replica=page) for page in wire_pages.report_pages(_REPORT)),
    ]
    raw = [one.SerializeToString() for one in bodies]
    yield "wire_reports", b"".join(len(one).to_bytes(2, "big") + one for one in raw)
    asked = {
        "volume": "vm1", "volumes": ["vm1"], "node": "a", "nodes": ["a"], "id": "r1", "snapshot": "s1", "path": "/x/y",
        "reason": "repairs", "store_id": "st1", "request_id": "q1", "choose": "a",
    }  # fmt: skip
    for at, (kind, _read) in enumerate(REQUESTS):
        known = {field.name for field in kind.DESCRIPTOR.fields}
        message = kind(**{name: value for name, value in asked.items() if name in known})
        yield "wire_requests", bytes([at]) + message.SerializeToString()
    limit = coordinator_pb2.UpdateNodeRequest(node="a", request_id="q1")
    yield "wire_requests", bytes([10]) + limit.SerializeToString()


def _tools() -> Iterator[tuple[str, bytes]]:
    yield (
        "zfs_get",
        (
            b"tank/vm1\ttype\tfilesystem\t-\ntank/vm1\tguid\t123\t-\ntank/vm1\tmounted\tyes\t-\n"
            b"tank/vm1@resilver-3-42-s1\ttype\tsnapshot\t-\ntank/vm1@resilver-3-42-s1\tcreatetxg\t77\t-\n"
            b'tank/vm1@resilver-3-42-s1\tresilver:record\t{"id":"s1"}\tlocal\n'
        ),
    )
    yield "zfs_send_said", b"full\ttank/vm1@a\t12345\nsize\t12345\n"
    yield "zfs_send_said", b"resume token contents:\nnvlist version: 0\n\ttoguid = 0x1f\n\tfromguid = 0x2a\n"
    row = {
        "vg_uuid": "a-b", "vg_extent_size": "4194304", "lv_name": "[pool_tmeta]", "lv_uuid": "c-d", "lv_size": "4096",
        "lv_attr": "Vwi-a-tz-k", "lv_tags": "resilver.of=x,y", "thin_id": "3", "origin": "", "pool_lv": "pool",
        "segtype": "thin", "chunk_size": "65536", "zero": "zero", "discards": "passdown", "lv_when_full": "queue",
    }  # fmt: skip
    yield "lvs", _json({"report": [{"lv": [row, {**row, "segtype": "thin-pool", "lv_name": "pool"}]}], "log": []})
    head = '<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="0">'
    rows = '<different begin="0" length="1"/><same begin="1" length="3"/>'
    yield "thin_xml", f'{head}<diff left="2" right="1">{rows}</diff></superblock>'.encode()
    device = '<device dev_id="1" mapped_blocks="5"><range_mapping origin_begin="0" data_begin="68" length="4"/>'
    yield "thin_xml", f'{head}{device}<single_mapping origin_block="9" data_block="1"/></device></superblock>'.encode()
    yield "pool_status", b"1 20/1024 3/4096 - rw discard_passdown queue_if_no_space - 1024"
    yield "pool_status", b"1 20/1024 3/4096 77 out_of_data_space error_if_no_space needs_check 1024"


def main() -> None:
    """Replaces every `seed-*` of the corpora."""
    for path in CORPORA.glob("*/seed-*"):
        path.unlink()
    counts: dict[str, int] = {}
    for make in (_stream, _files, _others, _wire, _tools):
        for name, data in make():
            counts[name] = counts.get(name, 0) + 1
            path = CORPORA / name / f"seed-{counts[name]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


if __name__ == "__main__":
    main()
