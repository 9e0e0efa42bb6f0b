"""The `flash_attn_unpadded_*` functions of flash_attn 1.x, on the varlen functions of 2.8.

Projects that support both look for these names first or fall back to them, and then call them as
1.x wanted. Two things changed between the versions besides the order of the arguments. Up to 2.0 a
causal mask began at the top left, since 2.1 it ends at the bottom right, which is the same only
where every sequence has as many queries as keys. And 1.x returned probabilities without dropout.
Both are refused, because the answer of 2.8 would be a different one.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from metal_flash_attn import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def flash_attn_unpadded_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """`flash_attn_varlen_func` under its name and with the arguments of 1.x.

    Returns:
        `[tokens, heads, head_dim]`.

    Raises:
        NotImplementedError: `causal` with sequences that have more or fewer keys than queries, or
            `return_attn_probs`.
        Whatever `flash_attn_varlen_func` raises.
    """
    _check(return_attn_probs, "flash_attn_varlen_func")
    _check_causal(causal, cu_seqlens_q, cu_seqlens_k, "flash_attn_varlen_func")
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        deterministic=deterministic,
    )
    return cast("Tensor", out)


def flash_attn_unpadded_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """`flash_attn_varlen_kvpacked_func` under its name and with the arguments of 1.x.

    Returns:
        `[tokens, heads, head_dim]`.

    Raises:
        NotImplementedError: `causal` with sequences that have more or fewer keys than queries, or
            `return_attn_probs`.
        Whatever `flash_attn_varlen_kvpacked_func` raises.
    """
    _check(return_attn_probs, "flash_attn_varlen_kvpacked_func")
    _check_causal(causal, cu_seqlens_q, cu_seqlens_k, "flash_attn_varlen_kvpacked_func")
    out = flash_attn_varlen_kvpacked_func(
        q,
        kv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        deterministic=deterministic,
    )
    return cast("Tensor", out)


def flash_attn_unpadded_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """`flash_attn_varlen_qkvpacked_func` under its name and with the arguments of 1.x.

    Returns:
        `[tokens, heads, head_dim]`.

    Raises:
        NotImplementedError: `return_attn_probs` is set.
        Whatever `flash_attn_varlen_qkvpacked_func` raises.
    """
    _check(return_attn_probs, "flash_attn_varlen_qkvpacked_func")
    out = flash_attn_varlen_qkvpacked_func(
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        deterministic=deterministic,
    )
    return cast("Tensor", out)


def _check(return_attn_probs: bool, successor: str) -> None:
    if return_attn_probs:
        raise NotImplementedError(
            "return_attn_probs: the probabilities of flash_attn 1.x are not available; "
            f"{successor}(..., return_attn_probs=True) returns the log-sum-exp"
        )


def _check_causal(causal: bool, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, successor: str) -> None:
    # The comparison waits for a GPU, so the usual case of one tensor for both does without it.
    if not causal or cu_seqlens_q is cu_seqlens_k or torch.equal(cu_seqlens_q, cu_seqlens_k):
        return
    raise NotImplementedError(
        "causal: with different lengths of queries and keys the mask of flash_attn 1.x begins at "
        f"the top left, which is not supported; {successor} aligns it to the bottom right"
    )
