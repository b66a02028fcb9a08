"""What one volume has to say to an order, as tables."""

from __future__ import annotations

import pytest

from agent.rights import check_epoch, check_grant, check_tip, check_volume, merge_record
from resilver.errors import ResilverError
from resilver.lineage import ConsistencyPoint, Lineage, Snapshot
from resilver.volume import Grant, Order, Presence, ReplicaReport, VolumeRecord


def order(epoch=3, epoch_id="e3", volume_id="V", tip=None):
    return Order("prod", "S", 1, "L", "vm1", volume_id, epoch, epoch_id, tip)


def report(presence=Presence.PRESENT, volume_id="V", tip=""):
    lineage = Lineage((Snapshot(tip),)) if tip else Lineage()
    return ReplicaReport("vm1", presence, volume_id=volume_id, lineage=lineage)


def reason_of(check, *args, **kwargs):
    try:
        check(*args, **kwargs)
    except ResilverError as error:
        return error.reason
    return ""


@pytest.mark.parametrize(
    ("found", "replaces", "reason"),
    [
        (report(), False, ""),
        (report(volume_id=""), False, ""),
        (report(Presence.EMPTY, ""), False, ""),
        (report(volume_id="W"), False, "REPLICA_FOREIGN"),
        (report(volume_id="W"), True, ""),
        (report(Presence.LOST, "V"), False, "REPLICA_LOST"),
        (report(Presence.LOST, "V"), True, ""),
    ],
)
def test_lost_and_foreign_data_is_not_touched_unless_named(found, replaces, reason):
    assert reason_of(check_volume, order(), found, replaces=replaces) == reason


@pytest.mark.parametrize(
    ("found", "replaces_lost", "reason"),
    [
        (report(Presence.LOST, "V"), False, "REPLICA_LOST"),
        (report(Presence.LOST, "V"), True, ""),
        (report(volume_id="W"), False, ""),
    ],
)
def test_lost_data_is_replaced_only_if_it_was_lost_when_that_was_ordered(found, replaces_lost, reason):
    assert reason_of(check_volume, order(), found, replaces=True, replaces_lost=replaces_lost) == reason


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        (None, ""),
        (VolumeRecord("vm1", "V", 2, "e2"), ""),
        (VolumeRecord("vm1", "V", 3, "e3"), ""),
        (VolumeRecord("vm1", "V", 3, "other"), "EPOCH_CONFLICT"),
        (VolumeRecord("vm1", "V", 4, "e4"), "STALE_EPOCH"),
        (VolumeRecord("vm1", "W", 9, "e9"), ""),
    ],
)
def test_an_epoch_that_is_over_or_opened_twice_is_refused(known, reason):
    assert reason_of(check_epoch, order(), known) == reason


@pytest.mark.parametrize(
    ("grant", "reason"),
    [
        (None, "PRIMARY_UNCLEAR"),
        (Grant("V", 2, "e2"), "PRIMARY_UNCLEAR"),
        (Grant("V", 3, "e3"), ""),
        (Grant("V", 3, "other"), "EPOCH_CONFLICT"),
        (Grant("V", 4, "e4"), "STALE_EPOCH"),
        (Grant("W", 3, "e3"), "REPLICA_FOREIGN"),
    ],
)
def test_a_point_is_taken_under_the_grant_of_its_own_epoch(grant, reason):
    assert reason_of(check_grant, order(), grant, "a") == reason


@pytest.mark.parametrize(
    ("expected", "found", "reason"),
    [
        (None, "s1", ""),
        ("s1", "s1", ""),
        ("", "", ""),
        ("s1", "s2", "TARGET_CHANGED"),
        ("", "s1", "TARGET_CHANGED"),
        ("s1", "", "TARGET_CHANGED"),
    ],
)
def test_the_tip_is_compared(expected, found, reason):
    assert reason_of(check_tip, order(tip=expected), report(tip=found).lineage) == reason


def told(epoch, epoch_id, sequence=0, volume_id="V"):
    cp = ConsistencyPoint(epoch, sequence)
    return VolumeRecord("vm1", volume_id, epoch, epoch_id, newest_cp=cp, newest_id=f"s{sequence}")


@pytest.mark.parametrize(
    ("known", "new", "found", "newest", "reason"),
    [
        (None, told(3, "e3", 5), report(), "s5", ""),
        (told(2, "e2", 9), told(3, "e3", 5), report(), "s5", ""),
        (told(3, "e3", 5), told(3, "e3", 6), report(), "s6", ""),
        (told(3, "e3", 6), told(3, "e3", 5), report(), "s6", ""),
        (told(3, "e3", 5), told(2, "e2", 9), report(), "", "STALE_EPOCH"),
        (told(3, "e3", 5), told(3, "other", 5), report(), "", "EPOCH_CONFLICT"),
        (told(3, "e3", 5), told(9, "e9", volume_id="W"), report(), "", "REPLICA_FOREIGN"),
        (told(9, "e9", 5), told(1, "e1", 1, "W"), report(Presence.EMPTY, ""), "s1", ""),
    ],
)
def test_the_higher_epoch_and_then_the_newer_point_is_kept(known, new, found, newest, reason):
    assert reason_of(merge_record, known, new, found) == reason
    if not reason:
        assert merge_record(known, new, found).newest_id == newest
