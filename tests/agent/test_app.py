"""`resilver-agent` as a user starts, checks, stops and reloads it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from resilver.v1 import volume_pb2
from tests.agent.agents import MIB, AgentProcess, Leader, agents, until, write_image


@pytest.fixture
def agent(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    write_image(place / "vm1.img", MIB)
    made = AgentProcess("a", tmp_path, place)
    yield made
    made.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    place = tmp_path_factory.mktemp("disk")
    (place / "a").mkdir()
    write_image(place / "a" / "vm1.img", MIB)
    with agents(tmp_path_factory.mktemp("state"), place, "a") as (made,):
        yield made


def ends(agent, *words):
    """Runs the command to its end; its code and what it said. Never a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "agent.app", "--config", str(agent.config), *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def change(agent, old, new):
    text = agent.write_config().read_text()
    assert old in text
    agent.config.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('backend = "image"', 'backend = "tape"', "there is no backend 'tape'"),
        ("[[volumes]]", "[[volumes]]\nsize = 1", "unknown key"),
        ("vm1.img", "", "is a directory"),
        ('"test"', "7", "cluster"),
        ("[space]", "[limits]\nsend_max_bytes_s = 9\n[space]", "limits.send_max_bytes_s: should be 0 (no cap), or"),
        ("include = []", "]", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_a_sentence_and_2(agent, old, new, said):
    change(agent, old, new)
    code, text = ends(agent)
    assert code == 2, text
    assert said in text
    assert not (agent.place / ".resilver").exists()


def test_arguments_and_files_that_are_missing_are_2(agent):
    assert ends(agent)[0] == 2
    done = subprocess.run([sys.executable, "-m", "agent.app"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--config" in done.stderr


@pytest.mark.parametrize("which", ["port", "stream_port", "metrics_port"])
def test_a_port_in_use_is_named_and_2(agent, which):
    agent.write_config()
    with socket.create_server(("127.0.0.1", getattr(agent, which))):
        code, text = ends(agent)
    assert code == 2, text
    assert "choose another address" in text
    assert str(getattr(agent, which)) in text
    assert "in use" in text


def test_a_default_metrics_port_that_is_taken_is_a_warning(agent):
    change(agent, f'metrics_listen = "127.0.0.1:{agent.metrics_port}"\n', "")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", 7403)))
        agent.write_config = lambda: agent.config
        agent.start()
        assert "no metrics are served" in agent.log()


def test_two_agents_cannot_share_a_state_dir(running, tmp_path):
    other = AgentProcess("a", tmp_path, running.place)
    change(other, f"{tmp_path}/state-a", f"{running.directory}/state-a")
    code, text = ends(other)
    assert code == 2
    assert f"in use by the agent with pid {running.process.pid}" in text


def test_check_looks_and_changes_nothing(agent):
    agent.write_config()
    code, text = ends(agent, "--check")
    assert code == 0, text
    for word in ("vm1", "bytes free", "in use:", "snapshot", "never mirrored"):
        assert word in text
    assert not (agent.place / ".resilver").exists()
    assert not (agent.directory / "state-a").exists()
    assert "in use by" not in text
    with (agent.place / "vm1.img").open("r+b"):
        code, text = ends(agent, "--check")
    assert code == 0, text
    assert "note   volume vm1: in use by" in text
    change(agent, "vm1.img", "missing/vm1.img")
    code, text = ends(agent, "--check")
    assert code == 2
    assert "FAULT" in text
    assert "missing is not there" in text


def test_check_looks_at_the_programs_of_hooks(agent):
    program = agent.directory / "freeze"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    agent.volume_extra = f'group = "db"\n[volumes.hooks]\nbefore = ["{program}", "x"]\nafter = ["/no/thaw"]\n'
    agent.write_config()
    code, text = ends(agent, "--check")
    assert code == 2
    assert f"ok     volume vm1: hook before: {program}" in text
    assert "FAULT  volume vm1: hook after: /no/thaw: no such file" in text
    assert "group db: vm1" in text
    program.chmod(0o777)
    change(agent, "/no/thaw", "/bin/true")
    code, text = ends(agent, "--check")
    assert (code, text.count("FAULT")) == (2, 1)
    assert f"{program} can be written to by others" in text
    program.chmod(0o700)
    assert ends(agent, "--check")[0] == 0


def test_sigterm_ends_it_within_five_seconds(agent):
    agent.start()
    begun = time.monotonic()
    agent.process.send(signal.SIGTERM)
    assert agent.process.running.wait(10) == 0
    assert time.monotonic() - begun < 30


def test_a_volume_whose_disk_is_away_does_not_stop_the_others(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    write_image(place / "vm1.img", MIB)
    agent = AgentProcess("a", tmp_path, place, volumes=("vm1", "vm2"))
    change(agent, f"{place}/vm2.img", f"{place}/unmounted/vm2.img")
    agent.write_config = lambda: agent.config
    try:
        agent.start()
        assert agent.examine("vm1").presence == volume_pb2.PRESENCE_PRESENT
        away = agent.examine("vm2")
        assert away.presence == volume_pb2.PRESENCE_EMPTY
        assert "is not there" in away.problems[0]
    finally:
        agent.close()


def test_a_damaged_record_is_a_problem_of_its_replica(agent):
    agent.write_config()
    record = agent.place / ".resilver" / "vm1" / "s1"
    record.mkdir(parents=True)
    (record / "record.json").write_text("{}")
    agent.start()
    found = agent.examine()
    assert found.presence == volume_pb2.PRESENCE_LOST
    assert "is damaged" in found.problems[0]
    assert record.exists()


def test_sighup_takes_all_or_nothing(running):
    config = running.config.read_text()
    changed = config.replace("reserve_min_bytes = 1048576", "reserve_min_bytes = 2097152")
    running.config.write_text(changed.replace('path = "', 'priority = 7\npath = "'))
    running.process.send(signal.SIGHUP)
    until(lambda: running.examine().priority == 7, "the priority is taken on")
    assert running.examine().reserve_bytes == 2 * MIB
    changed = running.config.read_text().replace("priority = 7", "priority = 9").replace('"test"', '"prod"')
    running.config.write_text(changed)
    running.process.send(signal.SIGHUP)
    until(lambda: "not reloaded" in running.log(), "the refusal is logged")
    assert running.examine().priority == 7
    running.config.write_text(config)


def test_health_reflection_and_metrics_are_served(running):
    health = health_pb2_grpc.HealthStub(running.channel)
    for service in ("", "resilver.v1.Agent", "resilver.v1.Peer"):
        assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == 1
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(running.channel).ServerReflectionInfo(iter([asked]))
    assert "resilver.v1.Agent" in {service.name for service in answer.list_services_response.service}

    def metrics():
        with urllib.request.urlopen(f"http://127.0.0.1:{running.metrics_port}/metrics") as page:
            return page.read().decode()

    until(lambda: 'resilver_agent_free_bytes{volume="vm1"}' in metrics(), "the volume has been looked at")
    assert "resilver_agent_coordinator_connected 0.0" in metrics()


def test_an_unknown_volume_suggests_the_nearest(running):
    with pytest.raises(grpc.RpcError) as caught:
        running.channel.unary_unary("/resilver.v1.Agent/ExamineReplica")(b"\n\x03wm1")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "did you mean 'vm1'?" in caught.value.details()


def test_a_second_agent_on_the_same_snapshot_dir_has_no_replica(running, tmp_path):
    """It says whose it is, looks again by itself, and has it once the other one is gone."""
    assert running.examine().presence == volume_pb2.PRESENCE_PRESENT
    (running.place / ".resilver" / "vm1").mkdir(parents=True, exist_ok=True)
    running.open_epoch(Leader())
    second = AgentProcess("b", tmp_path, running.place)
    try:
        second.start()
        report = second.examine()
        assert report.presence == volume_pb2.PRESENCE_LOST
        assert f"whose state_dir is {running.directory}/state-a" in report.problems[0]
        assert running.examine().presence == volume_pb2.PRESENCE_PRESENT
        running.kill()
        assert second.examine().presence == volume_pb2.PRESENCE_PRESENT
    finally:
        second.close()
        running.start()
    assert running.examine().presence == volume_pb2.PRESENCE_PRESENT
