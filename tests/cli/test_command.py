"""The command itself: options, errors, which coordinator is asked, what is imported."""

import json
import os
import subprocess
import sys
import time

import pytest

from resilver.cli.main import main
from resilver.errors import error_for
from resilver.v1 import coordinator_pb2 as api
from resilver.v1 import volume_pb2 as pb


def test_globals_stand_before_or_after_the_verb(run, coordinator, table, monkeypatch):
    monkeypatch.setenv("RESILVER_COORDINATOR", "127.0.0.1:1")
    assert run("--coordinator", coordinator.address, "-o", "json", "status")[0] == 0
    assert run("status", "--coordinator", coordinator.address, "-o", "json")[0] == 0
    assert run("status")[0] == 4
    table["RemoveNode"] = api.RemoveNodeResponse()
    assert run("node", "--coordinator", coordinator.address, "remove", "c", "--yes")[0] == 0


def test_no_arguments_show_the_help():
    assert main([]) == 2
    assert main(["node"]) == 2


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


def test_what_is_given_up_here_may_go_on_there(run, table):
    table["PruneSnapshots"] = lambda _: time.sleep(1)  # a coordinator that takes longer than the caller waits
    code, _, err = run("prune", "vm1", "--timeout", "200ms")
    assert code == 4
    assert err.startswith("DEADLINE")
    assert "what was begun may go on: look first" in err


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
