"""Where words go: screens and JSON to stdout, refusals and problems to stderr.

A refusal is printed reason code first, then the sentence, then the next command on a line of its own that starts
with `next: `, unbroken whatever the width, so that it can be copied whole.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import RenderableType

    from resilver.v1 import error_pb2

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_REFUSED: Final = 3
EXIT_PARTLY: Final = 5
EXIT_STOPPED: Final = 130

WIDTH_MAX: Final = 200
"""Wider than this a line is hard to follow; without a terminal this is the width, so that rows stay whole."""


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS", "").isdigit() else WIDTH_MAX
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)
    console.width = min(console.width, WIDTH_MAX)
    return console


class Output:
    """One command's stdout and stderr."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.json = as_json
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)

    def emit(self, document: Mapping[str, Any], *, compact: bool = False) -> None:
        """One JSON document on stdout."""
        indent = None if compact else 2
        sys.stdout.write(json.dumps(document, indent=indent, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def show(self, *parts: RenderableType) -> None:
        for part in parts:
            # Nothing is cut off: what must not be broken, such as a command to copy, may run over the edge.
            self.out.print(part, crop=False)

    def say(self, sentence: str) -> None:
        """A sentence on stdout, except where stdout is JSON."""
        if not self.json:
            self.out.print(sentence, soft_wrap=True)

    def note(self, sentence: str) -> None:
        """A sentence on stderr."""
        self.err.print(sentence, soft_wrap=True)

    def aside(self, sentence: str) -> None:
        """A sentence on stderr for whoever watches, except where JSON is asked for."""
        if not self.json:
            self.note(sentence)

    def refused(self, reasons: Iterable[str], message: str, next_command: str = "", *, where: str = "") -> None:
        """One refusal on stderr."""
        line = Text(", ".join(reasons) or "REFUSED", style="bold red")
        line.append(f" {where}" if where else "", style="bold").append(f": {message}", style="not bold default")
        self.err.print(line, soft_wrap=True)
        if next_command:
            self.err.print(next_line(next_command), soft_wrap=True)

    def refusal(self, refusal: error_pb2.Refusal, *, where: str = "") -> None:
        """A refusal of the API on stderr."""
        self.refused(refusal.reasons, refusal.message, refusal.next_command, where=where)

    def failed(self, reason: str, message: str, next_command: str = "", **details: str) -> None:
        """An error that leaves no result: text, or a JSON object, on stderr."""
        if not self.json:
            self.refused([reason], message, next_command)
            return
        error = {"reason": reason, "message": message, "next_command": next_command or None, "details": details}
        sys.stderr.write(json.dumps({"error": error}, ensure_ascii=False) + "\n")


def next_line(command: str) -> Text:
    return Text("next: ", style="dim").append(command, style="bold not dim")
