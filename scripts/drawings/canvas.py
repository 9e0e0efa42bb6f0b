"""Boxes, arrows, grids and words as SVG."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

QUERY = "#cfe0f2"
KEY = "#f9dcc4"
VALUE = "#cde8d3"
SCORE = "#e4d7f1"
OUT = "#c9e6e8"
MEMORY = "#eceff1"
MARK = "#f6c6c2"
PAPER = "#ffffff"
INK = "#263238"
FAINT = "#78909c"


class Canvas:
    """One drawing, on white paper so that it can be read on pages of any colour."""

    def __init__(self, width: int, height: int, title: str) -> None:
        """`title` says what is to be seen, for those who cannot see it."""
        self._width, self._height, self._title = width, height, title
        self._parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, *, size: float = 13, anchor: str = "middle",
        bold: bool = False, color: str = INK, halo: bool = False,
    ) -> None:  # fmt: skip
        """Words around `x`, on the line `y`, one line for each of theirs.

        With a halo they can be read where lines pass behind them.
        """
        style = ' font-weight="600"' if bold else ""
        style += f' stroke="{PAPER}" stroke-width="5" paint-order="stroke"' if halo else ""
        for row, line in enumerate(words.split("\n")):
            self._parts.append(
                f'<text x="{x:g}" y="{y + row * size * 1.3:g}" font-size="{size:g}" '
                f'text-anchor="{anchor}" fill="{color}"{style} xml:space="preserve">{escape(line)}</text>'
            )

    def box(
        self, x: float, y: float, width: float, height: float, words: str = "", *,
        fill: str = PAPER, size: float = 13, bold: bool = False, dashed: bool = False,
        color: str = INK,
    ) -> None:  # fmt: skip
        """A box with words in its middle."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
            f'fill="{fill}" stroke="{INK}" stroke-width="1"{dash}/>'
        )
        if words:
            lines = words.count("\n") + 1
            top = y + height / 2 - (lines - 1) * size * 0.65 + size * 0.35
            self.text(x + width / 2, top, words, size=size, bold=bold, color=color)

    def arrow(
        self, x1: float, y1: float, x2: float, y2: float, words: str = "", *, dashed: bool = False
    ) -> None:
        """A line with a head at its end, and words above its middle."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}" '
            f'stroke-width="1.4" marker-end="url(#head)"{dash}/>'
        )
        if words:
            self.text((x1 + x2) / 2, (y1 + y2) / 2 - 6, words, size=11, color=FAINT)

    def grid(
        self, x: float, y: float, columns: int, rows: int, cell: tuple[float, float],
        look: Callable[[int, int], tuple[str, str]], *, size: float = 11,
    ) -> None:  # fmt: skip
        """Cells; `look(row, column)` gives the fill and the words of each."""
        width, height = cell
        for row in range(rows):
            for column in range(columns):
                fill, words = look(row, column)
                left, top = x + column * width, y + row * height
                self._parts.append(
                    f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" '
                    f'fill="{fill}" stroke="{FAINT}" stroke-width="0.6"/>'
                )
                if words:
                    self.text(left + width / 2, top + height / 2 + size * 0.36, words, size=size)

    def svg(self) -> str:
        """The drawing as the text of a file."""
        body = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._width} {self._height}" '
            f'width="{self._width}" height="{self._height}" role="img" '
            'font-family="system-ui, -apple-system, Helvetica, Arial, sans-serif">\n'
            f"<title>{escape(self._title)}</title>\n"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>\n'
            f'<rect width="{self._width}" height="{self._height}" rx="6" fill="{PAPER}"/>\n'
            f"{body}\n</svg>\n"
        )
