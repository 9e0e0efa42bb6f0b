"""Progress of commands that take a while."""

import sys


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
