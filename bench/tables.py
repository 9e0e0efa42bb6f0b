"""Speed: one thread against torch, and two threads against one."""

import statistics
from collections.abc import Iterator
from functools import partial
from itertools import chain

import metal_flash_attn
import torch
from metal_flash_attn._bench.timing import CPU_TIME, WALL_TIME, interleave, medians
from metal_flash_attn._native import fma_peak, read_bandwidth
from rich.progress import track

from . import caches, cases
from .report import Section


def ceilings() -> tuple[float, float]:
    """GFLOP/s of the multiply-add units and GB/s of memory reads, one thread, medians."""
    peak = statistics.median(fma_peak() for _ in range(9))
    return peak, statistics.median(read_bandwidth() for _ in range(9))


def machine() -> str:
    """What the figures were measured on."""
    q = torch.zeros(1, 1, 1, 8)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__} ({capability}), ours {metal_flash_attn.plan(q, q, q).isa}"


def selected(all_cases: Iterator[cases.Case], only: str) -> list[cases.Case]:
    return [case for case in all_cases if only in case.name]


def one_thread(seconds: float, only: str) -> Section:
    """Every case on one thread, by CPU time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    peak, bandwidth = ceilings()
    section = Section(
        "One thread, CPU time",
        ["case", "torch", "ours", "unit", "of peak", "ratio", "target"]
        + (["llama.cpp", "ours / llama.cpp"] if caches.library else []),
        f"{machine()}. Peak: {peak:.0f} GFLOP/s multiply-add, {bandwidth:.1f} GB/s read, measured.",
    )
    every_case = chain(cases.one_thread(), caches.one_thread())
    for case in track(selected(every_case, only), "one thread", transient=True):
        calls = case.prepare()
        taken = medians(interleave([call for call in calls if call], CPU_TIME, seconds))
        ours, peer, *llama = taken
        limit = peak if case.unit == "GFLOP/s" else bandwidth
        section.rows.append(
            [
                case.name,
                f"{case.work / peer / 1e9:.1f}",
                f"{case.work / ours / 1e9:.1f}",
                case.unit,
                f"{100 * case.work / ours / 1e9 / limit:.0f}%",
                f"{peer / ours:.2f}x",
                f"{case.target:.1f}x" if case.target else "",
                *(f"{case.work / theirs / 1e9:.1f}" for theirs in llama),
                *(f"{theirs / ours:.2f}x" for theirs in llama),
            ]
            + (["", ""] if caches.library and not llama else [])
        )
    return section


def two_threads(seconds: float, only: str) -> Section:
    """Two threads beside one, by the wall clock, interleaved."""
    section = Section(
        "Two threads, wall time",
        ["case", "ours, 2 threads / 1", "torch, 2 threads / 1", "ours / torch, 2 threads"],
        "Speed-up over one thread of the same library; 2.00x is ideal.",
    )

    def on(threads: int, call: cases.Call) -> None:
        torch.set_num_threads(threads)
        call()

    for case in track(selected(cases.two_threads(), only), "two threads", transient=True):
        ours, peer, _ = case.prepare()
        contenders = [partial(on, threads, call) for call in (ours, peer) for threads in (1, 2)]
        samples = interleave(contenders, WALL_TIME, 2 * seconds)
        ours1, ours2, peer1, peer2 = medians(samples)
        section.rows.append(
            [
                case.name,
                f"{ours1 / ours2:.2f}x",
                f"{peer1 / peer2:.2f}x",
                f"{peer2 / ours2:.2f}x",
            ]
        )
    torch.set_num_threads(1)
    return section
