"""Who served the attention calls of a demonstration."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metal_flash_attn import TraceEntry

EXPECTED_TIER = "cpu"


def calls_by_tier(entries: Sequence[TraceEntry]) -> dict[str, int]:
    """Number of attention calls per tier."""
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[entry.tier] += entry.calls
    return dict(counts)


def all_served(counts: dict[str, int], expected_calls: int) -> bool:
    """Whether the expected tier served exactly the calls that the demonstration made."""
    return counts == {EXPECTED_TIER: expected_calls}


def describe(counts: dict[str, int]) -> str:
    """For example "tier cpu: 24"."""
    parts = [f"tier {tier}: {calls}" for tier, calls in counts.items()]
    return ", ".join(parts) or "none"
