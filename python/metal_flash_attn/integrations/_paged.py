"""Attention over the paged cache of transformers' continuous batching.

Requests lie behind one another in one batch of packed queries. The cache either gathers all keys
of every request, or hands out its pages with a block table, where each request has one query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from metal_flash_attn._cache_ops import traced
from metal_flash_attn._native import attend_cached
from metal_flash_attn.interface import attention


def attend_paged(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    scores: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """Puts new keys into the cache, and attends to all of each request.

    Args:
        module: the layer, with its `layer_idx`.
        query: `[1, H, T, D]`, the new tokens of all requests.
        key: `[1, Hk, T, D]`.
        value: `[1, Hk, T, Dv]`.
        cache: `PagedAttentionCache` of transformers.
        scores: `softmax_scale`, `softcap` and `window_size` of `attention`, and `sinks`.
        kwargs: what transformers says about the batch.

    Returns:
        `[1, T, H, Dv]`.
    """
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
    )
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    ends = kwargs["cu_seq_lens_k"]
    if kwargs.get("block_table") is not None:
        return _attend_pages(q, k, v, ends, scores, kwargs).transpose(0, 1)
    out: Tensor = attention(
        q,
        k,
        v,
        causal=True,
        cu_seqlens_q=kwargs["cu_seq_lens_q"].to(torch.int32),
        cu_seqlens_k=ends,
        max_seqlen_q=int(kwargs["max_length_q"]),
        max_seqlen_k=int(kwargs["max_length_k"]),
        **scores,
    )
    return out.unsqueeze(0)


def _attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    scores: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    """One new token of each request, `[requests, heads, dim]`, over the pages of the cache."""
    requests = q.shape[0]
    # The lengths of transformers count the new token, which is not in the cache yet.
    filled = ends[1 : requests + 1] - ends[:requests] - 1
    # The public function has no sinks.
    attend = traced if is_dynamo_compiling() else attend_cached
    # fmt: off
    out: Tensor = attend(
        True, q.unsqueeze(1), kwargs["k_cache"], kwargs["v_cache"], k.unsqueeze(1), v.unsqueeze(1),
        None, None, filled.to(torch.int32), None, None, kwargs["block_table"][:requests], None,
        None, 0, None, scores["softmax_scale"], True, scores["window_size"], scores["softcap"],
        True, None, scores["sinks"], False, 0, False,
    )
    # fmt: on
    return out
