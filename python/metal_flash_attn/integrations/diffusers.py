"""Attention for Hugging Face diffusers, in the place of its `native` backend.

    from metal_flash_attn.integrations import diffusers as adapter

    adapter.register()

Backends are members of an enumeration that cannot be extended, so this one takes the place of
`native`, the default, and hands on what it does not serve. The backends `flash` and `flash_varlen`
need no adapter: they find this package as `flash_attn`, see docs/shim.md.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from metal_flash_attn.interface import attention

_NATIVE = AttentionBackendName.NATIVE
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _State:
    """diffusers' own function while ours is in its place."""

    replaced: Any = None


def register() -> bool:
    """Lets the `native` backend compute with this package, for the process.

    Returns:
        Whether anything changed.
    """
    if _State.replaced is not None:
        return False
    _State.replaced = _AttentionBackendRegistry._backends[_NATIVE]
    _put(native_attention)
    return True


def unregister() -> bool:
    """Gives the `native` backend its own function back.

    Returns:
        Whether anything changed.
    """
    if _State.replaced is None:
        return False
    _put(_State.replaced)
    _State.replaced = None
    return True


def _put(function: Any) -> None:
    _AttentionBackendRegistry._backends[_NATIVE] = function
    names = inspect.signature(function).parameters
    _AttentionBackendRegistry._supported_arg_names[_NATIVE] = set(names)


def native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """The backend function that models call.

    Args:
        query: `[B, Lq, H, D]`.
        key: `[B, Lk, Hk, D]`.
        value: `[B, Lk, Hk, Dv]`.
        attn_mask: bool or additive, broadcastable to `[B, H, Lq, Lk]`, or `[B, Lk]` over the keys.
        dropout_p, is_causal, scale, enable_gqa: as in torch.
        return_lse: left to diffusers, which refuses it.
        _parallel_config: calls with context parallelism are left to diffusers.

    Returns:
        out `[B, Lq, H, Dv]`.
    """
    if not _is_served(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa) or (
        return_lse or _parallel_config is not None
    ):
        # fmt: off
        return _State.replaced(
            query=query, key=key, value=value, attn_mask=attn_mask, dropout_p=dropout_p,
            is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, return_lse=return_lse,
            _parallel_config=_parallel_config,
        )
        # fmt: on
    mask = attn_mask
    if mask is not None and mask.shape == (query.shape[0], key.shape[1]):
        mask = mask[:, None, None, :]
    is_boolean = mask is not None and mask.dtype == torch.bool
    return attention(
        query,
        key,
        value,
        causal=is_causal,
        top_left=True,
        softmax_scale=scale,
        mask=mask if is_boolean else None,
        bias=None if is_boolean else mask,
    )


def _is_served(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    tensors = [query, key, value] + ([] if attn_mask is None else [attn_mask])
    if query.device.type not in {"mps", "cpu"} or query.dtype not in _DTYPES:
        return False
    if dropout_p > 0 or (attn_mask is not None and is_causal):
        return False
    if attn_mask is not None and attn_mask.dtype not in {torch.bool, torch.float32, query.dtype}:
        return False
    if torch.is_autocast_enabled(query.device.type):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return enable_gqa or query.shape[2] == key.shape[2]
