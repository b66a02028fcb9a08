"""Elections, snapshots and administration: what is asked for, and what wants a word first."""

import io
import json

import pytest

from resilver.cli.main import main
from resilver.cli.session import Session
from resilver.errors import ResilverError, error_for
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import error_pb2
from resilver.v1 import volume_pb2 as pb
from tests.cli import sample


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


def test_what_would_be_lost_of_another_tools_is_counted_in_snapshots(run, table):
    lost = error_pb2.Loss(node="b", from_cp="home.20261120", to_cp="home.20261121", lost_cps=2, unseen_seconds=3)
    refused = pb.Election(volume="home", refusal=error_pb2.Refusal(reasons=["NEWEST_COPY_MISSING"], losses=[lost]))
    table["ElectPrimary"] = api.ElectPrimaryResponse(election=refused)
    assert "b: home.20261120 .. home.20261121 (2 snapshots) and" in run("elect", "home", "--dry-run")[1]


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
    assert "CANDIDATES NOW" in out
    assert "away; its writes after 3-39 would be lost" in out
    table["ListElections"] = api.ListElectionsResponse(elections=[sample.election()])
    assert json.loads(run("history", "vm1", "-o", "json")[1])["history"][0]["winner"] == "b"


def test_history_says_what_left_the_primary_as_it_was(run, table):
    def one(epoch, previous):
        return pb.Election(volume="vm1", epoch_id=epoch, winner="b", previous_primary=previous, rule="r")

    found = [one("e5", "b"), sample.election(refused=True), one("e5", "b"), one("e4", "b"), one("e4", "")]
    table["ListElections"] = api.ListElectionsResponse(elections=found)
    results = [line.split()[1:3] for line in run("history", "vm1")[1].splitlines()]
    said = [words for words in results if "b" in words and words != ["refused", "-"]]
    assert said == [["b", "stays"], ["elected", "b"], ["b", "stays"], ["elected", "b"]]


@pytest.fixture
def kept(table):
    preserved = pb.PreservedCopy(id=sample.R1, volume="db1", node="b", cp=sample.cp("4-11"), live=True, size_bytes=9)
    snapshot = pb.Snapshot(id=sample.R2, volume="vm1", cp=sample.cp("3-39"), copies=[pb.SnapshotCopy(node="b")])
    table["ListPreserved"] = api.ListPreservedResponse(preserved=[preserved])
    table["ListSnapshots"] = lambda request: api.ListSnapshotsResponse(
        snapshots=[snapshot] if request.volume == "vm1" else []
    )
    table["DeleteSnapshot"] = api.DeleteSnapshotResponse(freed_bytes=61 << 20)


def test_lists_of_snapshots(run, kept):
    assert json.loads(run("preserved", "-o", "json")[1])["preserved"][0]["cp"] == "4-11"
    assert json.loads(run("snapshots", "vm1", "-o", "json")[1])["snapshots"][0]["id"] == sample.R2
    assert "resilver export 11111111 --node b --to PATH" in run("preserved")[1]


def test_drop_wants_a_word_without_a_terminal(run, coordinator, kept):
    code, _, err = run("drop", sample.R1, "--node", "b")
    assert code == 2
    assert "--yes" in err
    assert coordinator.answers.requests == [], "nothing was even asked"


def test_drop_takes_shortened_ids(run, coordinator, kept):
    code, out, _ = run("drop", "1111", "2222", "--node", "b", "--yes")
    assert code == 0
    assert [request.id for request in coordinator.answers.of("DeleteSnapshot")] == [sample.R1, sample.R2]
    assert "61.0 MiB" in out


def test_drop_partly_refused(run, table, kept):
    table["DeleteSnapshot"] = lambda request: (
        api.DeleteSnapshotResponse(freed_bytes=5) if request.id == sample.R1 else error_for("PINNED", "it is the tip")
    )
    code, out, err = run("drop", sample.R1, sample.R2, "--node", "b", "--yes")
    assert code == 5
    assert "11111111" in out
    assert err.startswith("PINNED 22222222: it is the tip")
    assert run("drop", sample.R2, "--node", "b", "--yes")[0] == 3


def test_an_id_that_two_things_share_is_refused(run, table, kept):
    table["ListPreserved"] = api.ListPreservedResponse(
        preserved=[pb.PreservedCopy(id=sample.R1, volume="v"), pb.PreservedCopy(id=sample.R1[:-1] + "9", volume="v")]
    )
    code, _, err = run("export", "1111", "--node", "b", "--to", "/x")
    assert code == 2
    assert "could be 2" in err


