"""Tickets: whom a source serves, for how long, and what survives its restart."""

from __future__ import annotations

import pytest

from agent import tickets as module
from agent.tickets import Ticket, Tickets
from resilver.errors import Exhausted, Unauthenticated


class Clock:
    """Two clocks moved by hand."""

    def __init__(self):
        self.now = 100.0
        self.wall = 1_000_000.0

    def move(self, seconds):
        self.now += seconds
        self.wall += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tickets(tmp_path, clock):
    return opened(tmp_path, clock)


def opened(tmp_path, clock):
    return Tickets(tmp_path / "tickets.json", clock=lambda: clock.now, wall=lambda: clock.wall)


GOOD = Ticket("secret", "r1", "vm1", "b", "s1", "s2", lifetime_s=100)
SHOWN = {"secret": "secret", "resync_id": "r1", "volume": "vm1", "target": "s2", "target_node": "b"}


def test_a_ticket_serves_any_number_of_times(tickets):
    tickets.keep(GOOD)
    for _ in range(3):
        assert tickets.check(**SHOWN).target == "s2"


@pytest.mark.parametrize("change", [{key: "other"} for key in SHOWN])
def test_every_part_of_a_ticket_counts(tickets, change):
    tickets.keep(GOOD)
    with pytest.raises(Unauthenticated) as caught:
        tickets.check(**(SHOWN | change))
    assert caught.value.reason == "TICKET_INVALID"


def test_digests_may_be_asked_of_its_two_snapshots_alone(tickets):
    tickets.keep(GOOD)
    asked = {"secret": "secret", "resync_id": "r1", "volume": "vm1", "target_node": "b"}
    assert tickets.check(snapshot="s1", **asked)
    assert tickets.check(snapshot="s2", **asked)
    for bad in ({"snapshot": "s3"}, {"snapshot": "s1", "secret": "x"}, {"snapshot": "s1", "resync_id": "r2"}):
        with pytest.raises(Unauthenticated):
            tickets.check(**(asked | bad))
    with pytest.raises(Unauthenticated):
        tickets.check(**asked)


def test_it_ends_after_its_lifetime_unless_traffic_renews_it(tickets, clock):
    tickets.keep(GOOD)
    for _ in range(4):
        clock.move(90)
        tickets.renew("r1", "b")
    tickets.check(**SHOWN)
    assert tickets.pinned("vm1") == {"s1", "s2"}
    clock.move(101)
    with pytest.raises(Unauthenticated):
        tickets.check(**SHOWN)
    assert tickets.pinned("vm1") == frozenset()


def test_it_pins_its_snapshots_while_it_is_shown(tickets, clock):
    tickets.keep(Ticket("secret", "r1", "vm1", "b", "s1", "s2", lifetime_s=3600))
    clock.move(module.PINNED_S - 1)
    assert tickets.pinned("vm1") == {"s1", "s2"}
    assert tickets.pinned("vm2") == frozenset()
    clock.move(2)
    assert tickets.pinned("vm1") == frozenset(), "nobody has shown it for long"
    tickets.check(**SHOWN)
    assert tickets.pinned("vm1") == {"s1", "s2"}


def test_a_restart_keeps_it_and_its_age(tmp_path, tickets, clock):
    tickets.keep(GOOD)
    clock.move(60)
    again = opened(tmp_path, clock)
    again.check(**SHOWN)
    clock.move(200)
    assert opened(tmp_path, clock).live() == ()


def test_one_that_was_renewed_for_long_survives_a_restart(tmp_path, tickets, clock):
    tickets.keep(GOOD)
    for _ in range(50):
        clock.move(20)
        tickets.renew("r1", "b")
    opened(tmp_path, clock).check(**SHOWN)


def test_a_clock_set_forward_or_back_gives_no_endless_life(tmp_path, tickets, clock):
    tickets.keep(GOOD)
    clock.wall -= 10_000
    again = opened(tmp_path, clock)
    clock.move(101)
    assert again.live() == ()


def test_a_second_preparation_replaces_the_first(tickets):
    tickets.keep(GOOD)
    tickets.keep(Ticket("new", "r1", "vm1", "b", "", "s2", lifetime_s=100))
    with pytest.raises(Unauthenticated):
        tickets.check(**SHOWN)
    assert tickets.check(**(SHOWN | {"secret": "new"})).base == ""
    assert tickets.pinned("vm1") == {"s2"}


def test_dropping_a_resync_ends_all_its_tickets(tmp_path, tickets, clock):
    tickets.keep(GOOD)
    tickets.keep(Ticket("c", "r1", "vm1", "c", "s1", "s2", lifetime_s=100))
    assert tickets.drop("r1")
    assert not tickets.drop("r1")
    assert tickets.live() == opened(tmp_path, clock).live() == ()


def test_their_number_and_lifetime_are_bounded(tickets, monkeypatch):
    monkeypatch.setattr(module, "TICKETS_MAX", 2)
    tickets.keep(Ticket("1", "r1", "vm1", "b", "", "s", lifetime_s=0))
    tickets.keep(Ticket("2", "r2", "vm1", "b", "", "s", lifetime_s=10**9))
    with pytest.raises(Exhausted):
        tickets.keep(Ticket("3", "r3", "vm1", "b", "", "s", lifetime_s=60))
    assert sorted(ticket.lifetime_s for ticket in tickets.live()) == [
        module.LIFETIME_S_DEFAULT, module.LIFETIME_S_MAX
    ]  # fmt: skip
