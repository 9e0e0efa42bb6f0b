"""Writes all drawings to docs/drawings, or to the folder that is named."""

from __future__ import annotations

import sys
from pathlib import Path

from . import backward, forward

DRAWINGS = forward.DRAWINGS | backward.DRAWINGS
FOLDER = Path(__file__).parents[2] / "docs" / "drawings"


def write(folder: Path) -> None:
    """One file for each drawing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
