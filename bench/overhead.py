"""What a call costs beyond the arithmetic: the smallest problem, many times."""

import time

import torch
from metal_flash_attn import flash_attn_func
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .report import Section
from .timing import interleave

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
            sdpa(tq, tk, tv)

    ours, peer = interleave([repeat_ours, repeat_peer], time.thread_time, seconds, rounds=21)
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
