"""What a call costs beyond the arithmetic: the smallest problem, many times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from metal_flash_attn import flash_attn_func, sdpa
from metal_flash_attn._bench.timing import CPU_TIME, interleave, medians
from torch.nn import functional

from .report import Section

CALLS = 2000


def table(seconds: float) -> Section:
    """CPU time of one call on a 1x16x1x64 problem, one thread."""
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 16, 1, 64) for _ in range(3))
    tq, tk, tv = (tensor.transpose(1, 2) for tensor in (q, k, v))

    def repeat_ours() -> None:
        for _ in range(CALLS):
            flash_attn_func(q, k, v)

    def repeat_peer() -> None:
        for _ in range(CALLS):
            functional.scaled_dot_product_attention(tq, tk, tv)

    ours, peer = medians(interleave([repeat_ours, repeat_peer], CPU_TIME, seconds, rounds=21))
    section = Section("Call overhead, 1x16x1x64 float32", ["", "torch", "ours", "ours / torch"])
    section.rows.append(
        [
            "us a call",
            f"{peer / CALLS * 1e6:.2f}",
            f"{ours / CALLS * 1e6:.2f}",
            f"{ours / peer:.2f} (target 0.50)",
        ]
    )
    return section


def patch_table(seconds: float) -> Section:
    """CPU time that the patch of torch's attention adds to a call that falls through."""
    torch.set_num_threads(1)
    q = torch.randn(1, 1, 4, 8)
    stock = functional.scaled_dot_product_attention
    title = "scaled_dot_product_attention that falls through, 1x1x4x8 float32"
    section = Section(title, ["us a call", "torch", "patched", "added (target 2)"])
    for name, cpu in (("device not served", False), ("gates asked", True)):
        with sdpa.patched(cpu=cpu):
            assert not sdpa.explain(q, q, q).serves

            def repeat(function: Callable[..., object]) -> None:
                for _ in range(CALLS):
                    function(q, q, q)

            patched = functional.scaled_dot_product_attention
            runs = [partial(repeat, stock), partial(repeat, patched)]
            samples = interleave(runs, CPU_TIME, seconds, rounds=21)
            without, with_patch = medians(samples)
        microseconds = [x / CALLS * 1e6 for x in (without, with_patch, with_patch - without)]
        section.rows.append([name, *(f"{x:.2f}" for x in microseconds)])
    return section
