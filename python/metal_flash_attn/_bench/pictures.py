"""Ratio and memory as pictures: against length where lengths vary, by problem otherwise.

Every picture is written as SVG and as PNG. Colours are those of Okabe and Ito ("Color universal
design", 2008), which people of all kinds of colour vision can tell apart; markers differ as well.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .contenders import MATH, STOCK
from .machine import Machine
from .measure import Measurement, Result, Settings
from .problem import Problem
from .report import LEAST_BYTES, size

_STYLES = {
    STOCK: ("#000000", "o"),
    MATH: ("#7f7f7f", "v"),
    "cpu": ("#0072b2", "s"),
    "simdgroup": ("#009e73", "s"),
    "tensorops": ("#d55e00", "D"),
    "tensorops-staged": ("#cc79a7", "^"),
    "decode": ("#882255", "p"),
    "torch": ("#e69f00", "P"),
    "scalar": ("#56b4e9", "X"),
}
_NAMES = {STOCK: "stock torch", MATH: "stock torch,\nmath backend"}
_GREY = "#666666"
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_TEXT: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    # Text stays text: it can be searched and read aloud.
    "svg.fonttype": "none",
    "svg.hashsalt": "mtlflashattn",
}

_WIDEST = 4
"""Panels side by side."""


def _name(contender: str) -> str:
    return _NAMES.get(contender, f"{contender} tier")


Point = tuple[float, float, float]
"""A value with its quartiles."""


@dataclass(frozen=True)
class _Quantity:
    """What a picture shows.

    Attributes:
        point: the value of a measurement, or None.
        names: contenders that appear.
    """

    file: str
    title: str
    axis: str
    point: Callable[[Measurement], Point | None]
    label: Callable[[float], str]


def _ratio(measurement: Measurement) -> Point | None:
    ratio = measurement.ratio
    if ratio is None or measurement.name == STOCK:
        return None
    return ratio.median, ratio.low, ratio.high


def _drawn(count: int) -> float:
    return float(max(count, LEAST_BYTES))


def _memory(measurement: Measurement) -> Point | None:
    if measurement.memory_bytes is None:
        return None
    held = _drawn(measurement.memory_bytes)
    return held, held, held


_RATIO = _Quantity(
    "ratio",
    "Speed of attention relative to stock torch",
    "times as fast as stock torch",
    _ratio,
    lambda value: f"{value:g}x",
)
_MEMORY = _Quantity(
    "memory",
    "Peak memory of attention beyond inputs and outputs",
    "peak memory",
    _memory,
    size,
)


def draw(
    results: Sequence[Result], machine: Machine, settings: Settings, folder: Path
) -> list[Path]:
    """Writes the pictures into `folder`, and returns their files.

    Raises:
        ValueError: there is nothing to draw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    measured = [result for result in results if result.measurements]
    for quantity in (_RATIO, _MEMORY):
        values = [quantity.point(one) for result in measured for one in result.measurements]
        if not any(value is not None for value in values):
            continue
        with rc_context(_TEXT):
            figure = _figure(quantity, measured, machine, settings)
            for kind in ("svg", "png"):
                path = folder / f"{quantity.file}.{kind}"
                nameless = {"Date": None} if kind == "svg" else None
                figure.savefig(path, dpi=200, metadata=nameless)
                written.append(path)
    if not written:
        raise ValueError("--pictures has nothing to draw; allowed: calls that can be measured")
    return written


def _figure(
    quantity: _Quantity, results: Sequence[Result], machine: Machine, settings: Settings
) -> Figure:
    panels = _panels(results)
    if panels is None:
        return _by_problem(quantity, results, machine, settings)
    return _by_length(quantity, panels, machine, settings)


def _kind(problem: Problem) -> Problem:
    """The problem without its lengths."""
    return replace(problem, query_len=1, key_len=1)


def _panels(results: Sequence[Result]) -> dict[Problem, list[Result]] | None:
    """Results that differ in length alone, or None where they do not vary so."""
    panels: dict[Problem, list[Result]] = {}
    for result in results:
        if result.problem.name or result.problem.lengths:
            return None
        panels.setdefault(_kind(result.problem), []).append(result)
    lengths = [{one.problem.key_len for one in panel} for panel in panels.values()]
    if len(panels) > _WIDEST or min(map(len, lengths)) < 2:
        return None
    return panels


def _panel_title(problem: Problem) -> str:
    passes = ", forward and backward" if problem.backward else ""
    return f"{_DTYPES[problem.dtype]}, {problem.mask}{passes}"


def _sizes(problem: Problem) -> str:
    batch = f"batch {problem.batch}, "
    heads = f"{problem.heads} heads"
    if problem.heads != problem.key_heads:
        heads += f" over {problem.key_heads}"
    dims = f"{problem.head_dim}"
    if problem.value_dim != problem.head_dim:
        dims += f" (values of {problem.value_dim})"
    return f"{batch}{heads} of {dims}"


