"""What the coordinator keeps in its store, where somebody else may have written too."""

from __future__ import annotations

import contextlib
import json

from coordinator import records, wire
from coordinator.core.cluster import ClusterEvent, ElectionRecord, NodeView, Resync
from coordinator.core.events import Kept, Loaded, Volume
from coordinator.store import encoding
from coordinator.store.base import Stored
from fuzz.target import as_json, target
from resilver.errors import Damaged
from resilver.wire import record_to_proto


@target("store_value", form="json")
def store_value(data: bytes) -> None:
    """A value as its bytes, and what the store's own records say."""
    for read in (encoding.decode_leader, encoding.decode_term, encoding.decode_store_id):
        with contextlib.suppress(Damaged):
            read(data)
    with contextlib.suppress(Damaged):
        leader = encoding.decode_leader(data)
        assert encoding.decode_leader(encoding.encode_leader(leader)) == leader
    with contextlib.suppress(Damaged):
        value = encoding.decode("volumes/vm1", data)
        assert encoding.decode("volumes/vm1", encoding.encode(value)) == value


@target("store_records", form="json")
def store_records(data: bytes) -> None:
    """Everything that a leader reads at its take-over, `{key: value}`: what it read it can write, and reads again."""
    value = as_json(data)
    if not isinstance(value, dict):
        return
    stored = {}
    for at, (key, each) in enumerate(value.items()):
        # As it comes out of a store: decoded there.
        with contextlib.suppress(Damaged, ValueError, RecursionError):
            stored[key] = Stored(encoding.decode(key, json.dumps(each).encode()), at + 1)
    try:
        loaded = records.load(stored)
    except Damaged:
        return
    kept = _kept(loaded)
    _shown(loaded)
    again = {}
    for one in kept:
        plain = records.to_json(one)
        assert plain is not None
        again[records.key_of(one)] = Stored(encoding.decode("x", encoding.encode(plain)), 1)
    assert len(again) == len(stored)
    assert records.load(again).nodes == loaded.nodes
    assert records.load(again).volumes == loaded.volumes


def _shown(loaded: Loaded) -> None:
    """What was read can be told to whoever asks."""
    for entry in loaded.volumes.values():
        record_to_proto(entry.record).SerializeToString()
        if entry.pause is not None:
            wire.pause_to_proto(entry.pause).SerializeToString()
    for each in loaded.elections.values():
        for election in each:
            wire.election_to_proto(election).SerializeToString()
    for resync in loaded.resyncs.values():
        wire.resync_to_proto(resync).SerializeToString()
    for event in loaded.events:
        wire.event_to_proto(event).SerializeToString()


def _kept(loaded: Loaded) -> list[Kept]:
    found: list[Kept] = [Volume(name, entry) for name, entry in loaded.volumes.items()]
    elections: list[ElectionRecord] = [one for each in loaded.elections.values() for one in each]
    resyncs: list[Resync] = list(loaded.resyncs.values())
    nodes: list[NodeView] = list(loaded.nodes.values())
    events: list[ClusterEvent] = list(loaded.events)
    return [*found, *elections, *resyncs, *nodes, *events, *loaded.audit]
