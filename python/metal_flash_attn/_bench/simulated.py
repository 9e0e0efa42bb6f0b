"""Counts of the Metal kernels on the simulator, which has no time.

They are exact for the text that ships, and say nothing about the speed of a GPU: neither how well
it hides what is counted, nor what registers cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from metal_flash_attn import __version__, _native
from metal_flash_attn._doctor import environment
from metal_flash_attn._progress import Progress

from .contenders import Absent, reason_of
from .problem import Problem
from .report import FORMAT, size
from .tables import FAINT, Cell, Table

_COLUMNS = (
    "problem",
    "tier",
    "device memory",
    "of the least",
    "threadgroup",
    "products",
    "barriers",
)
_MOST_FLOPS = 1e9
"""A call of so many takes about a minute."""


@dataclass(frozen=True)
class Count:
    """What one tier asks of a GPU for one problem.

    Attributes:
        tile: in the planner's words.
        device_bytes: read from and written to device memory.
        threadgroup_bytes: the same of threadgroup memory.
        products: of 8x8 matrices.
        barriers: of simdgroups and threadgroups.
    """

    tier: str
    tile: str
    device_bytes: int
    threadgroup_bytes: int
    products: int
    barriers: int


@dataclass
class Counts:
    """The counts of all tiers for one problem."""

    problem: Problem
    counts: list[Count] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)


def count_all(
    problems: Sequence[Problem], tiers: Sequence[str], progress: Progress
) -> list[Counts]:
    """Counts every problem for every tier that has tiles."""
    found = []
    with environment(MTLFLASHATTN_DEVICE="simulator"):
        for index, problem in enumerate(problems):
            counts = Counts(problem)
            for tier in tiers:
                progress(f"{problem.title}: {tier}", index, len(problems))
                counted = _count(problem, tier)
                if isinstance(counted, Count):
                    counts.counts.append(counted)
                else:
                    counts.absent.append(counted)
            found.append(counts)
    return found


def _count(problem: Problem, tier: str) -> Count | Absent:
    if problem.lengths or problem.backward:
        return Absent(tier, "packed sequences and gradients are not counted")
    if problem.flops > _MOST_FLOPS:
        most = f"{_MOST_FLOPS:.0e} multiplications and additions"
        return Absent(tier, f"the simulator is slow: allowed are calls of {most}")
    asked = question(problem, tier)
    try:
        answer = _native._tile_candidates(asked, None)
        chosen = answer["candidates"][0]
        counted = _native._count_tile(asked, chosen["pattern"])
    except NotImplementedError as error:
        return Absent(tier, reason_of(str(error), tier))
    return Count(
        tier,
        chosen["text"],
        counted["device_bytes"],
        counted["threadgroup_bytes"],
        counted["products"],
        counted["barriers"],
    )


def question(problem: Problem, tier: str) -> dict[str, Any]:
    """The call as the planner is asked about it."""
    nothing = dict.fromkeys(["gpu", "cores", "macos", "torch", "sequences", "bias", "head_dim"])
    left, right = problem.window
    queries, keys = (problem.batch, problem.query_len), (problem.batch, problem.key_len)
    sizes = {
        "q": (*queries, problem.heads, problem.head_dim),
        "k": (*keys, problem.key_heads, problem.head_dim),
        "v": (*keys, problem.key_heads, problem.value_dim),
    }
    return {
        **nothing,
        **{name: "x".join(map(str, shape)) for name, shape in sizes.items()},
        "value_dim": None,
        "dtype": problem.dtype,
        "causal": problem.causal,
        "window": None if problem.window == (-1, -1) else f"{left},{right}",
        "softcap": 0.0,
        "alibi": False,
        "sinks": False,
        "lse": False,
        "tier": tier,
    }


def to_json(results: Sequence[Counts]) -> dict[str, Any]:
    """Everything that was counted, as plain data."""
    return {
        "format": FORMAT,
        "device": "simulator",
        "mtlflashattn": __version__,
        "torch": torch.__version__,
        "results": [{**asdict(result), "problem": result.problem.to_json()} for result in results],
    }


def table(results: Sequence[Counts]) -> Table:
    """The counts, problem by problem."""
    caption = (
        "Counted by the simulator while it ran the kernels' own text: no times, and nothing about "
        "the speed of a GPU.\ndevice memory: bytes read and written; of the least: over each input "
        "read once and each output written once; products: of 8x8 matrices."
    )
    shown = Table("What the Metal kernels ask of a GPU", _COLUMNS, caption)
    for result in results:
        least = result.problem.minimal_bytes
        names = [result.problem.title, f"least {size(least)}"]
        rows = []
        for index, count in enumerate(result.counts):
            rows.append(
                [
                    Cell(names[index] if index < len(names) else "", FAINT if index else ""),
                    Cell(count.tier),
                    Cell(size(count.device_bytes)),
                    Cell(f"{count.device_bytes / least:.1f}x"),
                    Cell(size(count.threadgroup_bytes)),
                    Cell(f"{count.products:,}" if count.products else "matmul2d"),
                    Cell(f"{count.barriers:,}"),
                ]
            )
        shown.groups.append(rows)
    return shown
