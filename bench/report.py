"""Tables in the terminal, and the same figures as data."""

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

WIDTH_WITHOUT_TERMINAL = 110


@dataclass
class Section:
    """A titled table; the first column names the row."""

    title: str
    columns: list[str]
    caption: str = ""
    rows: list[list[str]] = field(default_factory=list)

    def show(self) -> list[dict[str, str]]:
        """Prints the table and returns its rows."""
        console = Console()
        if not console.is_terminal:
            console.width = WIDTH_WITHOUT_TERMINAL
        table = Table(title=self.title, title_justify="left", caption=self.caption)
        table.caption_justify = "left"
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]
