"""One causal attention over a long sequence: time, memory, and its error against float64.

Queries are handed over chunk by chunk so that a progress bar can move. Causal masks of flash_attn
are aligned to the bottom right, so a chunk against the keys up to its own end is exactly its part
of the whole. The exit status is 1 when a sampled row is further from float64 than rounding
explains, or when a call was served by anything but the expected tier.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from typing import cast

import metal_flash_attn
import served
import torch
from peak_memory import PeakMemory
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SAMPLED_ROWS = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Inputs:
    """q, k, v: `[1, tokens, heads, head_dim]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class Measurement:
    """What one pass over the sequence took and who served it."""

    seconds: float
    peak_bytes: int
    peak_is_exact: bool
    calls_by_tier: dict[str, int]
    instruction_set: str | None


def visible_pairs(start: int, end: int) -> int:
    """(query, key) pairs of a causal mask for queries start..end; query i sees i + 1 keys."""
    return (end * (end + 1) - start * (start + 1)) // 2


def attend(inputs: Inputs, output: torch.Tensor, chunk: int) -> Measurement:
    """Fill `output` with the causal attention, and measure while doing so."""
    tokens = inputs.q.shape[1]
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console()) as progress,
        metal_flash_attn.trace() as trace,
    ):
        # In pairs, not in chunks: later chunks see more keys, and the bar should move evenly.
        task = progress.add_task("attention", total=visible_pairs(0, tokens))
        memory = PeakMemory()
        begin = time.perf_counter()
        for start in range(0, tokens, chunk):
            end = min(start + chunk, tokens)
            part = metal_flash_attn.flash_attn_func(
                inputs.q[:, start:end], inputs.k[:, :end], inputs.v[:, :end], causal=True
            )
            output[:, start:end] = cast("torch.Tensor", part)
            progress.update(task, advance=visible_pairs(start, end))
        seconds = time.perf_counter() - begin
        peak_bytes = memory.above_start()
    calls_by_tier = served.calls_by_tier(trace.calls)
    plan = metal_flash_attn.plan(inputs.q, inputs.k, inputs.v, causal=True)
    return Measurement(seconds, peak_bytes, memory.exact, calls_by_tier, plan.isa)


def rows_to_check(tokens: int, chunk: int) -> list[int]:
    """First and last row, both sides of a chunk's edge, and rows drawn at random."""
    edges = {0, min(chunk, tokens) - 1, min(chunk, tokens - 1), tokens - 1}
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randperm(tokens, generator=generator)[: SAMPLED_ROWS - len(edges)]
    return sorted(edges | set(drawn.tolist()))


def direct_row(inputs: Inputs, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row in float64: its output and the rounding bound, both `[heads, head_dim]`.

    The bound, with u half an eps of float32: a score is a sum of head_dim products, off by
    sqrt(head_dim) u relative to |q||k|, and the exponential turns that into a relative error of
    its weight; the sums over n keys add sqrt(n) u (errors of n roundings grow like sqrt(n): Higham
    and Mary 2019); 8 u cover the exponential and the division. All of it is relative to the mean
    of |v|. The output is then rounded once to its own dtype.
    """
    q = inputs.q[0, row].double()
    k, v = (x[0, : row + 1].double() for x in (inputs.k, inputs.v))
    head_dim = q.shape[-1]
    scale = head_dim**-0.5
    weights = (torch.einsum("hd,khd->hk", q, k) * scale).softmax(dim=-1)
    output = torch.einsum("hk,khd->hd", weights, v)
    magnitude = torch.einsum("hk,khd->hd", weights, v.abs())
    norms = q.norm(dim=-1) * k.norm(dim=-1).amax(dim=0) * scale
    roundings = head_dim**0.5 * norms + math.sqrt(row + 1) + 8
    half_eps = torch.finfo(torch.float32).eps / 2
    own_half_eps = torch.finfo(inputs.q.dtype).eps / 2
    bound = half_eps * roundings.unsqueeze(-1) * magnitude + own_half_eps * output.abs()
    return output, bound


def largest_error(inputs: Inputs, output: torch.Tensor, rows: list[int]) -> tuple[float, float]:
    """Largest error of the sampled rows, and the largest share of its bound any element uses."""
    error, share = 0.0, 0.0
    for row in rows:
        expected, bound = direct_row(inputs, row)
        difference = (output[0, row].double() - expected).abs()
        # max(0.0, nan) is 0.0: a NaN has to become infinite to be seen.
        difference = torch.where(difference.isnan(), math.inf, difference)
        error = max(error, float(difference.max()))
        share = max(share, float((difference / bound).max()))
    return error, share


def memory_text(size: float) -> str:
    """A number of bytes in the largest unit that keeps it above one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.1f} {unit}"


def print_report(inputs: Inputs, measurement: Measurement) -> None:
    """Time, memory and tier, one line each."""
    _, tokens, heads, head_dim = inputs.q.shape
    # Two matrix products, a multiplication and an addition each, for every visible pair.
    operations = 4 * head_dim * heads * visible_pairs(0, tokens)
    seconds = measurement.seconds
    held = 4 * inputs.q.numel() * inputs.q.element_size()
    score_matrix = heads * tokens * tokens * inputs.q.element_size()
    at_most = "" if measurement.peak_is_exact else "at most "
    instructions = f", {measurement.instruction_set}" if measurement.instruction_set else ""
    tera_per_second = operations / seconds / 1e12
    print(f"  time          {seconds:.2f} s")
    print(f"  speed         {tokens / seconds:,.0f} tokens/s, {tera_per_second:.3f} TFLOP/s")
    print(
        f"  peak memory   {at_most}{memory_text(measurement.peak_bytes)} above the "
        f"{memory_text(held)} of inputs and output"
    )
    print(f"  score matrix  {memory_text(score_matrix)}, had it been held")
    print(f"  served by     {served.describe(measurement.calls_by_tier)} calls{instructions}")


def make_inputs(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> Inputs:
    """Standard normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, heads, head_dim)
    return Inputs(*(torch.randn(shape, generator=generator).to(dtype) for _ in range(3)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--chunk", type=int, default=512, help="queries between two bar updates")
    arguments = parser.parse_args()
    for name in ("tokens", "heads", "head_dim", "chunk"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} is {getattr(arguments, name)}; allowed: 1 or more")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    dtype = DTYPES[arguments.dtype]
    inputs = make_inputs(arguments.tokens, arguments.heads, arguments.head_dim, dtype)
    # Filled, so that its pages are resident before the measurement and count as output.
    output = torch.full_like(inputs.q, math.nan)
    threads = torch.get_num_threads()
    print(
        f"{arguments.tokens:,} tokens, {arguments.heads} heads of {arguments.head_dim}, "
        f"{arguments.dtype}, causal, {threads} thread{'s' if threads > 1 else ''}"
    )
    measurement = attend(inputs, output, arguments.chunk)
    rows = rows_to_check(arguments.tokens, arguments.chunk)
    error, share = largest_error(inputs, output, rows)
    print_report(inputs, measurement)
    print(
        f"  error         {error:.1e} at most in {len(rows)} sampled rows against float64, "
        f"{share:.0%} of what rounding explains"
    )
    calls = math.ceil(arguments.tokens / arguments.chunk)
    complete = served.all_served(measurement.calls_by_tier, calls)
    if not complete:
        print(
            f"FAILED: tier {served.EXPECTED_TIER} did not serve exactly {calls} calls",
            file=sys.stderr,
        )
    if share > 1:
        print("FAILED: a row differs by more than rounding explains", file=sys.stderr)
    return 0 if complete and share <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
