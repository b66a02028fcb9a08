"""Where a snapshot may be exported to: anywhere but among the agent's own files.

What stands in an export is what a guest has written. In `state_dir` it could pass for a ticket, a grant or a hook that
is still to be run, and in a snapshot directory for a record: so neither is ever exported into, by whatever way a path
leads there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from resilver.fields import invalid


def check_outside(path: Path, ours: Iterable[Path]) -> None:
    """Raises Invalid for a path that leads into one of our directories, through links too."""
    parent = Path(os.path.realpath(path.parent))
    for directory in ours:
        real = Path(os.path.realpath(directory))
        if parent == real or real in parent.parents:
            raise invalid("path", f"leads into {directory}, where the agent's own files are: name another place")
