"""A rename of LVM that reports a failure, whatever it has done: the commit is undone or finished by what there is.

LVM itself is in the machine of tests/vm. Here a small program stands where its commands are looked for: it answers
`lvs` from a file of names, and `lvrename` changes that file and fails, in either order. Nothing is active.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agent.backends import lvm_commit
from agent.backends import lvm_keep as keeping
from agent.backends.lvm_place import Place, Ref, load_ref, save_ref
from agent.backends.lvm_state import Journal, Tools, load_journal, save_journal
from agent.disk import lvm
from resilver.errors import Damaged, Refused
from resilver.lineage import NO_CP
from resilver.volume import PreservedCopy

OLD, NEXT, TARGET, MOVED = "old", "next", "target", "vm1.r-0000000a"
PID = "5b0c0000-0000-4000-8000-000000000001"

LVM = f"""#!{sys.executable} -SE
import json, pathlib, sys
names = pathlib.Path(__file__).with_name("names.json")
volumes = json.loads(names.read_text())
verb, words = sys.argv[1], sys.argv[2:]
if verb == "lvs":
    row = dict(
        vg_uuid="g", vg_extent_size="4194304", lv_size="4194304", lv_attr="Vwi---tz--", lv_tags="", thin_id="1",
        origin="", pool_lv="pool", segtype="thin", chunk_size="0", zero="", discards="", lv_when_full="",
    )
    lvs = [dict(row, lv_name=name, lv_uuid=uuid) for name, uuid in volumes.items()]
    print(json.dumps(dict(report=[dict(lv=lvs)])))
elif verb == "lvrename":
    _group, old, new = words
    if new in volumes:
        sys.exit("  Logical Volume already exists in volume group vg")
    fails = pathlib.Path(__file__).with_name(f"fails-{{volumes[old]}}")
    how = fails.read_text() if fails.exists() else ""
    fails.unlink(missing_ok=True)
    if how != "before":
        volumes[new] = volumes.pop(old)
        names.write_text(json.dumps(volumes))
    if how:
        sys.exit("  Failed to suspend logical volume vg/vm1.")
"""


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The names in the group, by UUID; beside it `fails-UUID` says how the next rename of that one fails."""
    program = tmp_path / "bin" / "lvm"
    program.parent.mkdir()
    program.write_text(LVM)
    program.chmod(0o755)
    monkeypatch.setitem(lvm.ENV, "PATH", str(program.parent))
    names = program.with_name("names.json")
    names.write_text(json.dumps({"vm1": OLD, "vm1.r-00000001": NEXT, "vm1.r-00000002": TARGET}))
    return names


@pytest.fixture
def tools(tmp_path: Path, volumes: Path) -> Tools:
    """A commit that has come to its renames: the stage is the target's directory, the old live copy will be kept."""
    place = Place("vm1", Path("vg/vm1"), tmp_path / "records", lambda _name: None)
    made = Tools(place, lambda _name: None, 64, 0)
    layout = place.layout
    layout.stage.mkdir(parents=True)
    layout.snapshot(TARGET).mkdir()
    save_ref(layout.data(TARGET), Ref("vm1.r-00000002", TARGET))
    save_ref(layout.root / "next.json", Ref("vm1.r-00000001", NEXT))
    live = place.surely().live
    assert live is not None
    copy = PreservedCopy(PID, live.path, "", NO_CP, live=True, create_time_ms=1, size_bytes=live.size_bytes)
    keeping.prepare_keep(made, copy, live, MOVED)
    journal = Journal("r1", "", TARGET, True, (), PID, OLD, MOVED, NEXT)
    save_journal(layout, journal)
    return made


def exchange(tools: Tools) -> None:
    view = tools.place.surely()
    following = view.group.of_uuid(NEXT)
    journal = load_journal(tools.layout)
    assert following is not None
    assert journal is not None
    lvm_commit._exchange(tools, journal, view.live, following)


def test_a_rename_that_decided_and_failed_is_finished(tools: Tools, volumes: Path) -> None:
    """The new live copy counts, and the old one, with its own data, is a preserved copy."""
    volumes.with_name(f"fails-{NEXT}").write_text("behind")
    with pytest.raises(Damaged, match="suspend"):
        exchange(tools)
    layout = tools.layout
    assert json.loads(volumes.read_text()) == {"vm1": NEXT, MOVED: OLD, "vm1.r-00000002": TARGET}
    assert load_ref(layout.preserved / PID / "data") == Ref(MOVED, OLD)
    assert load_ref(layout.data(TARGET)) == Ref("vm1.r-00000002", TARGET)
    left = {entry.name for entry in layout.root.iterdir()}
    assert left == {TARGET, "preserved"}, "nothing is left over"


@pytest.mark.parametrize("failed", [(OLD, "before"), (OLD, "behind"), (NEXT, "before")], ids="-".join)
def test_a_rename_that_failed_before_it_decided_is_undone(tools: Tools, volumes: Path, failed: tuple[str, str]) -> None:
    uuid, how = failed
    volumes.with_name(f"fails-{uuid}").write_text(how)
    with pytest.raises(Damaged, match="suspend"):
        exchange(tools)
    assert json.loads(volumes.read_text())["vm1"] == OLD
    check_undone(tools)


def check_undone(tools: Tools) -> None:
    layout = tools.layout
    assert load_ref(layout.tree / "data") == Ref("vm1.r-00000002", TARGET), "the stage is as it was"
    assert load_journal(layout) is None
    assert not layout.snapshot(TARGET).exists()
    assert not list(layout.preserved.iterdir())


def test_a_live_copy_whose_name_was_taken_is_not_forgotten(tools: Tools, volumes: Path) -> None:
    """Somebody makes a volume of that name between the renames: nothing is undone until it is out of the way."""

    def step(name: str) -> None:
        if name == "commit.moved":
            volumes.write_text(json.dumps({**json.loads(volumes.read_text()), "vm1": "stranger"}))

    with pytest.raises(Refused, match=MOVED) as refused:
        exchange(replace(tools, step=step))
    assert refused.value.reason == "TARGET_CHANGED"
    assert load_journal(tools.layout) is not None
    names = json.loads(volumes.read_text())
    stranger = names.pop("vm1")
    volumes.write_text(json.dumps({**names, "theirs": stranger}))
    lvm_commit.settle(tools)
    names = json.loads(volumes.read_text())
    assert (names["vm1"], names["theirs"]) == (OLD, "stranger")
    check_undone(tools)
