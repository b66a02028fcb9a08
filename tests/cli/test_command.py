"""The command against a coordinator: what it asks for, prints, and ends with."""

import json
import os
import signal
import subprocess
import sys
import uuid

import pytest

from resilver.cli.main import main
from resilver.errors import error_for
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2 as pb
from tests.cli import sample

R1, R2 = "11111111-2222-3333-4444-555555555555", "22222222-2222-3333-4444-555555555555"


@pytest.fixture
def table(coordinator):
    """What the coordinator answers; filled with what `status` needs."""
    coordinator.answers.table |= {
        "GetCluster": sample.cluster(),
        "ListNodes": api.ListNodesResponse(nodes=sample.nodes()),
        "ListVolumes": api.ListVolumesResponse(volumes=[sample.vm1(), sample.db1()]),
    }
    return coordinator.answers.table


def started(*resyncs, refusals=()):
    return api.StartResyncResponse(resyncs=resyncs, refusals=refusals)


def watched(*resyncs):
    return [api.WatchResyncsResponse(resyncs=resyncs)]


def refused(volume="vm1", node="", reason="PRIMARY_AWAY"):
    return api.VolumeRefusal(volume=volume, node=node, refusal=sample.refusal(reason))


# Status.


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


# Globals and errors.


def test_globals_stand_before_or_after_the_verb(run, coordinator, table, monkeypatch):
    monkeypatch.setenv("RESILVER_COORDINATOR", "127.0.0.1:1")
    assert run("--coordinator", coordinator.address, "-o", "json", "status")[0] == 0
    assert run("status", "--coordinator", coordinator.address, "-o", "json")[0] == 0
    assert run("status")[0] == 4
    table["RemoveNode"] = api.RemoveNodeResponse()
    assert run("node", "--coordinator", coordinator.address, "remove", "c", "--yes")[0] == 0


def test_version_needs_no_coordinator():
    assert main(["--version"]) == 0
    assert main(["status", "--version"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stats"], "did you mean 'status'"),
        (["status", "--wacth"], "--watch"),
        (["plan"], "give --all"),
        (["plan", "vm1", "--all"], "not both"),
        (["elect"], "VOLUME"),
        (["status", "--timeout", "soon"], "30s, 10m, 2h"),
        (["status", "--coordinator", ","], "names nobody"),
        (["status", "--coordinator", "a:b:c"], "no address"),
        (["status", "--coordinator", "h:99999"], "65535"),
        (["inspect", "--compare", "a.json"], "two nodes or more"),
        (["cancel"], "give --all"),
    ],
)
def test_usage_errors_end_with_2(run, arguments, words):
    code, out, err = run(*arguments)
    assert code == 2
    assert words in err
    assert out == ""
    code, _, err = run(*arguments, "-o", "json")
    assert code == 2
    assert words in json.loads(err)["error"]["message"] or words in err


@pytest.mark.parametrize(
    ("reason", "code"),
    [("VOLUME_NOT_FOUND", 2), ("PRIMARY_AWAY", 3), ("PLAN_CHANGED", 3), ("NO_LEADER", 4), ("STALE_TERM", 4),
     ("TOO_LARGE", 1), ("IO_ERROR", 1), ("ROLE_NOT_ALLOWED", 1), ("SOMETHING_NEW", 1)],
)  # fmt: skip
def test_errors_of_the_api(run, table, reason, code):
    table["PlanResync"] = error_for(reason, "a sentence", next_command="resilver volumes", volume="vm1")
    got, out, err = run("plan", "vm1")
    assert (got, out) == (code, "")
    assert err.splitlines() == [f"{reason}: a sentence", "next: resilver volumes"]
    got, out, err = run("plan", "vm1", "-o", "json")
    assert (got, out) == (code, "")
    error = json.loads(err)["error"]
    assert (error["reason"], error["message"], error["next_command"]) == (reason, "a sentence", "resilver volumes")


