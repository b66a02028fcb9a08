"""The status, its exit code, and how it is watched."""

import json

import pytest

from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2 as pb
from tests.cli import sample


def test_status_json(run, table):
    code, out, err = run("status", "-o", "json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["cluster"], found["leader"], found["term"]) == ("prod", "c1", 12)
    assert [volume["name"] for volume in found["volumes"]] == ["vm1", "db1"]
    stale = found["volumes"][0]["replicas"][2]
    assert stale["cp"] == "3-39"
    assert stale["behind_cps"] == 3
    assert stale["live"]["state"] == "UNMODIFIED"
    assert found["volumes"][0]["replicas"][0]["behind_cps"] is None
    assert found["volumes"][1]["replicas"][1]["state"] == "DIVERGED"


@pytest.mark.parametrize(
    ("states", "code"),
    [([], 0), (["HEALTHY"], 0), (["HEALTHY", "DEGRADED"], 5), (["DEGRADED", "BLOCKED"], 3), (["RECOVERING"], 3),
     (["OPENING"], 5), (["UNINITIALIZED"], 5)],
)  # fmt: skip
def test_status_exit_code(run, table, states, code):
    volumes = [pb.Volume(name=f"v{n}", state=f"VOLUME_STATE_{state}") for n, state in enumerate(states)]
    table["ListVolumes"] = api.ListVolumesResponse(volumes=volumes)
    assert run("status", "--exit-code")[0] == code
    assert run("status")[0] == 0


def test_status_problems_leaves_healthy_volumes_out(run, table):
    healthy = pb.Volume(name="calm", state=pb.VOLUME_STATE_HEALTHY)
    table["ListVolumes"] = api.ListVolumesResponse(volumes=[healthy, sample.vm1()])
    assert "calm" in run("status")[1]
    assert "calm" not in run("status", "--problems")[1]
    table["ListVolumes"] = api.ListVolumesResponse(volumes=[healthy])
    assert "No problems." in run("status", "--problems")[1]


def test_pages_are_followed(run, coordinator, table):
    def page(request):
        last = request.page_token == "2"
        return api.ListVolumesResponse(
            volumes=[sample.db1() if last else sample.vm1()], next_page_token="" if last else "2"
        )

    table["ListVolumes"] = page
    assert len(json.loads(run("volumes", "-o", "json")[1])["volumes"]) == 2


def test_status_watch_shows_each_change(run, table):
    table["WatchVolumes"] = [
        api.WatchVolumesResponse(volumes=[sample.vm1()]),
        api.WatchVolumesResponse(),
        api.WatchVolumesResponse(volumes=[sample.db1()], removed=["vm1"]),
    ]
    code, out, _ = run("status", "--watch", "-o", "json", "--timeout", "2s")
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{") and len(line) > 1]
    assert code == 0
    assert [[volume["name"] for volume in line["volumes"]] for line in lines[:2]] == [["vm1"], ["db1"]]


def test_without_a_consistency_point_nothing_is_said_of_writes_since(run, table):
    fresh = sample.vm1()
    fresh.ClearField("newest_cp")
    table["ListVolumes"] = api.ListVolumesResponse(volumes=[fresh])
    (line,) = (line for line in run("status")[1].splitlines() if line.startswith("NEWEST CP"))
    assert line == "NEWEST CP   vm1 none yet"


def test_what_is_open_for_writing_has_perhaps_been_written(run, table):
    volume = sample.db1()
    (own,) = (one for one in volume.replicas if one.state == pb.REPLICA_STATE_DIVERGED)
    own.ClearField("own_cps")
    own.live.ClearField("modified_bytes")
    own.live.in_use = True
    table["ListVolumes"] = api.ListVolumesResponse(volumes=[volume])
    assert "own: maybe live writes" in run("status")[1]
