"""Tables in the terminal: by rich where it is installed, as plain text otherwise."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

WIDTH_WITHOUT_TERMINAL = 120

GOOD, BAD, FAINT = "green", "red", "dim"


@dataclass(frozen=True)
class Cell:
    """Text, with a style of rich where there are styles."""

    text: str
    style: str = ""


@dataclass
class Table:
    """Groups of rows below a title and above a caption; the first column names the row."""

    title: str
    columns: Sequence[str]
    caption: str = ""
    groups: list[list[list[Cell]]] = field(default_factory=list)

    def show(self, file: TextIO | None = None) -> None:
        """Prints it, to standard output by default."""
        if importlib.util.find_spec("rich") is None:
            self._show_plain(file or sys.stdout)
        else:
            self._show_rich(file or sys.stdout)

    def _show_rich(self, file: TextIO) -> None:
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table as RichTable  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        console = Console(file=file)
        if not console.is_terminal:
            console.width = WIDTH_WITHOUT_TERMINAL
        table = RichTable(
            title=self.title,
            title_justify="left",
            title_style="bold",
            caption=self.caption,
            caption_justify="left",
        )
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
        for group in self.groups:
            for row in group:
                table.add_row(*(Text(cell.text, cell.style) for cell in row))
            if len(group) > 1:
                table.add_section()
        console.print(table)

    def _show_plain(self, file: TextIO) -> None:
        rows = [row for group in self.groups for row in group]
        texts = [list(self.columns), *([cell.text for cell in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        print(self.title, file=file)
        for row in texts:
            name, *others = (
                text.rjust(width) if index else text.ljust(width)
                for index, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            print("  ".join([name, *others]).rstrip(), file=file)
        if self.caption:
            print(self.caption, file=file)
