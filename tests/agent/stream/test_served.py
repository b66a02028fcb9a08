"""What a source has opened for a client is closed, also where it never comes to serving it."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from agent.disk.reader import FileReader
from agent.stream import frame as frames
from agent.stream import throttle as throttling
from agent.stream.connection import ServedSnapshot, ServedStream
from agent.stream.frame import StreamWish
from agent.stream.sender import BlockServer
from resilver.address import Address
from tests.agent.stream.cats import CatStream, nothing
from tests.agent.stream.support import HELLO, MIB, random_file
from tests.agent.stream.test_server import Client


@pytest.mark.parametrize("failing", ["option", "thread"])
@pytest.mark.parametrize("stream", [False, True], ids=["blocks", "stream"])
def test_what_is_served_is_closed_whatever_fails_before_the_first_byte(tmp_path, monkeypatch, failing, stream):
    """A socket that takes no option, and a machine that has no thread more."""
    start, served, image = threading.Thread.start, [], random_file(tmp_path / "image", MIB)

    def refuse(thread):
        if thread.name.startswith(("stream-read-", "stream-announce-")):
            raise RuntimeError("can't start new thread")
        start(thread)

    def check(_hello):
        if stream:
            served.append(CatStream(image, "cat-1", nothing))
            return ServedStream(served[-1])
        served.append(FileReader(image))
        return ServedSnapshot(served[-1])

    if failing == "thread":
        monkeypatch.setattr(threading.Thread, "start", refuse)
    # More than an int: what the kernel's call cannot be given fails like what it does not take.
    throttle = throttling.Throttle(1_000_000)
    if failing == "option":
        monkeypatch.setattr(throttling, "BUFFER_BYTES_MIN", 1 << 40)
    server = BlockServer(Address("127.0.0.1", 0), check, throttle=throttle)
    server.start()
    hello = dataclasses.replace(HELLO, stream=StreamWish(("cat-1",))) if stream else HELLO
    with Client(server.port) as client:
        assert client.say(frames.encode_hello(hello)).refusal() == "INTERNAL"
    assert server.stop(5)
    (one,) = served
    if stream:
        assert one._cat.returncode is not None, "the process has ended, and is reaped"
    else:
        assert one._fd == -1
