"""What is measured: pairs of the same attention, ours and torch's.

Each library gets the memory order it is used with: ours `[batch, seqlen, heads, head_dim]`, torch's
`[batch, heads, seqlen, head_dim]`, both contiguous. Decode cases read one cache in torch's order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from metal_flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

SHORT_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Case:
    """One row of the table."""

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    work: float
    """FLOP, or bytes of K and V where memory is the limit."""
    unit: Literal["GFLOP/s", "GB/s"] = "GFLOP/s"
    target: float | None = None
    """Ratio to reach with AVX2."""


def transposed(*tensors: Tensor) -> list[Tensor]:
    """The same values in torch's memory order."""
    return [tensor.transpose(1, 2).contiguous() for tensor in tensors]


def prefill(
    dtype: torch.dtype,
    dim: int,
    query_len: int,
    key_len: int | None = None,
    *,
    causal: bool = False,
    heads: tuple[int, int] = (8, 8),
    target: float | None = None,
) -> Case:
    """Many queries."""
    key_len = key_len or query_len
    q = torch.randn(1, query_len, heads[0], dim).to(dtype)
    k, v = (torch.randn(1, key_len, heads[1], dim).to(dtype) for _ in range(2))
    tq, tk, tv = transposed(q, k, v)
    gqa = heads[0] != heads[1]
    name = f"{SHORT_NAMES[dtype]} {'causal' if causal else 'full'} D{dim} L{query_len}"
    name += f"x{key_len}" if key_len != query_len else ""
    name += f" H{heads[0]}/{heads[1]}" if gqa else ""
    flops = 4.0 * heads[0] * query_len * key_len * dim / (2 if causal else 1)
    return Case(
        name,
        lambda: flash_attn_func(q, k, v, causal=causal),
        lambda: sdpa(tq, tk, tv, is_causal=causal, enable_gqa=gqa),
        flops,
        target=target,
    )


def training(
    dtype: torch.dtype,
    dim: int,
    length: int = 1024,
    *,
    causal: bool = False,
    target: float | None = None,
) -> Case:
    """Forward and backward pass: gradients of q, k and v."""
    inputs = [torch.randn(1, length, 8, dim).to(dtype).requires_grad_() for _ in range(3)]
    gradient = torch.randn(1, length, 8, dim).to(dtype)
    peers = [tensor.detach().requires_grad_() for tensor in transposed(*inputs)]
    (peer_gradient,) = transposed(gradient)
    q, k, v = inputs
    tq, tk, tv = peers
    name = f"{SHORT_NAMES[dtype]} {'causal' if causal else 'full'} D{dim} L{length} fwd+bwd"
    return Case(
        name,
        lambda: torch.autograd.grad(flash_attn_func(q, k, v, causal=causal), inputs, gradient),
        lambda: torch.autograd.grad(sdpa(tq, tk, tv, is_causal=causal), peers, peer_gradient),
        # Two products forward, five backward.
        14.0 * 8 * length * length * dim / (2 if causal else 1),
        target=target,
    )


def decode(
    dtype: torch.dtype,
    heads: tuple[int, int],
    key_len: int = 16384,
    *,
    interleaved: bool = False,
    target: float | None = None,
) -> Case:
    """One query against a long cache; `interleaved`: ours reads a cache in flash_attn's order."""
    q = torch.randn(1, heads[0], 1, 128).to(dtype)
    k, v = (torch.randn(1, heads[1], key_len, 128).to(dtype) for _ in range(2))
    own_q, own_k, own_v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if interleaved:
        own_q, own_k, own_v = own_q.contiguous(), own_k.contiguous(), own_v.contiguous()
    gqa = heads[0] != heads[1]
    return Case(
        f"{SHORT_NAMES[dtype]} decode {heads[0]}/{heads[1]} {key_len // 1024}k"
        + (" [B,S,H,D] cache" if interleaved else ""),
        lambda: flash_attn_func(own_q, own_k, own_v),
        lambda: sdpa(q, k, v, enable_gqa=gqa),
        2.0 * k.numel() * k.element_size(),
        "GB/s",
        target,
    )


def window(query_len: int = 4096, size: int = 256) -> Case:
    """A sliding window, which torch can only have as a boolean mask."""
    q, k, v = (torch.randn(1, query_len, 8, 64) for _ in range(3))
    tq, tk, tv = transposed(q, k, v)
    position = torch.arange(query_len)
    distance = position[:, None] - position[None, :]
    mask = (distance >= 0) & (distance <= size)
    return Case(
        f"f32 window {size} L{query_len} against a boolean mask",
        lambda: flash_attn_func(q, k, v, causal=True, window_size=(size, 0)),
        lambda: sdpa(tq, tk, tv, attn_mask=mask),
        4.0 * 8 * 64 * int(mask.sum()),
        target=20.0,
    )


def varlen() -> Case:
    """Ragged sequences in one call against the padded batch with a mask."""
    lengths = torch.tensor([1, 900, 37, 410, 8, 250, 640, 120])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    q, k, v = (torch.randn(int(offsets[-1]), 8, 64) for _ in range(3))
    longest = int(lengths.max())
    padded = [torch.zeros(len(lengths), longest, 8, 64) for _ in range(3)]
    for index, (start, end) in enumerate(pairwise(offsets.tolist())):
        for tensor, ragged in zip(padded, (q, k, v), strict=True):
            tensor[index, : end - start] = ragged[start:end]
    tq, tk, tv = transposed(*padded)
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None, :]
    return Case(
        "f32 varlen of 8 ragged sequences against padding",
        lambda: flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest),
        lambda: sdpa(tq, tk, tv, attn_mask=mask),
        4.0 * 8 * 64 * float((lengths**2).sum()),
        target=5.0,
    )


def one_thread() -> Iterator[Case]:
    """The rows of the one-thread table."""
    f32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    yield prefill(f32, 64, 1024, target=1.3)
    yield prefill(f32, 128, 1024, target=1.2)
    for length in (512, 1024, 2048):
        yield prefill(f32, 64, length, causal=True, target=1.7)
    for dtype, target in ((bf16, 1.5), (fp16, 2.2)):
        yield prefill(dtype, 64, 1024, target=target)
        yield prefill(dtype, 128, 1024, target=target)
        yield prefill(dtype, 64, 1024, causal=True)
    yield prefill(f32, 64, 1024, heads=(16, 4))
    yield prefill(f32, 8, 1024, target=3.0)
    yield prefill(f32, 64, 4096, 5, target=1.5)
    yield prefill(f32, 64, 4096, 77)
    yield training(f32, 64, target=1.3)
    yield training(f32, 128, target=1.3)
    yield training(f32, 64, causal=True, target=1.7)
    for dtype in (bf16, fp16):
        yield training(dtype, 64, target=6.0)
    yield window()
    yield varlen()
    yield decode(f32, (32, 8), target=3.5)
    yield decode(bf16, (32, 8), target=10.0)
    for dtype in (f32, bf16, fp16):
        yield decode(dtype, (8, 8))
    yield decode(f32, (32, 8), interleaved=True)
    yield decode(bf16, (8, 8), interleaved=True)


def two_threads() -> Iterator[Case]:
    """Cases whose speed is compared between one thread and two."""
    yield prefill(torch.float32, 64, 1024)
    yield prefill(torch.float32, 64, 2048, causal=True)
    yield prefill(torch.bfloat16, 128, 1024)
    yield decode(torch.float32, (32, 8))
