"""Processes that are killed in the middle: of the target, and of the source."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent.stream.readback import verify
from tests.agent.stream.child import delta_of
from tests.agent.stream.support import (
    MIB,
    FileReader,
    FileStage,
    Proxy,
    Transfer,
    at,
    open_journal,
    random_file,
    same,
    serving,
    until,
)

ROOT = Path(__file__).parents[3]
AGAIN_BYTES_MAX = 16 * MIB


@contextlib.contextmanager
def child(*args):
    command = [sys.executable, "-m", "tests.agent.stream.child", *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process):
    return (json.loads(line) for line in process.stdout)


@pytest.mark.parametrize("kind", ["sequential", "scattered"])
def test_a_killed_target_goes_on_and_fetches_little_again(tmp_path, kind):
    size = 96 * MIB
    image = random_file(tmp_path / "source", size)
    delta = delta_of(kind, size)
    held, gate = size * 2 // 3, threading.Event()

    def before_read(offset):
        if offset >= held:
            gate.wait(60)

    stage = tmp_path / "stage"
    with serving(image, lambda path: FileReader(path, before_read)) as server:
        with child("receive", stage, size, kind, server.port) as first:
            lines = told(first)
            assert next(lines) == {"journaled": 0}
            reached = next(line for line in lines if line["done"] >= delta.data_bytes // 2)
            first.kill()
        gate.set()
        with child("receive", stage, size, kind, server.port) as second:
            lines = list(told(second))
    assert lines[-1] == {"complete": 1, "mib": size // MIB}
    assert lines[0]["journaled"] >= reached["done"] - AGAIN_BYTES_MAX // 2
    assert reached["wire"] + lines[-2]["wire"] <= 1.03 * delta.data_bytes + AGAIN_BYTES_MAX
    resumed = FileStage(stage, size)
    assert verify(resumed, delta, open_journal(resumed, delta)) == delta.data_bytes
    assert same(image, stage, delta)


def test_a_killed_source_is_followed_by_another(tmp_path):
    size = 48 * MIB
    image = random_file(tmp_path / "source", size)
    delta = delta_of("sequential", size)
    transfer = Transfer(FileStage(tmp_path / "stage", size), delta)
    with child("serve", image) as first, serving(image) as second:
        port = next(told(first))["port"]
        write = transfer.stage.write

        def killing_write(offset, data):
            if transfer.stage.writes == 16:
                first.kill()
                first.wait()
            write(offset, data)

        transfer.stage.write = killing_write
        received = transfer.run(at(port, "a"), at(second.port, "b"))
    shares = {share.node: share.wire_bytes for share in received.counters.sources}
    assert shares["a"] > 0
    assert shares["b"] > 0
    assert transfer.stage.writes == size // MIB
    assert [(problem.node, problem.reason) for problem in received.problems] == [("a", "NODE_UNREACHABLE")]
    assert received.counters.resent_bytes == 0
    assert transfer.stage.path.read_bytes() == image.read_bytes()


def test_the_only_source_is_waited_for(tmp_path):
    size = 24 * MIB
    image = random_file(tmp_path / "source", size)
    delta = delta_of("scattered", size)
    transfer = Transfer(FileStage(tmp_path / "stage", size), delta)
    with serving(image) as server:
        port = server.port
    finished = []
    run = threading.Thread(target=lambda: finished.append(transfer.run(at(port))))
    run.start()
    until(lambda: bool(transfer.seen))
    with child("serve", image) as other, Proxy(next(told(other))["port"], port=port):
        # The relay on the port that was given stands for the source's return.
        run.join(30)
    assert finished
    assert finished[0].problems[0].reason == "NODE_UNREACHABLE"
    assert same(image, transfer.stage.path, delta)
