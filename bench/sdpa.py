"""`python -m bench.sdpa`: patched scaled_dot_product_attention on CPU tensors beside stock torch.

Prints the tables of docs/sdpa.md: ratios of torch's CPU time to ours, one thread, interleaved in
one process. Gates are open for every call: those below the thresholds are measured, too.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from metal_flash_attn import sdpa
from metal_flash_attn._bench.timing import CPU_TIME, interleave, medians
from rich.progress import track
from torch import Tensor

from .__main__ import restart_with
from .report import Section
from .tables import machine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STOCK = torch._C._nn.scaled_dot_product_attention


@dataclass(frozen=True)
class Call:
    """One sequence of a batch of 1."""

    query_len: int
    key_len: int
    heads: int = 8
    key_heads: int = 8
    dim: int = 64
    value_dim: int = 64
    causal: bool = False
    mask: tuple[int, int] | None = None
    """Shape of a boolean mask that hides a tenth."""
    backward: bool = False

    def of(self, function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], object]:
        """The call of one library, with the same inputs for each."""
        generator = torch.Generator().manual_seed(0)
        shapes = (
            (1, self.heads, self.query_len, self.dim),
            (1, self.key_heads, self.key_len, self.dim),
            (1, self.key_heads, self.key_len, self.value_dim),
        )
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        mask = None if self.mask is None else torch.rand(self.mask, generator=generator) > 0.1
        gqa = self.heads != self.key_heads
        call = partial(function, *tensors, mask, 0.0, self.causal, enable_gqa=gqa)
        if not self.backward:
            return call
        for tensor in tensors:
            tensor.requires_grad_()
        grad_out = torch.randn_like(call())
        return lambda: torch.autograd.grad(call(), tensors, grad_out)


def square(length: int, **options: int) -> Call:
    """As many queries as keys."""
    return Call(length, length, **options)  # type: ignore[arg-type]


def with_causal(call: Call) -> list[Call]:
    """A call, and the same with a causal mask."""
    return [call, replace(call, causal=True)]


def masked(length: int) -> list[Call]:
    """A boolean mask for every score, and one for keys only."""
    return [replace(square(length), mask=shape) for shape in ((length, length), (1, length))]


def forward_rows() -> Iterator[tuple[str, list[Call]]]:
    """The rows of the first table: a name and its calls."""
    yield "16 queries and keys, 4 heads", [square(16, heads=4, key_heads=4)]
    yield "64", [square(64)]
    yield "256 / causal", with_causal(square(256))
    yield "1024 / causal", with_causal(square(1024))
    yield "1024 of 128 / causal", with_causal(square(1024, dim=128, value_dim=128))
    yield "512, boolean mask / of keys only", masked(512)
    yield "512, v half as wide", [square(512, value_dim=32)]
    few = Call(1, 1024)
    grouped = replace(few, heads=32, dim=128, value_dim=128)
    yield "1 query, 1024 keys / 32 heads of 128 over 8", [few, grouped]


def backward_rows() -> Iterator[tuple[str, list[Call]]]:
    """The rows of the second table."""
    for name, calls in [
        ("64 queries and keys: below the threshold", [square(64)]),
        ("128", [square(128)]),
        ("256 / causal", with_causal(square(256))),
        ("1024 / causal", with_causal(square(1024))),
        ("512 of 128 / causal", with_causal(square(512, dim=128, value_dim=128))),
        ("512, boolean mask / of keys only", masked(512)),
    ]:
        yield name, [replace(call, backward=True) for call in calls]


def ratio(call: Call, dtype: torch.dtype, seconds: float) -> str:
    """How many times the time of ours torch takes."""
    contenders = [call.of(own, dtype) for own in (sdpa.scaled_dot_product_attention, STOCK)]
    ours, stock = medians(interleave(contenders, CPU_TIME, seconds))
    return f"{stock / ours:.2f}"


def table(title: str, rows: Iterator[tuple[str, list[Call]]], seconds: float) -> Section:
    """One table of ratios."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    section = Section(title, ["8 heads of 64 unless it says otherwise", *names], machine())
    for name, calls in track(list(rows), title, transient=True):
        cells = [" / ".join(ratio(call, dtype, seconds) for call in calls) for dtype in DTYPES]
        section.rows.append([name, *cells])
    return section


def main() -> None:
    """Measures both tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.sdpa", description=__doc__)
    parser.add_argument("--isa", choices=["avx2", "native"], default="native")
    parser.add_argument("--seconds", type=float, default=0.5, help="per call (default 0.5)")
    options = parser.parse_args()
    restart_with(options.isa, "bench.sdpa")
    torch.set_num_threads(1)
    os.environ["MTLFLASHATTN_SDPA"] = "on"
    with sdpa.patched(cpu=True):
        table("Forward", forward_rows(), options.seconds).show()
        table("Forward and backward", backward_rows(), options.seconds).show()


if __name__ == "__main__":
    main()
