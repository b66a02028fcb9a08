"""What all screens share: tables without boxes, indented lines, problems with their next command.

A table of thousands of rows is drawn here and not by rich, which takes a millisecond for each: the same text, line by
line, and never broken to fit the screen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Group
from rich.control import strip_control_codes
from rich.measure import Measurement
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from resilver.cli.output import next_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult


LONG_ROWS = 200
"""From here on a table is drawn line by line."""
GAP = 2


class Rows(Table):
    """A table of one-line cells, each a string or a Text, two spaces apart."""

    def __init__(self, *, show_header: bool = True, long_rows: int = LONG_ROWS) -> None:
        super().__init__(
            box=None,
            pad_edge=False,
            padding=(0, GAP, 0, 0),
            header_style="bold",
            show_edge=False,
            show_header=show_header,
        )
        self._long_rows = long_rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if len(self.rows) >= self._long_rows:
            yield from self._drawn(console)
        else:
            yield from super().__rich_console__(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        if len(self.rows) < self._long_rows:
            return super().__rich_measure__(console, options)
        width = sum(self._widths()) + GAP * (len(self.columns) - 1)
        return Measurement(width, width)

    def _widths(self) -> list[int]:
        heads = [cell_len(_plain(column.header)) if self.show_header else 0 for column in self.columns]
        return [
            max(head, column.min_width or 0, *(cell_len(_plain(cell)) for cell in column.cells))
            for head, column in zip(heads, self.columns, strict=True)
        ]

    def _drawn(self, console: Console) -> Iterator[Segment]:
        widths = self._widths()
        lines = zip(*(column.cells for column in self.columns), strict=True)
        rights = [column.justify == "right" for column in self.columns]
        if self.show_header:
            heads = [Text(_plain(column.header), style="bold") for column in self.columns]
            yield from _line(console, heads, widths, rights)
        for cells in lines:
            yield from _line(console, cells, widths, rights)


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else strip_control_codes(str(cell))


def _line(
    console: Console, cells: Sequence[RenderableType], widths: Sequence[int], rights: Sequence[bool]
) -> Iterator[Segment]:
    """What has no style of its own goes together: a segment costs more than what is in it."""
    plain = ""
    for at, (cell, width, right) in enumerate(zip(cells, widths, rights, strict=True)):
        text = _plain(cell).replace("\n", " ")
        gap = " " * (width - cell_len(text))
        plain += gap if right else ""
        if isinstance(cell, Text) and (cell.style or cell.spans):
            if plain:
                yield Segment(plain)
            plain = ""
            own = console.get_style(cell.style)
            yield from (Segment(part.text.replace("\n", " "), part.style or own) for part in cell.render(console))
        else:
            plain += text
        plain += ("" if right else gap) + (" " * GAP if at < len(widths) - 1 else "")
    yield Segment(plain + "\n")


def table(*columns: str, wrap: Iterable[str] = (), right: Iterable[str] = (), indent: int = 0) -> Table:
    """A table of left-aligned columns, two spaces apart; only the columns in `wrap` break their lines."""
    grid = Rows()
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


class Noted:
    """A table, indented, with notes beneath some of its rows; the cells of its first column are never empty."""

    def __init__(self, grid: Table, notes: Sequence[Sequence[RenderableType]], by: int = 2) -> None:
        self.grid = grid
        self.notes = notes
        self.by = by

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if len(self.notes) >= LONG_ROWS or not any(self.notes):
            yield indented(self.grid, self.by)
            yield from (note for notes in self.notes for note in notes)
            return
        row = -1  # 0 is the head
        for line in console.render_lines(self.grid, options.update(width=options.max_width - self.by), pad=False):
            if not "".join(part.text for part in line).startswith(" "):
                # A row begins, so the one above it has ended; what is broken goes on beneath an empty first cell.
                yield from self.notes[row - 1] if row > 0 else ()
                row += 1
            yield Segment(" " * self.by)
            yield from line
            yield Segment.line()
        yield from self.notes[row - 1] if row > 0 else ()


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
        wide = Rows(show_header=False)
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
