"""What is left of a commit once the live copies have changed places, and the undoing of one that did not come so far.

`settle` does either from the intention alone (`commit.json`): at start, and before anything else is changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from agent.backends import image_keep as keeping
from agent.backends.image_copy import Copier, remove_tree
from agent.backends.image_layout import Journal, Layout, load_journal, load_state, save_journal
from agent.backends.image_stage import discard
from agent.disk.durable import fsync_dir, remove_file
from agent.disk.inuse import Lease
from resilver.errors import Damaged


@dataclass(frozen=True, slots=True)
class Tools:
    """What commits need of their backend."""

    layout: Layout
    copier: Copier
    step: Callable[[str], None]
    preserved_max_count: int
    preserved_max_bytes: int


def forward(tools: Tools, journal: Journal, lease: Lease | None) -> None:
    """What is left once the exchange has happened; each line may be done already. `lease` is on the old live copy."""
    layout = tools.layout
    for gone, pid in journal.keeps:
        if pid:
            keeping.keep_directory(layout, layout.snapshot(gone), pid)
        else:
            remove_tree(layout.snapshot(gone))
    tools.step("commit.kept")
    if journal.live_pid:
        keeping.keep_file(layout, layout.incoming, journal.live_pid)
    elif layout.incoming.exists():
        _put_aside(tools, journal, lease)
    tools.step("commit.live_kept")
    remove_file(layout.commit)
    tools.step("commit.closed")


def _put_aside(tools: Tools, journal: Journal, lease: Lease | None) -> None:
    """An unmodified old live copy becomes the spare, or goes; without the lease it is compared again first."""
    layout = tools.layout
    if journal.spare_of:
        layout.incoming.rename(layout.spare(journal.spare_of))
    elif lease is not None and not lease.broken():
        layout.incoming.unlink()
    else:
        equal = next((layout.preserved / pid for gone, pid in journal.keeps if pid and gone == journal.old_tip), None)
        tip = load_state(layout).known.get(journal.old_tip)
        keeping.let_go(layout, tools.copier, layout.incoming, equal or layout.snapshot(journal.old_tip), tip)
    fsync_dir(layout.root)


def undo(tools: Tools, journal: Journal, lease: Lease | None) -> None:
    """Gives a commit up: the directories are as before, and so is the stage."""
    layout = tools.layout
    save_journal(layout, replace(journal, undoing=True))
    target = layout.snapshot(journal.new_tip)
    if journal.made_target and target.exists() and not layout.tree.exists():
        target.rename(layout.tree)
        fsync_dir(layout.root)
        fsync_dir(layout.stage)
    if lease is not None and not lease.broken() and is_at(lease, layout.incoming):
        remove_tree(layout.incoming)
    else:
        equal = layout.tree if journal.made_target else target
        keeping.let_go(layout, tools.copier, layout.incoming, equal, None)
    for gone, _pid in journal.keeps:
        remove_tree(layout.snapshot(gone) / "preserved.json")
    if journal.live_pid:
        remove_tree(layout.keep(journal.live_pid))
    remove_file(layout.commit)


def is_at(lease: Lease, path: Path) -> bool:
    """Whether the path is still the file under the lease, and not one that somebody put there meanwhile."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(lease.fd))
    except FileNotFoundError:
        return False


def settle(tools: Tools) -> None:
    """Finishes or undoes a commit that was interrupted; nothing if there is none."""
    layout = tools.layout
    journal = load_journal(layout)
    if journal is None:
        return
    if journal.exchanged(layout):
        _check_live_there(layout)
        fsync_dir(layout.live.parent)
        fsync_dir(layout.root)
        forward(tools, journal, None)
        discard(layout)
    else:
        undo(tools, journal, None)


def _check_live_there(layout: Layout) -> None:
    """A commit is only finished where its target is: anything else has been changed by hand."""
    journal = load_journal(layout)
    if journal is not None and not layout.data(journal.new_tip).exists():
        raise Damaged("IO_ERROR", f"{layout.commit} speaks of snapshot {journal.new_tip}, which is not there")
