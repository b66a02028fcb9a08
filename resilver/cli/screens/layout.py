"""What all screens share: tables without boxes, indented lines, problems with their next command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from resilver.cli.output import next_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


def table(*columns: str, wrap: Iterable[str] = (), right: Iterable[str] = (), indent: int = 0) -> Table:
    """A table of left-aligned columns, two spaces apart; only the columns in `wrap` break their lines."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    wrapping, righting = frozenset(wrap), frozenset(right)
    for index, column in enumerate(columns):
        grid.add_column(
            " " * indent + column if index == 0 else column,
            no_wrap=column not in wrapping,
            overflow="fold",
            justify="right" if column in righting else "left",
        )
    return grid


def indented(part: RenderableType, by: int = 2) -> Padding:
    return Padding(part, (0, 0, 0, by), expand=False)


class Unbroken:
    """A line that is never broken, so that a command on it can be copied whole."""

    def __init__(self, line: Text) -> None:
        self.line = line

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width, cell_len(self.line.plain))
        yield from console.render(self.line, options.update(width=width, no_wrap=True, overflow="ignore"))


class Advice:
    """Rows of (where, what, sentence, next command): beside each other where they fit, else in lines of their own."""

    def __init__(self, rows: Sequence[tuple[str, Text, str, str]]) -> None:
        self.rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(3):
            wide.add_column(no_wrap=True)
        for where, what, sentence, command in self.rows:
            head = Text.assemble("  ", (where, "bold"), " ", what)
            wide.add_row(head, sentence, next_line(command) if command else "")
        if console.measure(wide, options=options.update(width=10_000)).maximum <= options.max_width:
            yield wide
            return
        for where, what, sentence, command in self.rows:
            yield Text.assemble("  ", (where, "bold"), " ", what)
            if sentence:
                yield Padding(Text(sentence), (0, 0, 0, 6))
            if command:
                yield Unbroken(Text("      ").append_text(next_line(command)))


class Fitting:
    """The first of several renderings that is not wider than the screen, else the last of them."""

    def __init__(self, layouts: Sequence[RenderableType]) -> None:
        self.layouts = layouts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=10_000)
        for layout in self.layouts:
            if console.measure(layout, options=wide).maximum <= options.max_width:
                yield layout
                return
        yield self.layouts[-1]


def lines(*parts: RenderableType) -> Group:
    return Group(*parts)
