"""Progress of commands that take a while."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Shows that `done` of `total` steps are done, and what is being done: `(text, done, total)`."""


class Bar:
    """A progress bar on standard error, where that is a terminal."""

    _WIDTH = 30

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._longest = 0

    def __call__(self, text: str, done: int, total: int) -> None:
        """Shows that `done` of `total` steps are done, and what is being done."""
        if not self._shown:
            return
        filled = self._WIDTH * done // max(total, 1)
        bar = "#" * filled + "." * (self._WIDTH - filled)
        line = f"[{bar}] {done}/{total}  {text}"
        self._longest = max(self._longest, len(line))
        print(f"\r{line:<{self._longest}}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clears the line."""
        if self._shown and self._longest:
            print(f"\r{'':<{self._longest}}\r", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error while the block runs: rich's where it is installed, else `Bar`."""
    if importlib.util.find_spec("rich") is not None and sys.stderr.isatty():
        with _rich_bar() as show:
            yield show
        return
    bar = Bar()
    try:
        yield bar
    finally:
        bar.end()


@contextlib.contextmanager
def _rich_bar() -> Iterator[Progress]:
    from rich import progress  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}", markup=False),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)

        def show(text: str, done: int, total: int) -> None:
            shown.update(task, description=text, completed=done, total=total)

        yield show
