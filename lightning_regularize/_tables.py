"""How do rows become a table, as text and in a notebook?"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from html import escape as escape_html
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    Row = Sequence[str]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: Its title.
        is_right: Whether its cells are aligned to the right, and never broken into lines.
        max_width: Characters of a line of text; None for as many as fit.
    """

    title: str
    is_right: bool = False
    max_width: int | None = None


@dataclass(frozen=True)
class Table:
    """A table with sections and notes: ``print`` shows it as text, and a notebook as HTML.

    Args:
        columns: The columns.
        sections: Rows of cells, one cell for each column.
        title: Stands above it.
        caption: Stands below it.
        notes: Sentences after the table.
        has_heads: Whether the first row of each section is a heading.

    Example:
        >>> print(Table([Column("name"), Column("size", is_right=True)], [[("a", "1"), ("b", "20")]]))
         name  size
         ──────────
         a        1
         b       20
    """

    columns: Sequence[Column]
    sections: Sequence[Sequence[Row]]
    title: str = ""
    caption: str = ""
    notes: Sequence[str] = field(default=())
    has_heads: bool = False

    def print_to(self, console: Console) -> None:
        """Print it, as wide as the console allows."""
        table = RichTable(
            title=self.title or None, caption=self.caption or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.pad_edge = False
        for column in self.columns:
            if column.is_right:
                table.add_column(column.title, justify="right", no_wrap=True)
            else:
                table.add_column(column.title, overflow="fold", max_width=column.max_width)
        for rows in self.sections:
            for i, row in enumerate(rows):
                table.add_row(*map(escape, row), style="bold" if self.has_heads and i == 0 else None)
            table.add_section()
        console.print(table)
        for note in self.notes:
            console.print(f"[bold]Note[/bold] {escape(note)}", highlight=False)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), color_system=None, force_jupyter=False)
        self.print_to(console)
        lines = console.file.getvalue().rstrip().split("\n")  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in lines).lstrip("\n")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        html = ["<table>"]
        if self.title or self.caption:
            html.append(f"<caption>{escape_html(' '.join(filter(None, [self.title, self.caption])))}</caption>")
        html.append(f"<thead>{self._html_row([column.title for column in self.columns], 'th')}</thead>")
        for rows in self.sections:
            cells = [self._html_row(row, "th" if self.has_heads and i == 0 else "td") for i, row in enumerate(rows)]
            html.append(f"<tbody>{''.join(cells)}</tbody>")
        html.append("</table>")
        return "".join([*html, *(f"<p><b>Note</b> {escape_html(note)}</p>" for note in self.notes)])

    def _html_row(self, row: Row, tag: str) -> str:
        cells = ""
        for column, cell in zip(self.columns, row, strict=True):
            side = "right" if column.is_right else "left"
            # Leading blanks of a cell show what it belongs to; HTML would drop them.
            text = "&nbsp;" * (len(cell) - len(cell.lstrip(" "))) + escape_html(cell.strip())
            cells += f'<{tag} style="text-align: {side}">{text}</{tag}>'
        return f"<tr>{cells}</tr>"
