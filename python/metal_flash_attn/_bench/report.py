"""Results as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from .contenders import STOCK
from .machine import Machine
from .measure import Measurement, Result, Settings
from .problem import Problem
from .tables import BAD, FAINT, GOOD, Cell, Table
from .timing import Spread

FORMAT = 1
"""Number of the JSON's shape; a field that goes or changes its meaning makes it another one."""

LEAST_BYTES = 2**20
"""Memory below this is not told apart: allocators and the system count in pages and batches."""

_COLUMNS = ("problem", "by", "time", "+-", "speed", "ratio", "+-", "memory")


def to_json(results: Sequence[Result], machine: Machine, settings: Settings) -> dict[str, Any]:
    """Everything that was measured, as plain data; docs/tools.md describes the fields."""
    return {
        "format": FORMAT,
        "machine": asdict(machine),
        "device": settings.device,
        "clock": settings.timer.name,
        "results": [{**asdict(result), "problem": result.problem.to_json()} for result in results],
    }


def table(results: Sequence[Result], machine: Machine, settings: Settings) -> Table:
    """The results, problem by problem."""
    clock = settings.timer.name
    caption = (
        f"{machine.text}\nstock: torch's scaled_dot_product_attention; math: the same, holding all "
        "scores; the others: tiers of this package.\n"
        f"time: {clock}, median of interleaved samples; +-: half the distance of the quartiles; "
        "ratio: stock's time over theirs.\nmemory: peak beyond inputs and outputs; scores: what "
        "the matrix of all scores would take."
    )
    shown = Table("Attention beside stock torch", _COLUMNS, caption)
    shown.groups = [list(_rows(result)) for result in results if result.measurements]
    return shown


def _rows(result: Result) -> Iterator[list[Cell]]:
    problem = result.problem
    names = [problem.title, f"scores {size(problem.score_bytes)}"]
    if problem.name:
        names.insert(1, problem.shape)
    for index, measurement in enumerate(result.measurements):
        name = names[index] if index < len(names) else ""
        yield [Cell(name, FAINT if index else ""), *_cells(problem, measurement)]
    for name in names[len(result.measurements) :]:
        yield [Cell(name, FAINT), *(Cell("") for _ in _COLUMNS[1:])]


def _cells(problem: Problem, measurement: Measurement) -> list[Cell]:
    seconds, memory = measurement.seconds, measurement.memory_bytes
    ratio = None if measurement.name == STOCK else measurement.ratio
    differs = measurement.agrees is False
    return [
        Cell(measurement.name + (" !!" if differs else ""), BAD if differs else ""),
        Cell(duration(seconds.median)),
        Cell(f"{100 * seconds.relative:.1f}%", FAINT),
        Cell(speed(problem, measurement)),
        Cell("" if ratio is None else f"{ratio.median:.2f}x", _verdict(ratio)),
        Cell("" if ratio is None else f"{100 * ratio.relative:.1f}%", FAINT),
        Cell("" if memory is None else _memory(memory)),
    ]


def _verdict(ratio: Spread | None) -> str:
    """Green or red where the quartiles are on one side of 1."""
    if ratio is None:
        return ""
    return GOOD if ratio.low > 1 else BAD if ratio.high < 1 else ""


def speed(problem: Problem, measurement: Measurement) -> str:
    """In the unit that limits such a problem."""
    if problem.is_memory_bound:
        return f"{_three_digits(measurement.gbytes_per_second)} GB/s"
    if measurement.tflops < 1:
        return f"{_three_digits(1000 * measurement.tflops)} GFLOP/s"
    return f"{_three_digits(measurement.tflops)} TFLOP/s"


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def _memory(count: int) -> str:
    return f"< {size(LEAST_BYTES)}" if count < LEAST_BYTES else size(count)


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1000:
            return f"{count:.2g} {unit}" if count < 10 else f"{count:.0f} {unit}"
    return f"{count / 1024:.3g} GiB"


def remarks(result: Result) -> Iterator[str]:
    """Who took no part and why, what is known to be wrong, what differs."""
    for absent in result.absent:
        yield f"{absent.name}: {absent.reason}"
    yield from result.notes
    for found in result.measurements:
        if found.agrees is False:
            text = f"!! {found.name} differs from {result.measurements[0].name}"
            yield f"{text} by {found.difference:.2g}, more than rounding explains"


def collected(remarks_of: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """Each remark once, with the titles of the problems where it does not hold for all."""
    found: dict[str, list[str]] = {}
    for title, texts in remarks_of:
        for text in texts:
            found.setdefault(text, []).append(title)
    for text, titles in found.items():
        yield text + ("" if len(titles) == len(remarks_of) else f" ({_list(titles)})")


def _list(titles: Sequence[str]) -> str:
    return ", ".join(titles[:3]) + (f" and {len(titles) - 3} more" if len(titles) > 3 else "")