def test_a_bug_is_one_line(run, table, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("resilver.cli.screens.status.screen", broken)
    code, _, err = run("status")
    assert code == 1
    assert err.count("\n") == 1
    assert "report" in err
    assert "RESILVER_DEBUG" in err
    monkeypatch.setenv("RESILVER_DEBUG", "1")
    assert "Traceback" in run("status")[2]


def test_nobody_answers(run, monkeypatch):
    code, _, err = run("status", "--coordinator", "127.0.0.1:1,127.0.0.1:2")
    assert code == 4
    assert err.startswith("NO_LEADER")
    assert "127.0.0.1:2" in err


def test_a_silent_address_is_given_up(run):
    # TEST-NET-1: nobody is there, and nobody says so.
    code, _, err = run("status", "--coordinator", "192.0.2.1:7400", "--timeout", "500ms")
    assert code == 4
    assert "192.0.2.1" in err


def test_the_second_coordinator_is_tried(run, coordinator, table):
    assert run("status", "--coordinator", f"127.0.0.1:1,{coordinator.address}")[0] == 0


def test_the_leader_is_followed(run, coordinator, second, table):
    second.answers.table |= table
    for name in table:
        table[name] = error_for("NOT_LEADER", "c1 stands by", leader_address=second.address)
    assert run("status")[0] == 0
    assert len(coordinator.answers.requests) == 1, "the leader is remembered after the first call"


def test_two_that_point_at_each_other_end(run, coordinator, second):
    coordinator.answers.table["GetCluster"] = error_for("NOT_LEADER", "not me", leader_address=second.address)
    second.answers.table["GetCluster"] = error_for("NOT_LEADER", "nor me", leader_address=coordinator.address)
    coordinator.answers.table["ListVolumes"] = coordinator.answers.table["GetCluster"]
    second.answers.table["ListVolumes"] = second.answers.table["GetCluster"]
    code, _, err = run("status")
    assert code == 4
    assert err.startswith("NOT_LEADER")


# Plan and resync.


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
def test_resync_exit_codes(run, coordinator, table, states, refusals, code):
    ids = [str(uuid.uuid4()) for _ in states]
    begun = [sample.resync(one, f"n{n}", "QUEUED") for n, one in enumerate(ids)]
    ended = [sample.resync(one, f"n{n}", state, 5, 5) for n, (one, state) in enumerate(zip(ids, states, strict=True))]
    table["StartResync"] = started(*begun, refusals=[refused()] * refusals)
    table["WatchResyncs"] = watched(*ended)
    got, out, err = run("resync", "--all", "-o", "json")
    assert got == code
    found = json.loads(out)
    assert [one["state"] for one in found["resyncs"]] == states
    assert [one["reasons"][0] for one in found["refusals"]] == ["PRIMARY_AWAY"] * refusals
    assert err.count("PRIMARY_AWAY") == refusals


def test_resync_shows_lines_without_a_terminal(run, coordinator, table):
    table["StartResync"] = started(sample.resync(R1, "c", "QUEUED", 0, 3 << 20))
    table["WatchResyncs"] = [
        *watched(sample.resync(R1, "c", "TRANSFERRING", 1 << 20, 3 << 20)),
        api.WatchResyncsResponse(),
        *watched(sample.resync(R1, "c", "TRANSFERRING", 2 << 20, 3 << 20)),
        *watched(sample.resync(R1, "c", "SUCCEEDED", 3 << 20, 3 << 20, preserved=["p1"])),
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
    assert "Nothing to do" in out
    request = coordinator.answers.of("StartResync")[0]
    assert list(request.volumes) == ["vm1"]
    assert list(request.nodes) == ["c"]
    assert list(request.replace_nodes) == ["b", "c"]
    assert request.plan_etag == "9f"
    assert request.full
    assert uuid.UUID(request.request_id)


def test_no_wait_watches_nothing(run, coordinator, table):
    table["StartResync"] = started(sample.resync(R1, "c", "QUEUED"))
    code, out, _ = run("resync", "vm1", "--no-wait")
    assert code == 0
    assert "--watch" in out
    assert coordinator.answers.of("WatchResyncs") == []


def test_a_watch_that_breaks_is_taken_up_again(run, coordinator, table):
    answers = iter(
        [
            [*watched(sample.resync(R1, "c", "TRANSFERRING", 5, 9)), error_for("NO_LEADER", "gone")],
            watched(sample.resync(R1, "c", "SUCCEEDED", 9, 9)),
        ]
    )
    table["StartResync"] = started(sample.resync(R1, "c", "QUEUED", 0, 9))
    table["WatchResyncs"] = lambda _: next(answers)
    assert run("resync", "vm1")[0] == 0
    assert len(coordinator.answers.of("WatchResyncs")) == 2


def test_why_a_resync_failed_is_said(run, table):
    table["StartResync"] = started(sample.resync(R1, "c", "QUEUED"))
    table["WatchResyncs"] = watched(sample.resync(R1, "c", "BLOCKED", refusal=sample.refusal("IN_USE", "fuser /srv")))
    code, _, err = run("resync", "vm1")
    assert code == 3
    assert err.startswith("IN_USE, NEWEST_COPY_MISSING vm1/c: ")
    assert "next: fuser /srv" in err


def test_timeout_of_a_watch(run, table):
    table["StartResync"] = started(sample.resync(R1, "c", "QUEUED"))
    table["WatchResyncs"] = [*watched(sample.resync(R1, "c", "TRANSFERRING", 1, 9)), 30.0]
    code, _, err = run("resync", "vm1", "--timeout", "1s")
    assert code == 4
    assert err.startswith("DEADLINE")
    assert "they go on" in err


def test_ctrl_c_stops_watching_and_says_how_to_come_back(coordinator, table):
    table["StartResync"] = started(sample.resync(R1, "c", "QUEUED", 0, 9))
    table["WatchResyncs"] = [*watched(sample.resync(R1, "c", "TRANSFERRING", 1, 9)), 30.0]
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
    running = [sample.resync(R1, "b", "TRANSFERRING", 1, 9), sample.resync(R2, "c", "QUEUED", volume="db1")]
    table["ListResyncs"] = api.ListResyncsResponse(resyncs=running)
    assert [one["id"] for one in json.loads(run("resyncs", "-o", "json")[1])["resyncs"]] == [R1, R2]
    table["CancelResync"] = lambda request: api.CancelResyncResponse(resync=sample.resync(request.id, "x", "CANCELLED"))
    assert run("cancel", "1111", "--discard-stage")[0] == 0
    assert run("cancel", "db1")[0] == 0
    assert run("cancel", "--all")[0] == 0
    orders = coordinator.answers.of("CancelResync")
    assert [order.id for order in orders] == [R1, R2, R1, R2]
    assert [order.discard_stage for order in orders] == [True, False, False, False]


# Elections.


def test_elect_refused(run, coordinator, table):
    table["ElectPrimary"] = api.ElectPrimaryResponse(election=sample.election(refused=True))
    code, out, err = run("elect", "vm1", "-o", "json")
    found = json.loads(out)
    assert code == 3
    assert (found["epoch"], found["winner"], found["refusal"]["reasons"][0]) == (0, None, "PRIMARY_AWAY")
    assert found["refusal"]["missing_nodes"] == ["a"]
    assert found["candidates"][0]["live"] == "MODIFIED"
    assert err.startswith("PRIMARY_AWAY")
    assert err.rstrip().endswith("next: resilver elect vm1 --accept-loss a")


def test_elect(run, coordinator, table):
    table["ElectPrimary"] = api.ElectPrimaryResponse(election=sample.election())
    code, out, _ = run("elect", "vm1", "--choose", "b", "--accept-loss", "a", "--accept-loss", "c", "--dry-run")
    assert code == 0
    assert "b would be primary" in out
    request = coordinator.answers.of("ElectPrimary")[0]
    assert (request.choose_node, list(request.accept_loss_nodes), request.validate_only) == ("b", ["a", "c"], True)
    assert run("elect", "vm1", "--accept-loss", "a")[0] == 0, "the node is named: without a terminal no more is asked"
    assert not coordinator.answers.of("ElectPrimary")[1].validate_only


def test_explain_and_history(run, table):
    table["ExplainVolume"] = api.ExplainVolumeResponse(
        text="vm1 is what it is.\nWHY a     rule", would_be=sample.election(refused=True)
    )
    code, out, _ = run("explain", "vm1")
    assert code == 0
    assert out.startswith("vm1 is what it is.\nWHY a     rule\n")
    assert "next: resilver elect vm1 --accept-loss a" in out
    table["ListElections"] = api.ListElectionsResponse(elections=[sample.election()])
    assert json.loads(run("history", "vm1", "-o", "json")[1])["history"][0]["winner"] == "b"


# Snapshots.


@pytest.fixture
def kept(table):
    preserved = pb.PreservedCopy(id=R1, volume="db1", node="b", cp=sample.cp("4-11"), live=True, size_bytes=9)
    snapshot = pb.Snapshot(id=R2, volume="vm1", cp=sample.cp("3-39"), copies=[pb.SnapshotCopy(node="b")])
    table["ListPreserved"] = api.ListPreservedResponse(preserved=[preserved])
    table["ListSnapshots"] = lambda request: api.ListSnapshotsResponse(
        snapshots=[snapshot] if request.volume == "vm1" else []
    )
    table["DeleteSnapshot"] = api.DeleteSnapshotResponse(freed_bytes=61 << 20)


def test_lists_of_snapshots(run, kept):
    assert json.loads(run("preserved", "-o", "json")[1])["preserved"][0]["cp"] == "4-11"
    assert json.loads(run("snapshots", "vm1", "-o", "json")[1])["snapshots"][0]["id"] == R2
    assert "resilver export 11111111 --node b --to PATH" in run("preserved")[1]


def test_drop_wants_a_word_without_a_terminal(run, coordinator, kept):
    code, _, err = run("drop", R1, "--node", "b")
    assert code == 2
    assert "--yes" in err
    assert coordinator.answers.requests == [], "nothing was even asked"


def test_drop_takes_shortened_ids(run, coordinator, kept):
    code, out, _ = run("drop", "1111", "2222", "--node", "b", "--yes")
    assert code == 0
    assert [request.id for request in coordinator.answers.of("DeleteSnapshot")] == [R1, R2]
    assert "61.0 MiB" in out


def test_drop_partly_refused(run, table, kept):
    table["DeleteSnapshot"] = lambda request: (
        api.DeleteSnapshotResponse(freed_bytes=5) if request.id == R1 else error_for("PINNED", "it is the tip")
    )
    code, out, err = run("drop", R1, R2, "--node", "b", "--yes")
    assert code == 5
    assert "11111111" in out
    assert err.startswith("PINNED 22222222: it is the tip")
    assert run("drop", R2, "--node", "b", "--yes")[0] == 3


def test_an_id_that_two_things_share_is_refused(run, table, kept):
    table["ListPreserved"] = api.ListPreservedResponse(
        preserved=[pb.PreservedCopy(id=R1, volume="v"), pb.PreservedCopy(id=R1[:-1] + "9", volume="v")]
    )
    code, _, err = run("export", "1111", "--node", "b", "--to", "/x")
    assert code == 2
    assert "could be 2" in err


def test_export_snapshot_and_prune(run, coordinator, table, kept):
    table["ExportSnapshot"] = api.ExportSnapshotResponse(path="/x", size_bytes=9)
    assert run("export", "1111", "--node", "b", "--to", "/x", "--writable")[0] == 0
    request = coordinator.answers.of("ExportSnapshot")[0]
    assert (request.id, request.node, request.path, request.writable) == (R1, "b", "/x", True)
    table["PruneSnapshots"] = api.PruneSnapshotsResponse(
        dropped=[api.PrunedSnapshot(id=R1, node="a", freed_bytes=5)],
        kept=[api.PrunedSnapshot(id=R2, node="a", pinned_by=["base of c"])],
    )
    assert "kept 22222222 on a: base of c" in run("prune", "vm1", "--keep-last", "3")[1]


def test_snapshot(run, table):
    done = pb.Snapshot(id=R1, volume="vm1", cp=sample.cp("3-43"), copies=[pb.SnapshotCopy(node="a")])
    table["CreateSnapshot"] = api.CreateSnapshotResponse(snapshots=[done], refusals=[refused("db1")])
    code, out, err = run("snapshot", "--all", "--note", "before upgrade")
    assert code == 5
    assert out.startswith("vm1 3-43")
    assert err.startswith("PRIMARY_AWAY, NEWEST_COPY_MISSING db1:")
    table["CreateSnapshot"] = api.CreateSnapshotResponse(refusals=[refused("db1")])
    assert run("snapshot", "db1")[0] == 3


# The rest.


def test_pause_and_unpause(run, coordinator, table):
    table["PauseVolume"] = api.PauseVolumeResponse(volumes=[sample.vm1()])
    table["ResumeVolume"] = api.ResumeVolumeResponse(volumes=[sample.vm1()])
    assert run("pause", "vm1", "--reason", "racks", "--for", "2h")[0] == 0
    request = coordinator.answers.of("PauseVolume")[0]
    assert (request.reason, request.pause_duration.seconds) == ("racks", 7200)
    assert run("pause", "vm1")[0] == 2
    assert run("unpause", "--all")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        (["node", "remove", "c"], "RemoveNode"),
        (["replica", "remove", "vm1", "c"], "RemoveReplica"),
        (["volume", "remove", "vm1"], "RemoveVolume"),
        (["store", "adopt"], "AdoptStore"),
    ],
)
def test_administration_wants_a_word(run, coordinator, table, arguments, method):
    table |= {
        "RemoveNode": api.RemoveNodeResponse(),
        "RemoveReplica": api.RemoveReplicaResponse(),
        "RemoveVolume": api.RemoveVolumeResponse(),
        "AdoptStore": api.AdoptStoreResponse(store_id="5e6f", nodes=["a"]),
    }
    assert run(*arguments)[0] == 2
    assert coordinator.answers.of(method) == []
    assert run(*arguments, "--yes")[0] == 0
    assert len(coordinator.answers.of(method)) == 1


