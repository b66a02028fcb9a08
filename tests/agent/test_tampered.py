"""Files of the agent that somebody else has changed: refused by name, and nothing is changed by looking.

Each kind of file is made by the agent's own code, then flipped bit by bit, cut short, blown up, replaced by a symbolic
link, or put in another's place.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace

import pytest

from agent.backends import image_layout, mandate
from agent.backends.image_layout import Layout, Stored
from agent.delta import DeltaMap, DeltaRange
from agent.disk import durable
from agent.disk.durable import read_json, sealed, write_json
from agent.identity import Identity, Remembered
from agent.peers import Source
from agent.runfile import RunOrder, SavedRun, run_to_json
from agent.runs import Runs
from agent.stream.journal import JOURNAL_FILE, MAP_FILE, Journal
from agent.stream.mapfile import JournalKey
from agent.tickets import Ticket, Tickets
from resilver.errors import Damaged
from resilver.lineage import ConsistencyPoint, Snapshot
from resilver.volume import Grant, Order, PreservedCopy, Progress, ResyncState, VolumeRecord

CP = ConsistencyPoint(3, 42)
SNAPSHOT = Snapshot("s1", CP, "s0", epoch_id="e3", create_time_ms=1_795_400_000_000, size_bytes=4096)
TICKET = Ticket("secret", "r1", "vm1", "b", "s0", "s1", 3600)


def layout_at(directory, volume="vm1"):
    (directory / volume).mkdir(parents=True, exist_ok=True)
    return Layout(volume, directory / f"{volume}.img", directory / volume)


def make(directory, volume="vm1"):
    """A volume's snapshot directory and a state_dir, with one file of each kind."""
    layout = layout_at(directory, volume)
    snapshot = layout.snapshot("s1")
    snapshot.mkdir()
    (snapshot / "data").write_bytes(bytes(4096))
    image_layout.save_stored(snapshot, Stored(SNAPSHOT, f"id-of-{volume}"))
    mandate.save_record(layout, VolumeRecord(volume, f"id-of-{volume}", 3, "e3", "a", ("a", "b"), CP, "s1"))
    mandate.save_grant(layout, Grant(f"id-of-{volume}", 3, "e3"))
    (layout.preserved / "p1").mkdir(parents=True)
    copy = PreservedCopy("p1", "", "s0", CP, True, 1, 4096)
    image_layout.save_preserved(layout.preserved / "p1", copy)
    image_layout.append_records(layout, [replace(SNAPSHOT, id="s0", parent="")], image_layout.load_state(layout))
    identity = Identity(directory / "state", "prod", "a")
    identity.meet("store1", 7, "leader1")
    identity.remember(volume, Remembered("fs1", "s1", f"id-of-{volume}"))
    identity.close()
    Tickets(directory / "state" / "tickets.json").keep(TICKET)
    return layout


def identity_of(directory):
    found = Identity(directory / "state", "prod", "a")
    found.close()
    return found


def remembered_in(directory):
    identity = Identity(directory / "state", "prod", "a")
    try:
        return identity.remembered("vm1")
    finally:
        identity.close()


READERS = {
    "vm1/s1/record.json": lambda at: image_layout.load_state(layout_at(at)),
    "vm1/ancestry.jsonl": lambda at: image_layout.load_state(layout_at(at)),
    "vm1/volume.json": lambda at: mandate.load_record(layout_at(at)),
    "vm1/grant.json": lambda at: mandate.load_grant(layout_at(at)),
    "vm1/preserved/p1/preserved.json": lambda at: image_layout.list_preserved(layout_at(at)),
    "state/identity.json": identity_of,
    "state/volumes/vm1.json": remembered_in,
    "state/tickets.json": lambda at: Tickets(at / "state" / "tickets.json"),
}


def contents(directory):
    """Everything below it, but the lock's pid."""
    return {
        str(path): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if (path.is_file() or path.is_symlink()) and path.name != "lock"
    }


def refused(directory, name):
    """Reads it: refused, with its path, and nothing is different afterwards."""
    before = contents(directory)
    with pytest.raises(Damaged) as caught:
        READERS[name](directory)
    assert str(directory / name) in caught.value.message
    assert caught.value.reason == "IO_ERROR"
    assert contents(directory) == before


