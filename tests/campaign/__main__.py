"""`python -m tests.campaign --kills 200 --seed 1`: kills processes of a real cluster, and tells what came of it."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests import namespace
from tests.campaign.kills import GIVE_UP_EVERY, campaign
from tests.loopfs import mounted


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--give-up-every", type=int, default=GIVE_UP_EVERY, metavar="KILLS")
    asked = parser.parse_args()
    namespace.enter()
    begun = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="campaign-") as directory,
        mounted("xfs", 16 << 30) as disk,
        campaign(Path(directory), disk, asked.seed) as one,
    ):
        story = one.run(asked.kills, asked.give_up_every)
    told = {
        "seconds": round(time.monotonic() - begun),
        "kills": dict(story.kills),
        "points acknowledged": len(story.points),
        "given up by name": story.given_up,
        "points preserved": story.preserved,
        "commands and how they ended": dict(sorted(story.commands.items())),
    }
    for name, value in told.items():
        sys.stdout.write(f"{name}: {value}\n")


if __name__ == "__main__":
    main()
