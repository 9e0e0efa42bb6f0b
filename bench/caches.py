"""Decode from caches beside torch, which gets every sequence alone and in its own order."""

from collections.abc import Iterator
from functools import partial

import torch
from metal_flash_attn import flash_attn_with_kvcache
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .cases import Calls, Case
from .llama import Ggml, largest_error

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
HEAD_DIM = 128
CHECKED_KEYS = (64, 512)
"""Few, where bounds of a sum in float16 show a single wrong key, and enough for the other path."""
library: Ggml | None = None
"""llama.cpp's library, where the user has given one."""


def paged(cache: Tensor, page_len: int) -> tuple[Tensor, Tensor]:
    """The rows of `[batch, length, heads, dim]` in pages that lie in any order, and the table."""
    batch, length = cache.shape[:2]
    pages = batch * length // page_len
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    shuffled = torch.empty_like(cache).view(pages, page_len, *cache.shape[2:])
    shuffled[order] = cache.view(pages, page_len, *cache.shape[2:])
    return shuffled, order.int().view(batch, -1)


def decode(
    dtype: str,
    heads: tuple[int, int],
    lengths: list[int],
    page_len: int | None = None,
    target: float | None = None,
) -> Case:
    """One query for each sequence against the keys that are filled."""
    query_heads, key_heads = heads
    longest = max(lengths)
    kind = "dense cache" if page_len is None else f"pages of {page_len}"
    size = f"{longest // 1024}k" if len(lengths) == 1 else f"{len(lengths)} ragged"
    row_bytes = key_heads * HEAD_DIM * DTYPES[dtype].itemsize
    return Case(
        f"{dtype} decode {query_heads}/{key_heads} {size}, {kind}",
        partial(_calls, dtype, heads, lengths, page_len),
        2.0 * sum(lengths) * row_bytes,
        "GB/s",
        target,
    )


def _calls(dtype: str, heads: tuple[int, int], lengths: list[int], page_len: int | None) -> Calls:
    query_heads, key_heads = heads
    longest = max(lengths)
    shape = (len(lengths), longest, key_heads, HEAD_DIM)
    k, v = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(2))
    q = torch.randn(len(lengths), 1, query_heads, HEAD_DIM).to(DTYPES[dtype])
    filled = torch.tensor(lengths, dtype=torch.int32)
    queries = q.transpose(1, 2)

    def alone(tensor: Tensor) -> list[Tensor]:
        parts = enumerate(lengths)
        return [tensor[[b], :length].transpose(1, 2).contiguous() for b, length in parts]

    peers = [(queries[[b]], *keys) for b, keys in enumerate(zip(alone(k), alone(v), strict=True))]
    theirs = None
    if library is not None and len(lengths) == 1 and page_len is None:
        theirs = library.decode(q, k, v, longest)
        _check(library, q, k, v)
    table = None
    if page_len is not None:
        (k, table), (v, _) = paged(k, page_len), paged(v, page_len)

    def ours() -> object:
        return flash_attn_with_kvcache(
            q, k, v, cache_seqlens=filled, block_table=table, causal=True
        )

    def peer() -> object:
        return [sdpa(*tensors, enable_gqa=query_heads != key_heads) for tensors in peers]

    return Calls(ours, peer, theirs)


def _check(library: Ggml, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises an error where llama.cpp's numbers are not ours within rounding."""
    for count in CHECKED_KEYS:
        filled = torch.tensor([count], dtype=torch.int32)
        ours = flash_attn_with_kvcache(q, k, v, cache_seqlens=filled, causal=True)
        theirs = library.decode(q, k, v, count)()
        error = largest_error(q, k[:, :count], v[:, :count], theirs, ours)
        if not error <= 1:
            raise RuntimeError(f"llama.cpp disagrees: {error:.3g} of what rounding can account for")


RAGGED = [16384, 700, 5000, 9000]


def one_thread() -> Iterator[Case]:
    """Lengths, then what paging and raggedness cost."""
    for length in (4096, 16384, 65536):
        yield decode("f32", (32, 8), [length], target=5.0)
        yield decode("bf16", (32, 8), [length], target=15.0)
    yield decode("f16", (32, 8), [16384])
    for page_len in (256, 16):
        yield decode("f32", (32, 8), [16384], page_len)
        yield decode("bf16", (32, 8), [16384], page_len)
    yield decode("bf16", (8, 8), [16384], 256)
    yield decode("bf16", (32, 8), RAGGED)
    yield decode("bf16", (32, 8), RAGGED, 256)
