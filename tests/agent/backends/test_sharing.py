"""Whether a file system shares extents is found out also where there is no room for trying."""

from __future__ import annotations

import contextlib
import itertools
import os

import pytest

from agent.backends.image_copy import Copier
from agent.backends.image_layout import Layout
from tests.loopfs import PLAIN_XFS, fill, mounted, needs_root


def fill_up(directory):
    """Takes every block and every inode; the file that holds most."""
    filler = fill(directory)
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (directory / f"{number}").touch()
    with pytest.raises(OSError, match="No space"):
        os.close(os.open(directory, os.O_RDWR | os.O_TMPFILE))
    return filler


@needs_root
@pytest.mark.parametrize(("kind", "shares"), [("xfs", True), (PLAIN_XFS, False)])
def test_a_full_file_system(kind, shares):
    with mounted(kind, 320 << 20) as point:
        copier = Copier(Layout("vm1", point / "vm1.img", point / ".resilver" / "vm1"))
        filler = fill_up(point)
        assert copier.reflink is shares
        filler.unlink()
        assert copier.reflink is shares, "it is kept, and is right"
        again = Copier(Layout("vm1", point / "vm1.img", point / ".resilver" / "vm1"))
        assert again.reflink is shares, "as is found by trying"
