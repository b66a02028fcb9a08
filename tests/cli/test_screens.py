"""The screens as texts, at the widths between which they must fit."""

import io
import json

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from resilver.cli.plainjson import plain
from resilver.cli.screens import election, layout, lists, plan, status
from resilver.v1 import volume_pb2 as pb
from tests.cli import sample


def rendered(part, width):
    console = Console(width=width, file=io.StringIO(), color_system=None, markup=False, highlight=False)
    console.print(part, crop=False)
    return console.file.getvalue()


SCREENS = {
    "status": lambda: status.screen(
        status.Cluster(sample.cluster(), sample.nodes()), [sample.vm1(), sample.db1()], sample.NOW
    ),
    "status_blocked": lambda: status.screen(
        status.Cluster(sample.cluster(), sample.nodes()), [sample.lost()], sample.NOW
    ),
    "status_empty": lambda: status.screen(status.Cluster(sample.cluster(), []), [], sample.NOW),
    "plan": lambda: plan.screen(sample.plan(), "--all"),
    "plan_blocked": lambda: plan.screen(sample.blocked_plan(), "vm1 db1"),
    "plan_adopted": lambda: plan.screen(sample.adopted_plan(), "--all"),
    "status_adopted": lambda: status.screen(
        status.Cluster(sample.cluster(), sample.nodes()), [sample.home()], sample.NOW
    ),
    "elect": lambda: election.screen(sample.election(), dry_run=False),
    "elect_refused": lambda: election.screen(sample.election(refused=True), dry_run=True),
    "history": lambda: lists.history([sample.election(), sample.election(refused=True)]),
    "nodes": lambda: lists.nodes(sample.nodes(), sample.NOW),
    "limits": lambda: lists.limits(sample.nodes()[1], sample.NOW),
    "limits-none": lambda: lists.limits(sample.nodes()[0], sample.NOW),
    "volumes": lambda: lists.volumes([sample.vm1(), sample.db1()], sample.NOW),
    "resyncs": lambda: lists.resyncs(
        [
            sample.resync("11111111-2222-3333-4444-555555555555", "b", "TRANSFERRING", 1 << 20, 3 << 20),
            sample.resync("21111111-2222-3333-4444-555555555555", "c", "BLOCKED", refusal=sample.refusal("IN_USE")),
        ],
        sample.NOW,
    ),
    "preserved": lambda: lists.preserved(
        [
            pb.PreservedCopy(id="31111111-2222-3333-4444-555555555555", volume="db1", node="b", cp=sample.cp("4-11"),
                             live=True, create_time=sample.at(90), size_bytes=sample.GIB, exclusive_bytes=61 << 20,
                             path="/srv/b/.resilver/db1/preserved/31111111"),
            pb.PreservedCopy(id="41111111-2222-3333-4444-555555555555", volume="home", node="b", cp=sample.cp("1-3"),
                             live=True, create_time=sample.at(90), exclusive_bytes=4096,
                             path="/mnt/.resilver/home/preserved/41111111/data"),
        ],
        sample.NOW,
    ),
    "snapshots": lambda: lists.snapshots(
        [
            pb.Snapshot(id="41111111-2222-3333-4444-555555555555", volume="db1", cp=sample.cp("5-18"),
                        create_time=sample.at(3700), size_bytes=sample.GIB, consistency=pb.CONSISTENCY_FROZEN,
                        copies=[pb.SnapshotCopy(node="a", pinned_by=["tip", "newest known CP"]),
                                pb.SnapshotCopy(node="c", pinned_by=["tip"])]),
        ],
        sample.NOW,
    ),
    "snapshots_adopted": lambda: lists.snapshots(
        [
            pb.Snapshot(id="14399263219391923", volume="home", create_time=sample.at(3700), note="autosnap_hourly",
                        origin=pb.ORIGIN_ADOPTED, consistency=pb.CONSISTENCY_CRASH,
                        copies=[pb.SnapshotCopy(node="a", pinned_by=["another tool's"], off_lineage=True)]),
            pb.Snapshot(id="51111111-2222-3333-4444-555555555555", volume="home", cp=sample.cp("1-1"),
                        create_time=sample.at(7300), consistency=pb.CONSISTENCY_SYNCED, origin=pb.ORIGIN_RESILVER,
                        copies=[pb.SnapshotCopy(node="a", pinned_by=["tip", "newest known CP"])]),
            pb.Snapshot(id="883210013918412", volume="home", create_time=sample.at(90000), note=sample.ADOPTED,
                        origin=pb.ORIGIN_ADOPTED, consistency=pb.CONSISTENCY_CRASH,
                        copies=[pb.SnapshotCopy(node="a", pinned_by=["another tool's", "base of b"]),
                                pb.SnapshotCopy(node="b", pinned_by=["another tool's"], off_lineage=True)]),
        ],
        sample.NOW,
    ),
}  # fmt: skip


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", sorted(SCREENS))
def test_screen(name, width, golden):
    text = rendered(SCREENS[name](), width)
    golden(f"{name}.{width}.txt", text)


