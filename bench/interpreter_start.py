"""What the import finder costs at the start of every interpreter.

Starts `python -c pass` in two bare virtual environments that differ in the .pth file and the finder
alone, in turn, and compares the medians of whole processes: wall time, and the time on the CPU,
which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import venv
from pathlib import Path

from rich.console import Console
from rich.table import Table

PURELIB = Path(__file__).parents[1] / "mtlflashattn.data" / "purelib"
# The interpreter's own settings would change what is measured: whether bytecode is kept, above all.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def create(directory: Path, with_finder: bool) -> Path:
    """A bare environment, with or without the finder; returns its interpreter."""
    venv.create(directory, symlinks=True)
    if with_finder:
        (site_packages,) = directory.glob("lib/python*/site-packages")
        for file in PURELIB.iterdir():
            if file.is_file():
                shutil.copy(file, site_packages)
    return directory / "bin" / "python"


def start(python: Path) -> tuple[float, float]:
    """Wall and CPU milliseconds of one process that does nothing."""
    begin = time.perf_counter()
    process = os.posix_spawn(python, [str(python), "-c", "pass"], ENVIRONMENT)
    _, status, usage = os.wait4(process, 0)
    wall = time.perf_counter() - begin
    if status != 0:
        raise RuntimeError(f"{python} ended with status {status}")
    return 1e3 * wall, 1e3 * (usage.ru_utime + usage.ru_stime)


def measure(runs: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Times without and with the finder, pair by pair."""
    with tempfile.TemporaryDirectory() as directory:
        without = create(Path(directory, "without"), with_finder=False)
        with_it = create(Path(directory, "with"), with_finder=True)
        # The first start compiles the finder, as it does after an installation.
        start(without)
        start(with_it)
        pairs = [(start(without), start(with_it)) for _ in range(runs)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def main() -> None:
    """Print the medians and their differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60, help="pairs of starts (default 60)")
    runs = parser.parse_args().runs
    without, with_it = measure(runs)

    table = Table(title=f"Start of Python {sys.version.split()[0]}, medians of {runs} starts, ms")
    for heading in ("", "without", "with the finder", "cost"):
        table.add_column(heading, justify="right")
    for index, kind in enumerate(("wall", "CPU")):
        bare = statistics.median(times[index] for times in without)
        loaded = statistics.median(times[index] for times in with_it)
        table.add_row(kind, f"{bare:.2f}", f"{loaded:.2f}", f"{loaded - bare:+.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
