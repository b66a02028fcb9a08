"""What an offline look prints is read back as it was, and nothing else is."""

from __future__ import annotations

import json

import pytest

from resilver.inspection import Inspection, dump, load
from resilver.lineage import Consistency, ConsistencyPoint, Lineage, Origin, Snapshot
from resilver.volume import Grant, LiveCopy, LiveState, Presence, PreservedCopy, ReplicaReport, VolumeRecord

CP = ConsistencyPoint(3, 42)
FOUND = (
    Inspection(
        "a",
        "vm1",
        1_700_000_000_000,
        ReplicaReport(
            "vm1",
            Presence.PRESENT,
            volume_id="V",
            lineage=Lineage(
                (
                    Snapshot("s2", CP, "s1", epoch_id="E", size_bytes=2**40, consistency=Consistency.FROZEN),
                    Snapshot("s1", ConsistencyPoint(2, 41), present=False, origin=Origin.ADOPTED, note="ä"),
                )
            ),
            live=LiveCopy(LiveState.MODIFIED, "/srv/vm1.img", in_use=True, in_use_by=("qemu pid 7",)),
            record=VolumeRecord("vm1", "V", 3, "E", "a", ("a", "b"), CP, "s2"),
            grant=Grant("V", 3, "E"),
            backend="image",
            priority=-3,
            preserved=(PreservedCopy("p", "/x", "s1", CP, True, 5, 6),),
            problems=("one",),
        ),
    ),
    Inspection("b", "vm1", 5, None, "IO_ERROR", "the disk says no"),
)


def test_it_is_read_back_as_it_was() -> None:
    assert load(dump(FOUND).encode()) == FOUND


def test_a_person_can_read_it() -> None:
    document = json.loads(dump(FOUND))
    (first, _) = document["replicas"]
    assert first["report"]["lineage"]["records"][0]["cp"] == "3-42"
    assert first["report"]["record"]["newest_cp"] == "3-42"
    assert first["report"]["live"]["state"] == "modified"


def test_fields_of_a_newer_version_are_passed_over() -> None:
    document = json.loads(dump(FOUND))
    document["replicas"][0]["report"]["mood"] = "good"
    assert load(json.dumps(document).encode()) == FOUND


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"", "truncated"),
        (b"\xff\x00", "malformed"),
        (b"[]", "is not what"),
        (b'{"volumes": []}', "is not what"),
        (b'{"format": 2, "replicas": []}', "format 2"),
        (b'{"format": 1, "replicas": 7}', "Expected `array`"),
        (b'{"format": 1, "replicas": [{"node": 7}]}', "Expected `str`"),
        (b'{"format": 1, "replicas": [{"cp": "three"}]}', "no consistency point"),
    ],
)
def test_anything_else_is_refused_with_a_sentence(document: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(document)


def test_records_that_form_no_chain_are_refused() -> None:
    document = json.loads(dump(FOUND))
    document["replicas"][0]["report"]["lineage"]["records"].reverse()
    with pytest.raises(ValueError, match="names"):
        load(json.dumps(document).encode())
