"""The caps of a node: its file's, an operator's for a while, and what of them survives a restart."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from agent.disk.ioprio import io_class, io_priority, set_io_priority
from agent.limits import Caps
from resilver.config import Limits
from resilver.limits import Cap, LimitChange

STATED = Limits(receive_max_bytes_s=50_000_000)
HOUR = 3600


@dataclass
class Time:
    """A clock that does not jump, and wall time, which may."""

    clock: float = 1000.0
    wall: float = 1_700_000_000.0

    def pass_s(self, seconds: float) -> None:
        self.clock += seconds
        self.wall += seconds


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def made(tmp_path, time):
    return lambda limits=STATED: Caps(
        tmp_path / "limits.json", limits, clock=lambda: time.clock, wall=lambda: time.wall
    )


def test_the_file_counts_where_nothing_was_ordered(made):
    caps = made()
    assert (caps.receive.bytes_s, caps.send.bytes_s) == (50_000_000, 0)
    caps.take_on(Limits(send_max_bytes_s=70_000))
    assert (caps.receive.bytes_s, caps.send.bytes_s) == (0, 70_000)
    assert caps.now().send == Cap(70_000)


def test_an_order_holds_until_its_time_has_come(made, time):
    caps = made()
    said = caps.order(LimitChange(receive_bytes_s=1_000_000, duration_s=HOUR))
    assert said.receive == Cap(1_000_000, round((time.wall + HOUR) * 1000))
    assert said.send == Cap()
    caps.take_on(Limits(receive_max_bytes_s=80_000_000, send_max_bytes_s=90_000))
    assert (caps.receive.bytes_s, caps.send.bytes_s) == (1_000_000, 90_000)
    time.pass_s(HOUR - 1)
    assert caps.now().receive.bytes_s == 1_000_000
    time.pass_s(1)
    assert caps.now().receive == Cap(80_000_000)
    assert caps.receive.bytes_s == 80_000_000


def test_each_side_ends_by_itself_and_both_are_cleared_together(made, time):
    caps = made()
    caps.order(LimitChange(receive_bytes_s=0, duration_s=HOUR))
    caps.order(LimitChange(send_bytes_s=200_000, duration_s=3 * HOUR))
    assert (caps.receive.bytes_s, caps.send.bytes_s) == (0, 200_000)
    time.pass_s(2 * HOUR)
    now = caps.now()
    assert (now.receive.bytes_s, now.send.bytes_s) == (50_000_000, 200_000)
    assert caps.order(LimitChange(clear=True)).send == Cap()


def test_a_restart_goes_on_with_what_is_left(made, time):
    made().order(LimitChange(send_bytes_s=0, receive_bytes_s=300_000, duration_s=HOUR))
    time.pass_s(HOUR - 10)
    time.clock = 5.0  # another boot of the machine
    caps = made(Limits(send_max_bytes_s=90_000))
    assert (caps.receive.bytes_s, caps.send.bytes_s) == (300_000, 0)
    time.wall += 86_400  # somebody sets the clock: what runs already does not care
    assert caps.now().receive.bytes_s == 300_000
    time.pass_s(11)
    assert (caps.now().receive.bytes_s, caps.now().send.bytes_s) == (0, 90_000)
    assert made().now().receive == Cap(50_000_000)


@pytest.mark.parametrize("text", ["", "{", '{"receive": 7}', "[1]", '{"receive": {"bytes_s": "x", "ends_at": 9e99}}'])
def test_what_cannot_be_read_is_no_order(made, tmp_path, text):
    (tmp_path / "limits.json").write_text(text)
    assert made().now().receive == Cap(50_000_000)


def test_what_a_thread_starts_has_its_io_priority():
    seen = {}

    def inner():
        seen["inner"] = io_class()

    def outer():
        set_io_priority("idle")
        seen["outer"] = io_class()
        thread = threading.Thread(target=inner)
        thread.start()
        thread.join(10)

    thread = threading.Thread(target=outer)
    thread.start()
    thread.join(10)
    assert seen == {"outer": 3, "inner": 3}
    with io_priority("idle"):
        assert io_class() == 3
    assert io_class() == 0