@pytest.mark.parametrize("width", [80, 100, 120, 160, 200])
@pytest.mark.parametrize("name", sorted(SCREENS))
def test_screen_fits(name, width):
    # A command to copy is the one thing that may be longer than the screen.
    lines = [line for line in rendered(SCREENS[name](), width).splitlines() if "resilver " not in line]
    assert max(cell_len(line.rstrip()) for line in lines) <= width


def test_a_plan_says_what_it_does_not_know_and_what_it_has_done():
    made = sample.plan()
    del made.volumes[1:]
    del made.volumes[0].replicas[1:]
    text = rendered(plan.screen(made, "vm1"), 120)
    assert "1 replica to bring up to date; how many bytes is not known yet." in text
    assert "nothing was changed" in text
    text = rendered(plan.screen(made, "vm1", took_snapshot=True), 120)
    assert "nothing but consistency points was made" in text
    assert "nothing was changed" not in text


def test_a_command_to_copy_is_never_broken():
    lines = rendered(SCREENS["status_blocked"](), 80).splitlines()
    assert f"      next: resilver elect {'long-name' * 7} --accept-loss a" in [line.rstrip() for line in lines]


def test_json_of_the_samples(golden):
    messages = [sample.vm1(), sample.plan(), sample.blocked_plan(), sample.election(refused=True),
                sample.resync("r1", "c", "SUCCEEDED", 5, 5)]  # fmt: skip
    golden("plain.json", json.dumps([plain(message) for message in messages], indent=1))


def test_snapshots_that_were_taken_together_show_their_group():
    alone = pb.Snapshot(id="41111111-2222-3333-4444-555555555555", cp=sample.cp("5-18"))
    pair = pb.Snapshot(
        id="51111111-2222-3333-4444-555555555555", cp=sample.cp("5-19"), group_id="61111111-2222-3333-4444-555555555555"
    )
    assert "GROUP" not in rendered(lists.snapshots([alone], sample.NOW), 120)
    header, first, second = rendered(lists.snapshots([alone, pair], sample.NOW), 120).splitlines()
    at = header.index("GROUP")
    assert first[at:].split()[0] == "-"
    assert second[at:].split()[0] == "61111111"


@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_a_long_table_reads_as_a_short_one_does(colour):
    """The one is drawn here and the other by rich, which takes a millisecond for each row."""
    drawn = []
    for long_rows in (1, 1000):
        rows = layout.Rows(long_rows=long_rows)
        for head in ("WHAT", "ein Maß", "FIGURE"):
            rows.add_column(head, no_wrap=True, justify="right" if head == "FIGURE" else "left")
        rows.columns[1].min_width = 12
        for at in range(12):
            rows.add_row(Text(f"日本{at}", style="bold"), Text.assemble(("a", "red"), f"{at * 7}"), f"{at**3}\a")
        out = io.StringIO()
        console = Console(width=120, file=out, color_system=colour, force_terminal=bool(colour), markup=False)
        assert console.measure(rows).maximum == 6 + 2 + 12 + 2 + 6
        console.print(rows, crop=False, highlight=False)
        text = Text.from_ansi(out.getvalue())
        # How a space is styled cannot be seen.
        drawn.append(
            [(at, char, text.get_style_at_offset(console, at)) for at, char in enumerate(text.plain) if char != " "]
        )
    assert drawn[0] == drawn[1]