def test_export_snapshot_and_prune(run, coordinator, table, kept):
    table["ExportSnapshot"] = api.ExportSnapshotResponse(path="/x", size_bytes=9)
    assert run("export", "1111", "--node", "b", "--to", "/x", "--writable")[0] == 0
    request = coordinator.answers.of("ExportSnapshot")[0]
    assert (request.id, request.node, request.path, request.writable) == (sample.R1, "b", "/x", True)
    table["ExportSnapshot"] = api.ExportSnapshotResponse(path="/x")
    assert run("export", "1111", "--node", "b", "--to", "/x")[1] == "b:/x\n", "nobody has counted a subvolume"
    table["PruneSnapshots"] = api.PruneSnapshotsResponse(
        dropped=[api.PrunedSnapshot(id=sample.R1, node="a", freed_bytes=5)],
        kept=[api.PrunedSnapshot(id=sample.R2, node="a", pinned_by=["base of c"])],
    )
    assert "kept 22222222 on a: base of c" in run("prune", "vm1", "--keep-last", "3")[1]


def test_snapshot(run, table):
    done = pb.Snapshot(id=sample.R1, volume="vm1", cp=sample.cp("3-43"), copies=[pb.SnapshotCopy(node="a")])
    table["CreateSnapshot"] = api.CreateSnapshotResponse(snapshots=[done], refusals=[sample.refused("db1")])
    code, out, err = run("snapshot", "--all", "--note", "before upgrade")
    assert code == 5
    assert out.splitlines()[0].split() == ["vm1", "3-43", "11111111", "on", "a"], "nobody has counted a subvolume"
    assert err.startswith("PRIMARY_AWAY, NEWEST_COPY_MISSING db1:")
    table["CreateSnapshot"] = api.CreateSnapshotResponse(refusals=[sample.refused("db1")])
    assert run("snapshot", "db1")[0] == 3
    table["CreateSnapshot"] = api.CreateSnapshotResponse()
    assert run("snapshot", "--all") == (0, "no volumes, so nothing was taken\n", "")


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
    watch = [
        api.WatchEventsResponse(events=[*reversed(found), pb.Event(sequence=3, type="RESYNCED")], up_to_sequence=5)
    ]
    table["WatchEvents"] = watch  # which then ends, as that of a leader does that goes away
    code, out, _ = run("events", "--follow", "--timeout", "4s")
    assert code == 0
    types = [word for word in out.split() if word in ("ELECTED", "RESYNCED")]
    assert types == ["ELECTED", "ELECTED", "RESYNCED"], "each of them once"
    asked = coordinator.answers.of("WatchEvents")
    assert [(one.from_oldest, one.after_sequence) for one in asked[:2]] == [(True, 0), (False, 5)]


class LostHistory(ResilverError):
    """What gRPC itself has a code for."""

    status = "OUT_OF_RANGE"


def test_a_follower_of_a_store_that_was_put_back_shows_what_is_new_and_nothing_twice(run, table):
    old = [pb.Event(sequence=n, type=f"TOLD{n}", create_time=sample.at(n)) for n in (1, 2, 3)]
    new = [pb.Event(sequence=3, type="ANEW3", create_time=sample.at(30)), pb.Event(sequence=4, type="ANEW4")]
    begun = []

    def watch(request):
        if not request.from_oldest:
            return LostHistory("OUT_OF_RANGE", "put back")
        begun.append(request)
        events = old if len(begun) == 1 else [*old[:2], *new]
        return [api.WatchEventsResponse(events=events, up_to_sequence=events[-1].sequence)]

    table["WatchEvents"] = watch
    code, out, err = run("events", "--follow", "--timeout", "4s")
    assert code == 0
    types = [word for word in out.split() if word[:4] in ("TOLD", "ANEW")]
    assert types == ["TOLD1", "TOLD2", "TOLD3", "ANEW3", "ANEW4"]
    assert "some events were lost: put back" in err


def test_inspect_hands_on_what_the_reader_prints_and_ends_with(tmp_path, capfd):
    code = main(["inspect", str(tmp_path / "nothing")])
    captured = capfd.readouterr()
    assert code != 0
    assert captured.err
    assert "Traceback" not in captured.err


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("answer", ["y", "n", ""])
@pytest.mark.parametrize(
    "arguments",
    [["drop", "1111", "--node", "b"], ["elect", "vm1", "--accept-loss", "a"], ["node", "remove", "c"]],
)
def test_a_terminal_is_asked(run, coordinator, monkeypatch, answer, arguments):
    coordinator.answers.table |= {
        "ElectPrimary": api.ElectPrimaryResponse(election=sample.election()),
        "RemoveNode": api.RemoveNodeResponse(),
    }
    monkeypatch.setattr(Session, "on_terminal", True)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{answer}\n"))
    assert run(*arguments)[0] == (0 if answer == "y" else 2)
    changes = [name for name, _ in coordinator.answers.requests if not name.startswith("List")]
    assert len(changes) == (answer == "y")
