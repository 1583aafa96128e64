"""Rows of values: a table on a terminal that is wide enough, records on one that is not, tab-separated in a pipe."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cli.text import shown

MOST_CHARS = 1000
"""Of a value on a terminal; in a pipe nothing is cut off."""
_ANY_WIDTH = 10**6

Row = Sequence[object]


def show(
    out: Console,
    names: Sequence[str],
    rows: Iterable[Row],
    *,
    title: str = "",
    right: Collection[str] = (),
    light: bool = False,
) -> None:
    """Print rows of values, None as nothing; columns in `right` are aligned to the right, a `light` table has no lines.

    In a pipe each row is a line, with the names first: see `line`.
    """
    if title:
        out.print(shown(title), style="italic")
    if not out.file.isatty():
        out.file.write("".join(f"{line(row)}\n" for row in (names, *rows)))
        return
    cells = [[_cell(value) for value in row] for row in rows]
    table = _table(names, cells, right, light)
    if Measurement.get(out, out.options.update(max_width=_ANY_WIDTH), table).maximum <= out.width:
        out.print(table)
    else:
        _records(out, names, cells)


def line(row: Row) -> str:
    r"""One row for programs: tab-separated, whole, with \\, \t, \n and Python's escapes for what cannot be printed."""
    return "\t".join(_escaped("" if value is None else str(value)) for value in row)


def _escaped(text: str) -> str:
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text)


def _cell(value: object) -> str:
    return "" if value is None else shown(value, MOST_CHARS)


def _table(names: Sequence[str], cells: Sequence[Sequence[str]], right: Collection[str], light: bool) -> Table:
    table = Table(box=None, pad_edge=False) if light else Table()
    for name in names:
        table.add_column(Text(shown(name)), justify="right" if name in right else "left", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _records(out: Console, names: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    for number, row in enumerate(cells):
        if number:
            out.print()
        for name, cell in zip(names, row, strict=True):
            out.print(Text.assemble((f"{shown(name)}:", "bold"), f" {cell}" if cell else ""))
