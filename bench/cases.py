"""What is measured: pairs of the same attention, ours and torch's, with the ratio to reach."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from metal_flash_attn._bench.contenders import prepare
from metal_flash_attn._bench.problem import Problem

Call = Callable[[], object]


class Calls(NamedTuple):
    """What a case measures, with its inputs."""

    ours: Call
    peer: Call
    llama: Call | None = None
    """llama.cpp's attention, where there is a library and it can compute the case."""


@dataclass
class Case:
    """One row of the table."""

    name: str
    prepare: Callable[[], Calls]
    """Makes the inputs, which is left until it is known that the case is wanted."""
    work: float
    """FLOP, or bytes where memory is the limit."""
    unit: Literal["GFLOP/s", "GB/s"] = "GFLOP/s"
    target: float | None = None
    """Ratio to reach with AVX2."""


def of(problem: Problem, target: float | None = None) -> Case:
    """A problem with random inputs, each library in the memory order that it is used with."""
    bound = problem.is_memory_bound

    def calls() -> Calls:
        inputs = prepare(problem)
        return Calls(inputs.our_call(), inputs.stock_call())

    return Case(
        problem.name or _name(problem),
        calls,
        problem.minimal_bytes if bound else problem.flops,
        "GB/s" if bound else "GFLOP/s",
        target,
    )


def _name(problem: Problem) -> str:
    name = f"{problem.dtype} {problem.mask} D{problem.head_dim} L{problem.query_len}"
    if problem.key_len != problem.query_len:
        name += f"x{problem.key_len}"
    if problem.heads != problem.key_heads:
        name += f" H{problem.heads}/{problem.key_heads}"
    return name + (" fwd+bwd" if problem.backward else "")


def prefill(
    dtype: str,
    dim: int,
    query_len: int,
    key_len: int | None = None,
    *,
    causal: bool = False,
    heads: tuple[int, int] = (8, 8),
    target: float | None = None,
) -> Case:
    """Many queries."""
    lengths = (query_len, key_len or query_len)
    return of(Problem(*lengths, *heads, dim, dim, dtype=dtype, causal=causal), target)


def training(dtype: str, dim: int, *, causal: bool = False, target: float | None = None) -> Case:
    """Forward and backward pass: gradients of q, k and v."""
    forward = Problem(1024, 1024, 8, 8, dim, dim, dtype=dtype, causal=causal)
    return of(replace(forward, backward=True), target)


def decode(
    dtype: str,
    heads: tuple[int, int],
    *,
    interleaved: bool = False,
    target: float | None = None,
) -> Case:
    """One query against a long cache in torch's order; in flash_attn's if `interleaved`."""
    problem = Problem(
        1,
        16384,
        *heads,
        128,
        128,
        dtype=dtype,
        layout="tokens" if interleaved else "heads",
        name=f"{dtype} decode {heads[0]}/{heads[1]} 16k"
        + (" [B,S,H,D] cache" if interleaved else ""),
    )
    return of(problem, target)


def window() -> Case:
    """A sliding window, which torch can only have as a boolean mask."""
    problem = Problem(4096, 4096, 8, 8, 64, 64, causal=True, window=(256, 0))
    return of(replace(problem, name="f32 window 256 L4096 against a boolean mask"), 20.0)


def varlen() -> Case:
    """Ragged sequences in one call against the padded batch with a mask."""
    lengths = (1, 900, 37, 410, 8, 250, 640, 120)
    problem = Problem(max(lengths), max(lengths), 8, 8, 64, 64, lengths=lengths)
    return of(replace(problem, name="f32 varlen of 8 ragged sequences against padding"), 5.0)


def one_thread() -> Iterator[Case]:
    """The rows of the one-thread table."""
    yield prefill("f32", 64, 1024, target=1.3)
    yield prefill("f32", 128, 1024, target=1.2)
    for length in (512, 1024, 2048):
        yield prefill("f32", 64, length, causal=True, target=1.7)
    for dtype, target in (("bf16", 1.5), ("f16", 2.2)):
        yield prefill(dtype, 64, 1024, target=target)
        yield prefill(dtype, 128, 1024, target=target)
        yield prefill(dtype, 64, 1024, causal=True)
    yield prefill("f32", 64, 1024, heads=(16, 4))
    yield prefill("f32", 8, 1024, target=3.0)
    yield prefill("f32", 64, 4096, 5, target=1.5)
    yield prefill("f32", 64, 4096, 77)
    yield training("f32", 64, target=1.3)
    yield training("f32", 128, target=1.3)
    yield training("f32", 64, causal=True, target=1.7)
    for dtype in ("bf16", "f16"):
        yield training(dtype, 64, target=6.0)
    yield window()
    yield varlen()
    yield decode("f32", (32, 8), target=3.5)
    yield decode("bf16", (32, 8), target=10.0)
    for dtype in ("f32", "bf16", "f16"):
        yield decode(dtype, (8, 8))
    yield decode("f32", (32, 8), interleaved=True)
    yield decode("bf16", (8, 8), interleaved=True)


def two_threads() -> Iterator[Case]:
    """Cases whose speed is compared between one thread and two."""
    yield prefill("f32", 64, 1024)
    yield prefill("f32", 64, 2048, causal=True)
    yield prefill("bf16", 128, 1024)
    yield decode("f32", (32, 8))
