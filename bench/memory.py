"""Peak memory above inputs and results, each measured in a process of its own."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from metal_flash_attn._bench.contenders import MATH, STOCK
from metal_flash_attn._bench.memory import beyond_output
from metal_flash_attn._bench.problem import Problem

from .report import Section

OURS, FLASH, ALL_SCORES = ("ours", "cpu"), ("torch flash", STOCK), ("torch math", MATH)


def tables() -> Iterator[Section]:
    """Of a forward pass, and of one with gradients also beside the backend that keeps scores."""
    title = "Peak memory above inputs and output, 2 threads"
    forward = Problem.parse("1x16384x8x64")
    yield _table(title, "H8 L16384 D64 float32", forward, [OURS, FLASH], "16.0")
    training = replace(Problem.parse("1x8192x8x64"), backward=True)
    title = "Peak memory of forward and backward above inputs and gradients, 2 threads"
    shape = "H8 L8192 D64 float32"
    yield _table(title, shape, training, [OURS, FLASH, ALL_SCORES], "a twentieth of torch math")


def _table(
    title: str, shape: str, problem: Problem, names: Sequence[tuple[str, str]], target: str
) -> Section:
    caption = "Linux only: resident-set high-water mark of a process of its own."
    section = Section(title, [shape, "MiB", "target"], caption)
    if not sys.platform.startswith("linux"):
        section.rows.append(["not measured on this system", "", ""])
        return section
    for name, contender in names:
        peak = beyond_output(problem, contender, threads=2) / 2**20
        section.rows.append([name, f"{peak:.1f}", target if name == "ours" else ""])
    scores = f"{problem.score_bytes / 2**20:.0f}"
    section.rows.append(["the score matrix (computed, not run)", scores, ""])
    return section
