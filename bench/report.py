"""Tables in the terminal, and the same figures as data."""

from dataclasses import dataclass, field

from metal_flash_attn._bench.tables import Cell, Table


@dataclass
class Section:
    """A titled table; the first column names the row."""

    title: str
    columns: list[str]
    caption: str = ""
    rows: list[list[str]] = field(default_factory=list)

    def show(self) -> list[dict[str, str]]:
        """Prints the table, if there is anything in it, and returns its rows."""
        if not self.rows:
            return []
        rows = [[[Cell(text) for text in row]] for row in self.rows]
        Table(self.title, self.columns, self.caption, rows).show()
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]
