"""Decode from caches beside torch, which gets every sequence alone and in its own order."""

from collections.abc import Iterator

import torch
from metal_flash_attn import flash_attn_with_kvcache
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .cases import Case

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
HEAD_DIM = 128


def paged(cache: Tensor, page_len: int) -> tuple[Tensor, Tensor]:
    """The rows of `[batch, length, heads, dim]` in pages that lie in any order, and the table."""
    batch, length = cache.shape[:2]
    pages = batch * length // page_len
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    shuffled = torch.empty_like(cache).view(pages, page_len, *cache.shape[2:])
    shuffled[order] = cache.view(pages, page_len, *cache.shape[2:])
    return shuffled, order.int().view(batch, -1)


def decode(
    dtype: str, heads: tuple[int, int], lengths: list[int], page_len: int | None = None
) -> Case:
    """One query for each sequence against the keys that are filled."""
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
    table = None
    if page_len is not None:
        (k, table), (v, _) = paged(k, page_len), paged(v, page_len)

    def ours() -> object:
        return flash_attn_with_kvcache(
            q, k, v, cache_seqlens=filled, block_table=table, causal=True
        )

    def peer() -> object:
        return [sdpa(*tensors, enable_gqa=query_heads != key_heads) for tensors in peers]

    kind = "dense cache" if page_len is None else f"pages of {page_len}"
    size = f"{longest // 1024}k" if len(lengths) == 1 else f"{len(lengths)} ragged"
    row_bytes = key_heads * HEAD_DIM * q.element_size()
    name = f"{dtype} decode {query_heads}/{key_heads} {size}, {kind}"
    return Case(name, ours, peer, 2.0 * sum(lengths) * row_bytes, "GB/s")


RAGGED = [16384, 700, 5000, 9000]


def one_thread() -> Iterator[Case]:
    """Lengths, then what paging and raggedness cost."""
    for length in (4096, 16384, 65536):
        yield decode("f32", (32, 8), [length])
        yield decode("bf16", (32, 8), [length])
    yield decode("f16", (32, 8), [16384])
    for page_len in (256, 16):
        yield decode("f32", (32, 8), [16384], page_len)
        yield decode("bf16", (32, 8), [16384], page_len)
    yield decode("bf16", (8, 8), [16384], 256)
    yield decode("bf16", (32, 8), RAGGED)
    yield decode("bf16", (32, 8), RAGGED, 256)