def _start(
    quantity: _Quantity,
    subtitle: Sequence[str],
    width: float,
    height: float,
) -> tuple[Figure, float]:
    """A figure with title and subtitle, and the height that is left, in parts of the whole."""
    characters = int(width * 15)
    lines = [line for text in subtitle for line in textwrap.wrap(text, characters)]
    top = 0.4 + 0.16 * len(lines)
    figure = Figure(figsize=(width, height + top))
    whole = height + top
    figure.text(0.12 / width, 1 - 0.1 / whole, quantity.title, weight="bold", size=12, va="top")
    figure.text(
        0.12 / width,
        1 - 0.36 / whole,
        "\n".join(lines),
        size=8.5,
        color=_GREY,
        va="top",
        linespacing=1.3,
    )
    return figure, 1 - top / whole


def _by_length(
    quantity: _Quantity,
    panels: dict[Problem, list[Result]],
    machine: Machine,
    settings: Settings,
) -> Figure:
    kinds = list(panels)
    same = len({_sizes(kind) for kind in kinds}) == 1
    subtitle = [
        machine.text,
        *([_sizes(kinds[0])] if same else []),
        _how(quantity, settings, "bands"),
    ]
    width = 1.0 + 3.75 * len(kinds) if len(kinds) > 1 else 6.4
    figure, top = _start(quantity, subtitle, width, 3.6)
    left = 1.0 / width
    axes = figure.subplots(
        1,
        len(kinds),
        sharex=True,
        sharey=True,
        squeeze=False,
        gridspec_kw={
            "left": left,
            "right": 1 - 1.25 / width,
            "bottom": 0.55 / figure.get_figheight(),
            "top": top - 0.3 / figure.get_figheight(),
            "wspace": 0.55,
        },
    )[0]
    for axis, kind in zip(axes, kinds, strict=True):
        title = _panel_title(kind) if same else f"{_panel_title(kind)}\n{_sizes(kind)}"
        axis.set_title(title, loc="left")
        axis.set_xlabel("sequence length (tokens)")
        _draw_lengths(quantity, axis, panels[kind])
    axes[0].set_ylabel(quantity.axis)
    results = [result for panel in panels.values() for result in panel]
    lengths = sorted({result.problem.key_len for result in results})
    _scale(axes[0].xaxis, lengths, _length)
    axes[0].set_ylim(_scale_values(quantity, axes[0].yaxis, results))
    for axis, kind in zip(axes, kinds, strict=True):
        _label_lines(quantity, axis, panels[kind])
    return figure


def _how(quantity: _Quantity, settings: Settings, quartiles: str) -> str:
    if quantity is _RATIO:
        return f"{settings.timer.name}, medians of interleaved samples; {quartiles}: quartiles"
    least = size(LEAST_BYTES)
    return f"scores, inputs and outputs are computed; less than {least} is drawn as {least}"


def _names_in(quantity: _Quantity, results: Sequence[Result]) -> list[str]:
    names: list[str] = []
    for result in results:
        for one in result.measurements:
            if one.name not in names and quantity.point(one) is not None:
                names.append(one.name)
    return names


def _series(
    quantity: _Quantity, results: Sequence[Result], name: str
) -> Iterator[tuple[Problem, Point]]:
    for result in sorted(results, key=lambda result: result.problem.key_len):
        one = result.of(name)
        point = None if one is None else quantity.point(one)
        if point is not None:
            yield result.problem, point


