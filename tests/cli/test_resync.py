"""Planning, resyncing, watching and cancelling."""

import json
import signal
import subprocess
import sys
import uuid

import pytest

from resilver.errors import error_for
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2 as pb
from tests.cli import sample


def started(*resyncs, refusals=()):
    return api.StartResyncResponse(resyncs=resyncs, refusals=refusals)


def watched(*resyncs):
    return [api.WatchResyncsResponse(resyncs=resyncs)]


def test_plan(run, coordinator, table):
    table["PlanResync"] = api.PlanResyncResponse(plan=sample.plan())
    code, out, err = run("plan", "--all", "--to", "b", "--to", "c", "-o", "json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["etag"] == "9f2c41"
    row = found["volumes"][0]["replicas"][1]
    assert (row["action"], row["base_cp"], row["range_count"], row["sources"]) == ("DELTA", "3-39", 10485, ["a", "b"])
    assert isinstance(row["bytes"], int)
    assert found["volumes"][0]["refusal"] is None
    request = coordinator.answers.of("PlanResync")[0]
    assert request.all
    assert list(request.nodes) == ["b", "c"]
    assert "resilver resync --all --to b --to c --plan 9f2c41" in run("plan", "--all", "--to", "b", "--to", "c")[1]


def test_a_plan_says_which_volumes_are_paused(run, table):
    paused, other = sample.vm1(), sample.db1()
    paused.problems.add(reason="PAUSED", message="paused by jo: disk swap", next_command="resilver unpause vm1")
    table["PlanResync"] = api.PlanResyncResponse(plan=sample.plan())
    table["ListVolumes"] = api.ListVolumesResponse(volumes=[paused, other])
    code, out, _ = run("plan", "--all")
    assert code == 0
    said = "  PAUSED: a resync is refused; paused by jo: disk swap\n  next: resilver unpause vm1\ndb1   primary"
    assert said in out
    assert "Do it: " in out
    other.problems.add(reason="PAUSED", message="paused", next_command="resilver unpause db1")
    table["ListVolumes"] = api.ListVolumesResponse(volumes=[paused, other])
    assert "Do it: " not in run("plan", "--all")[1]


def test_a_plan_that_is_refused(run, table):
    plan = pb.Plan(etag="1", volumes=[pb.VolumePlan(volume="vm1", refusal=sample.refusal())])
    table["PlanResync"] = api.PlanResyncResponse(plan=plan)
    code, out, err = run("plan", "vm1", "-o", "json")
    assert code == 3
    assert json.loads(out)["volumes"][0]["refusal"]["losses"][0]["cps"] == 3
    assert err.startswith("PRIMARY_AWAY, NEWEST_COPY_MISSING vm1: ")
    assert "next: resilver elect vm1 --accept-loss a" in err
    table["PlanResync"] = api.PlanResyncResponse(plan=sample.blocked_plan())
    assert run("plan", "--all")[0] == 0


S, F, B, C = "SUCCEEDED", "FAILED", "BLOCKED", "CANCELLED"


@pytest.mark.parametrize(
    ("states", "refusals", "code"),
    [([], 0, 0), ([S], 0, 0), ([S, S], 0, 0), ([], 1, 3), ([B], 0, 3), ([B], 1, 3), ([S], 1, 5), ([S, F], 0, 5),
     ([S, B], 0, 5), ([F], 0, 1), ([F, B], 0, 1), ([F], 1, 1), ([C], 0, 1)],
)  # fmt: skip
def test_resync_exit_codes(run, table, states, refusals, code):
    ids = [str(uuid.uuid4()) for _ in states]
    begun = [sample.resync(one, f"n{n}", "QUEUED") for n, one in enumerate(ids)]
    ended = [sample.resync(one, f"n{n}", state, 5, 5) for n, (one, state) in enumerate(zip(ids, states, strict=True))]
    table["StartResync"] = started(*begun, refusals=[sample.refused()] * refusals)
    table["WatchResyncs"] = watched(*ended)
    got, out, err = run("resync", "--all", "-o", "json")
    assert got == code
    found = json.loads(out)
    assert [one["state"] for one in found["resyncs"]] == states
    assert [one["reasons"][0] for one in found["refusals"]] == ["PRIMARY_AWAY"] * refusals
    assert err.count("PRIMARY_AWAY") == refusals


@pytest.mark.parametrize(
    ("reasons", "code"),
    [(["NO_SPACE"], 3), (["NO_SPACE", "TARGET_GONE"], 3), (["IO_ERROR"], 1), (["NO_SPACE", "INTERNAL"], 1)],
)
def test_what_a_run_failed_for_decides_the_exit_code(run, table, reasons, code):
    ended = [sample.resync(str(uuid.uuid4()), f"n{n}", "FAILED", 0, 5) for n in range(len(reasons))]
    for one, reason in zip(ended, reasons, strict=True):
        one.refusal.reasons.append(reason)
    table["StartResync"] = started(*ended)
    table["WatchResyncs"] = watched(*ended)
    assert run("resync", "--all")[0] == code


def test_resync_shows_lines_without_a_terminal(run, coordinator, table):
    table["StartResync"] = started(sample.resync(sample.R1, "c", "QUEUED", 0, 3 << 20))
    table["WatchResyncs"] = [
        *watched(sample.resync(sample.R1, "c", "TRANSFERRING", 1 << 20, 3 << 20)),
        api.WatchResyncsResponse(),
        *watched(sample.resync(sample.R1, "c", "TRANSFERRING", 2 << 20, 3 << 20)),
        *watched(sample.resync(sample.R1, "c", "SUCCEEDED", 3 << 20, 3 << 20, preserved=["p1"])),
    ]
    code, out, err = run("resync", "vm1")
    assert (code, err) == (0, "")
    steps = [line.split("  ")[2:4] for line in out.splitlines()[:-1]]
    assert steps == [["queued", "0%"], ["transferring", "33%"], ["in sync", "100%"]]
    last = out.splitlines()[-1]
    assert last.startswith("DONE 1 of 1 in sync in ")
    assert "copied 3.0 MiB of 20 GiB" in last
    assert "vm1/c's own data: resilver preserved vm1" in last


def test_resync_asks_for_what_was_said(run, coordinator, table):
    table["StartResync"] = started()
    code, out, _ = run("resync", "vm1", "--to", "c", "--plan", "9f", "--full", "--replace", "b", "--replace", "c")
    assert code == 0
    assert "Nothing to copy" in out
    request = coordinator.answers.of("StartResync")[0]
    assert list(request.volumes) == ["vm1"]
    assert list(request.nodes) == ["c"]
    assert list(request.replace_nodes) == ["b", "c"]
    assert request.plan_etag == "9f"
    assert request.full
    assert uuid.UUID(request.request_id)


def test_no_wait_watches_nothing(run, coordinator, table):
    table["StartResync"] = started(sample.resync(sample.R1, "c", "QUEUED"))
    code, out, _ = run("resync", "vm1", "--no-wait")
    assert code == 0
    assert "--watch" in out
    assert coordinator.answers.of("WatchResyncs") == []


def test_a_watch_that_breaks_is_taken_up_again(run, coordinator, table):
    answers = iter(
        [
            [*watched(sample.resync(sample.R1, "c", "TRANSFERRING", 5, 9)), error_for("NO_LEADER", "gone")],
            watched(sample.resync(sample.R1, "c", "SUCCEEDED", 9, 9)),
        ]
    )
    table["StartResync"] = started(sample.resync(sample.R1, "c", "QUEUED", 0, 9))
    table["WatchResyncs"] = lambda _: next(answers)
    code, _, err = run("resync", "vm1")
    assert code == 0
    assert err.count("trying again for 60 s") == 1
    assert len(coordinator.answers.of("WatchResyncs")) == 2


def test_why_a_resync_failed_is_said(run, table):
    table["StartResync"] = started(sample.resync(sample.R1, "c", "QUEUED"))
    table["WatchResyncs"] = watched(
        sample.resync(sample.R1, "c", "BLOCKED", refusal=sample.refusal("IN_USE", "fuser /srv"))
    )
    code, _, err = run("resync", "vm1")
    assert code == 3
    assert err.startswith("IN_USE, NEWEST_COPY_MISSING vm1/c: ")
    assert "next: fuser /srv" in err


def test_timeout_of_a_watch(run, table):
    table["StartResync"] = started(sample.resync(sample.R1, "c", "QUEUED"))
    table["WatchResyncs"] = [*watched(sample.resync(sample.R1, "c", "TRANSFERRING", 1, 9)), 30.0]
    code, _, err = run("resync", "vm1", "--timeout", "1s")
    assert code == 4
    assert err.startswith("DEADLINE")
    assert "they go on" in err


def test_ctrl_c_stops_watching_and_says_how_to_come_back(coordinator, table):
    table["StartResync"] = started(sample.resync(sample.R1, "c", "QUEUED", 0, 9))
    table["WatchResyncs"] = [*watched(sample.resync(sample.R1, "c", "TRANSFERRING", 1, 9)), 30.0]
    command = [sys.executable, "-u", "-m", "resilver.cli.main", "resync", "vm1", "--coordinator", coordinator.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = ""
    while "transferring" not in seen:
        seen = process.stdout.readline()
        assert seen, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the work goes on" in err
    assert "resilver resyncs --active --watch" in err
    assert "Traceback" not in err


def test_resyncs_and_cancel(run, coordinator, table):
    running = [
        sample.resync(sample.R1, "b", "TRANSFERRING", 1, 9),
        sample.resync(sample.R2, "c", "QUEUED", volume="db1"),
    ]
    table["ListResyncs"] = api.ListResyncsResponse(resyncs=running)
    assert [one["id"] for one in json.loads(run("resyncs", "-o", "json")[1])["resyncs"]] == [sample.R1, sample.R2]
    table["CancelResync"] = lambda request: api.CancelResyncResponse(resync=sample.resync(request.id, "x", "CANCELLED"))
    assert run("cancel", "1111", "--discard-stage")[0] == 0
    assert run("cancel", "db1")[0] == 0
    assert run("cancel", "--all")[0] == 0
    table["ListResyncs"] = api.ListResyncsResponse()
    assert "no resync runs there" in run("cancel", "db1")[1]
    orders = coordinator.answers.of("CancelResync")
    assert [order.id for order in orders] == [sample.R1, sample.R2, sample.R1, sample.R2]
    assert [order.discard_stage for order in orders] == [True, False, False, False]
