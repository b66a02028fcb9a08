"""The rules of the JSON, and that the page that describes them is complete."""

import re
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from resilver.cli.plainjson import LIFTED, NAMES, enum_word, key_of, plain
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2 as pb
from tests.cli import sample

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"


def test_absent_is_null_and_zero_is_zero():
    found = plain(pb.Replica(node="a"))
    assert found["cp"] is None
    assert found["behind_cps"] is None
    assert found["live"] is None
    assert found["resync"] is None
    assert found["state"] is None
    assert found["reachable"] is False
    assert found["problems"] == []
    assert plain(pb.Replica(behind_cps=0))["behind_cps"] == 0


def test_values():
    found = plain(
        pb.Replica(cp=sample.cp("3-42"), state=pb.REPLICA_STATE_IN_SYNC, behind_duration=Duration(seconds=90),
                   report_time=sample.at(0), free_bytes=2**63)
    )  # fmt: skip
    assert found["cp"] == "3-42"
    assert found["state"] == "IN_SYNC"
    assert found["behind_seconds"] == 90
    assert found["report_time"] == "2026-11-22T14:31:07Z"
    assert found["free_bytes"] == 2**63


def test_a_cp_that_is_none_is_null():
    assert plain(pb.Snapshot(cp=pb.ConsistencyPoint()))["cp"] is None


def test_an_enum_of_a_newer_peer_is_its_number():
    assert enum_word(pb.ReplicaState.DESCRIPTOR, 99) == "99"


@pytest.mark.parametrize(
    ("message", "keys"),
    [
        (api.GetClusterResponse, "cluster leader term"),
        (pb.Volume, "name state epoch primary newest_cp replicas"),
        (pb.Replica, "node role reachable state cp snapshot live behind_cps resync"),
        (pb.Plan, "etag volumes"),
        (pb.VolumePlan, "volume primary target_cp takes_snapshot refusal replicas"),
        (
            pb.ReplicaPlan,
            "node state action base base_cp target target_cp sources bytes range_count exact preserve_bytes why",
        ),
        (pb.Resync, "id volume node state action done_bytes wire_bytes resent_bytes range_count preserved"),
        (api.VolumeRefusal, "volume reasons message next_command"),
        (pb.Election, "volume epoch winner previous_primary cp rule candidates refusal accepted_losses principal term"),
    ],
)
def test_the_keys_that_scripts_rely_on(message, keys):
    assert set(keys.split()) <= set(plain(message()))


def test_a_resync_has_its_plans_action_on_the_outside():
    assert plain(sample.resync("r", "c", "SUCCEEDED"))["action"] == "DELTA"
    assert plain(pb.Resync())["action"] is None


def test_the_page_names_every_key_that_differs():
    page = PAGE.read_text()
    for (message, field), key in NAMES.items():
        assert re.search(rf"`{message}`.*`{field}`.*`{key}`", page), f"{message}.{field}"
    for message, lifted in LIFTED.items():
        for _, key in lifted:
            assert re.search(rf"`{message}`.*`{key}`", page), f"{message}: {key}"
    for message in (*pb.DESCRIPTOR.message_types_by_name.values(),):
        for field in message.fields:
            if field.message_type is not None and field.message_type.name == "Duration":
                assert f"`{key_of(field)}`" in page