def _draw_lengths(quantity: _Quantity, axis: Axes, results: Sequence[Result]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    if quantity is _RATIO:
        axis.axhline(1, color="black", linewidth=1.2)
    for name in _names_in(quantity, results):
        series = list(_series(quantity, results, name))
        lengths = [problem.key_len for problem, _ in series]
        color, marker = _STYLES[name]
        middle, low, high = zip(*(point for _, point in series), strict=True)
        if quantity is _RATIO:
            axis.fill_between(lengths, low, high, color=color, alpha=0.2, linewidth=0)
        (line,) = axis.plot(
            lengths, middle, color=color, marker=marker, markersize=5, linewidth=1.8
        )
        if name == STOCK:  # Stays visible below a line that covers it.
            line.set(markersize=9, markerfacecolor="none")
    if quantity is _MEMORY:
        for _, values, style in _references(results):
            lengths = sorted(result.problem.key_len for result in results)
            axis.plot(lengths, values, color=_GREY, linestyle=style, linewidth=1.2)


def _references(results: Sequence[Result]) -> Iterator[tuple[str, list[float], str]]:
    """What memory is compared with: both are computed, not measured."""
    problems = sorted((result.problem for result in results), key=lambda one: one.key_len)
    yield "all scores", [_drawn(one.score_bytes) for one in problems], "--"
    yield "inputs and\noutputs", [_drawn(one.minimal_bytes) for one in problems], ":"


def _label_lines(quantity: _Quantity, axis: Axes, results: Sequence[Result]) -> None:
    """Names beside the ends of the lines, moved apart where they would overlap."""
    ends: list[tuple[float, float, str, str]] = []
    for name in _names_in(quantity, results):
        problem, point = list(_series(quantity, results, name))[-1]
        ends.append((problem.key_len, point[0], _name(name), _STYLES[name][0]))
    longest = max(result.problem.key_len for result in results)
    if quantity is _RATIO:
        ends.append((longest, 1.0, "stock torch", "black"))
    else:
        ends += [(longest, values[-1], text, _GREY) for text, values, _ in _references(results)]
    points_of_pixel = 72 / axis.figure.dpi
    placed = -1e9
    for length, value, text, color in sorted(ends, key=lambda end: end[1]):
        height = axis.transData.transform((length, value))[1] * points_of_pixel
        lines = text.count("\n") + 1
        wanted = max(height, placed + 5.5 * (lines - 1))
        placed = wanted + 5.5 * (lines + 1)
        axis.annotate(
            text,
            (length, value),
            xytext=(9, wanted - height),
            textcoords="offset points",
            color=color,
            size=9,
            va="center",
            linespacing=1.0,
            annotation_clip=False,
        )


def _scale(axis: Any, ticks: Sequence[float], label: Callable[[float], str]) -> None:
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def _length(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _scale_values(quantity: _Quantity, axis: Any, results: Sequence[Result]) -> tuple[float, float]:
    """Sets a tick at each power of two or of sixteen; returns limits around all values."""
    points = [quantity.point(one) for result in results for one in result.measurements]
    values = [value for point in points if point is not None for value in point]
    if quantity is _RATIO:
        values.append(1.0)
    else:
        values += [value for _, line, _ in _references(results) for value in line]
        values.append(LEAST_BYTES)
    step = 2 if max(values) / min(values) < 512 else 16
    ticks = [1.0]
    while ticks[0] > min(values):
        ticks.insert(0, ticks[0] / step)
    while ticks[-1] < max(values):
        ticks.append(ticks[-1] * step)
    inside = [tick for tick in ticks if min(values) / 1.5 <= tick <= max(values) * 1.5]
    _scale(axis, inside, quantity.label)
    return min(values) / 1.3, max(values) * 1.3


def _by_problem(
    quantity: _Quantity, results: Sequence[Result], machine: Machine, settings: Settings
) -> Figure:
    height = 0.9 + 0.34 * len(results)
    figure, top = _start(quantity, [machine.text, _how(quantity, settings, "bars")], 7.4, height)
    titles = [result.problem.title for result in results]
    left = 0.25 + 0.078 * max(map(len, titles))
    axis = figure.add_axes(
        (
            left / 7.4,
            0.55 / figure.get_figheight(),
            1 - (left + 0.3) / 7.4,
            top - 0.95 / figure.get_figheight(),
        )
    )
    axis.set_xscale("log", base=2)
    axis.set_xlabel(quantity.axis)
    rows = range(len(results))
    axis.set_yticks(list(rows), titles)
    axis.set_ylim(len(results) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    lowest, highest = _scale_values(quantity, axis.xaxis, results)
    axis.set_xlim(lowest, 1.2 * highest)  # Leaves room for a number beside the last mark.
    if quantity is _RATIO:
        axis.axvline(1, color="black", linewidth=1.2, label="stock torch")
    names = _names_in(quantity, results)
    for name in names:
        color, marker = _STYLES[name]
        placed = [
            (row, point)
            for row, result in zip(rows, results, strict=True)
            if (one := result.of(name)) is not None and (point := quantity.point(one)) is not None
        ]
        for row, (middle, low, high) in placed:
            axis.plot([low, high], [row, row], color=color, linewidth=2, alpha=0.5)
            if len(names) == 1:
                axis.annotate(
                    f"{middle:.2g}x",
                    (high, row),
                    xytext=(8, 0),
                    textcoords="offset points",
                    color=color,
                    size=9,
                    va="center",
                )
        middles = [middle for _, (middle, _, _) in placed]
        (dots,) = axis.plot(
            middles,
            [row for row, _ in placed],
            marker,
            color=color,
            markersize=6,
            label=_name(name),
        )
        if name == STOCK:  # Stays visible below a mark that covers it.
            dots.set(markersize=10, markerfacecolor="none")
    if quantity is _MEMORY:
        scores = [_drawn(result.problem.score_bytes) for result in results]
        axis.plot(scores, rows, "|", color=_GREY, markersize=11, label="all scores (computed)")
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9, borderpad=0.2
    )
    return figure
