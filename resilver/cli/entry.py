"""What the installed command starts with: little enough that Ctrl-C while it loads is as quiet as Ctrl-C later."""

from __future__ import annotations

import os


def main() -> int:
    """Loads the command and runs it; 130 if it is interrupted before it could begin."""
    try:
        from resilver.cli.main import main as run  # noqa: PLC0415 - loading is what may be interrupted

        return run()
    except KeyboardInterrupt:
        os._exit(130)