def test_store_export(run, table, tmp_path):
    table["ExportStore"] = [api.ExportStoreResponse(chunk=b'{"a"'), api.ExportStoreResponse(chunk=b":1}")]
    path = tmp_path / "store.json"
    assert run("store", "export", "--to", str(path))[0] == 0
    assert path.read_bytes() == b'{"a":1}'
    assert path.stat().st_mode & 0o777 == 0o600
    assert run("store", "export", "--to", str(path))[0] == 2


def test_events(run, coordinator, table):
    found = [pb.Event(sequence=n, type="ELECTED", volume="vm1", create_time=sample.at(0)) for n in (2, 1)]
    table["ListEvents"] = api.ListEventsResponse(events=found)
    assert [one["sequence"] for one in json.loads(run("events", "-o", "json")[1])["events"]] == [1, 2]
    table["WatchEvents"] = [api.WatchEventsResponse(events=[pb.Event(sequence=3, type="RESYNCED")]), 30.0]
    code, out, _ = run("events", "--follow", "--timeout", "1s")
    assert code == 130
    assert "RESYNCED" in out
    assert coordinator.answers.of("WatchEvents")[0].after_sequence == 2


def test_inspect_hands_on_what_the_reader_prints_and_ends_with(tmp_path, capfd):
    code = main(["inspect", str(tmp_path / "nothing")])
    captured = capfd.readouterr()
    assert code != 0
    assert captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run, shell):
    code, out, _ = run("completion", shell)
    assert code == 0
    assert "_RESILVER_COMPLETE" in out


def test_a_reader_that_goes_away_is_no_traceback(coordinator, table):
    many = [pb.Volume(name=f"volume-{n}", state=pb.VOLUME_STATE_HEALTHY) for n in range(3000)]
    table["ListVolumes"] = api.ListVolumesResponse(volumes=many)
    command = [sys.executable, "-m", "resilver.cli.main", "volumes", "--coordinator", coordinator.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.wait(20)
    process.stderr.close()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_help_of_every_verb():
    from resilver.cli.main import SECTIONS

    for verbs in SECTIONS.values():
        for verb in verbs:
            assert main([verb, "--help"]) == 0, verb


def test_the_command_starts_without_heavy_imports():
    program = (
        "import sys; from resilver.cli.main import main; main(['--help']); "
        "print([m for m in ('numpy', 'grpc', 'blake3', 'pyetcd', 'rich') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_verbs_that_ask_a_coordinator_load_no_arrays():
    program = (
        "import sys; from resilver.cli.main import main; main(['status', '--coordinator', '127.0.0.1:1']); "
        "print([m for m in ('numpy', 'blake3', 'pyetcd', 'agent', 'coordinator') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
