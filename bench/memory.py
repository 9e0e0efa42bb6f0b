"""Peak memory above inputs and output, each measured in a process of its own."""

import sys

from metal_flash_attn._bench.contenders import STOCK
from metal_flash_attn._bench.memory import beyond_output
from metal_flash_attn._bench.problem import Problem

from .report import Section


def table() -> Section:
    """Ours and torch's flash kernel at H8 L16384 D64, float32, two threads."""
    section = Section(
        "Peak memory above inputs and output, 2 threads",
        ["H8 L16384 D64 float32", "MiB", "target"],
        "Linux only: resident-set high-water mark of a process of its own.",
    )
    if not sys.platform.startswith("linux"):
        section.rows.append(["not measured on this system", "", ""])
        return section
    problem = Problem.parse("1x16384x8x64")
    for name, contender, target in (("ours", "cpu", "16.0"), ("torch flash", STOCK, "")):
        peak = beyond_output(problem, contender, threads=2) / 2**20
        section.rows.append([name, f"{peak:.1f}", target])
    scores = f"{problem.score_bytes / 2**20:.0f}"
    section.rows.append(["the score matrix (computed, not run)", scores, ""])
    return section