@pytest.mark.parametrize("name", READERS)
def test_what_was_flipped_or_cut_is_refused_by_name(tmp_path, name):
    make(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    READERS[name](tmp_path)
    chance = random.Random(name)
    # A log ends where its last line is torn, which is what a crash leaves: only what is within it is damage.
    end = whole.rstrip(b"\n").rfind(b"\n") if name.endswith("jsonl") else len(whole)
    if name.endswith("jsonl"):
        whole += whole
        end = whole.find(b"\n")
    for _ in range(12):
        at = chance.randrange(end)
        flipped = bytes([whole[at] ^ 1 << chance.randrange(8)])
        if flipped in b" \t\r\n" or whole[at : at + 1] in b" \n":
            continue
        path.write_bytes(whole[:at] + flipped + whole[at + 1 :])
        refused(tmp_path, name)
    if not name.endswith("jsonl"):
        for length in (0, 1, len(whole) // 2, len(whole) - 3):
            path.write_bytes(whole[:length])
            refused(tmp_path, name)
    path.write_bytes(whole)
    READERS[name](tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_what_is_a_link_or_no_file_is_refused_by_name(tmp_path, name):
    make(tmp_path)
    path = tmp_path / name
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    refused(tmp_path, name)
    path.unlink()
    os.mkfifo(path)
    refused(tmp_path, name)
    path.unlink()
    elsewhere.rename(path)
    READERS[name](tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_what_is_too_large_is_refused_unread(tmp_path, name, monkeypatch):
    make(tmp_path)
    path = tmp_path / name
    os.truncate(path, durable.LOG_BYTES_MAX + 1)  # sparse: reading it would be noticed by the memory that it takes
    refused(tmp_path, name)


VALUES = ({}, {"tickets": 3}, {"id": "../../x", "cp": "3-42"}, {"epoch": -1}, {"node": []})
NONE = [
    (name, value)
    for name in READERS
    for value in VALUES
    # A file without tickets has none, and a log is lines.
    if name.endswith(".json") and (name != "state/tickets.json" or "tickets" in value)
]


@pytest.mark.parametrize(("name", "value"), NONE)
def test_a_value_that_is_none_is_refused_though_its_digest_fits(tmp_path, name, value):
    make(tmp_path)
    (tmp_path / name).write_bytes(sealed(value))
    refused(tmp_path, name)


def test_what_belongs_to_another_is_refused(tmp_path):
    mine, theirs = make(tmp_path / "x"), make(tmp_path / "y", "vm2")
    shutil.copy(theirs.root / "volume.json", mine.root / "volume.json")
    refused(tmp_path / "x", "vm1/volume.json")
    shutil.copy(tmp_path / "y/state/volumes/vm2.json", tmp_path / "x/state/volumes/vm1.json")
    refused(tmp_path / "x", "state/volumes/vm1.json")
    shutil.copytree(mine.snapshot("s1"), mine.snapshot("s2"))
    with pytest.raises(Damaged, match=r"s2/record\.json is damaged: it is the record of s1"):
        image_layout.load_state(mine)
    shutil.rmtree(mine.snapshot("s2"))
    shutil.copytree(mine.preserved / "p1", mine.preserved / "p2")
    with pytest.raises(Damaged, match=r"p2/preserved\.json is damaged"):
        image_layout.list_preserved(mine)


def test_a_snapshot_that_is_a_link_is_not_left_out_silently(tmp_path):
    """Without it the tip would be an older one, and an older one is what nobody may be told."""
    layout = make(tmp_path)
    layout.snapshot("s1").rename(tmp_path / "moved")
    layout.snapshot("s1").symlink_to(tmp_path / "moved")
    with pytest.raises(Damaged, match="s1 is a symbolic link"):
        image_layout.load_state(layout)
    layout.root.rename(tmp_path / "root")
    layout.root.symlink_to(tmp_path / "root")
    with pytest.raises(Damaged, match="vm1 is a symbolic link"):
        image_layout.load_state(layout)


def test_directories_of_the_state_dir_are_no_links(tmp_path):
    make(tmp_path)
    (tmp_path / "state" / "volumes").rename(tmp_path / "volumes")
    (tmp_path / "state" / "volumes").symlink_to(tmp_path / "volumes")
    with pytest.raises(Damaged, match="volumes is a symbolic link"):
        Identity(tmp_path / "state", "prod", "a")


def test_nothing_is_written_through_a_link(tmp_path):
    """Also not through what was laid where the new file is made before it gets its name."""
    make(tmp_path)
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "state" / ".tickets.json.tmp").symlink_to(victim)
    with pytest.raises(Damaged, match="tmp is no plain file"):
        Tickets(tmp_path / "state" / "tickets.json").keep(replace(TICKET, resync_id="r2"))
    assert victim.read_bytes() == b"mine"
    assert len(read_json(tmp_path / "state" / "tickets.json")["tickets"]) == 1


def test_a_run_of_another_volume_is_no_run(tmp_path):
    order = Order("prod", "store1", 7, "leader1", "vm2", "id-of-vm2")
    wanted = RunOrder(order, "r1", "", "s1", "t", (Source("a", "h:1", "h:2"),))
    saved = SavedRun(wanted, Progress("r1", "vm2", ResyncState.SUCCEEDED), None, 1)
    runs = Runs(
        tmp_path, {"vm1": None}, None, None, receive_max_count=1, spool_max_bytes=0, on_progress=lambda progress: None
    )
    for volume, count in (("vm2", 0), ("vm1", 1)):
        mine = replace(saved, wanted=replace(wanted, order=replace(order, volume=volume)))
        write_json(tmp_path / "vm1.json", run_to_json(mine))
        runs.resume()
        assert len(runs.progresses()) == count


def test_a_journal_of_another_map_is_begun_anew_and_a_map_that_is_a_link_refused(tmp_path):
    deltas = [DeltaMap.of(1 << 20, [DeltaRange(at, 4096)]) for at in (0, 8192)]
    for name, delta in zip("xy", deltas, strict=True):
        (tmp_path / name).mkdir()
        journal = Journal.open(tmp_path / name, JournalKey.of("s0", "s1", delta), delta)
        journal.append_many([0], [bytes(32)])
        journal.close()
    shutil.copy(tmp_path / "y" / JOURNAL_FILE, tmp_path / "x" / JOURNAL_FILE)
    swapped = Journal.load(tmp_path / "x")
    assert not swapped.done.any()
    swapped.close()
    (tmp_path / "y" / MAP_FILE).rename(tmp_path / "map")
    (tmp_path / "y" / MAP_FILE).symlink_to(tmp_path / "map")
    with pytest.raises(Damaged, match="is no plain file"):
        Journal.load(tmp_path / "y")
