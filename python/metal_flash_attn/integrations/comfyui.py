"""Attention for ComfyUI: for one model, or by name for nodes that choose.

    from metal_flash_attn.integrations import comfyui as adapter

    model = model.clone()
    adapter.override(model)

`--use-flash-attention` needs no adapter: ComfyUI finds this package as `flash_attn`, see
docs/shim.md. It leaves masked calls to torch, this adapter serves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metal_flash_attn.interface import attention

NAME = "metal_attention"
"""What `register` calls the function."""

_KEY = "optimized_attention_override"

# What ComfyUI passes along that asks for nothing that is not done anyway.
_HARMLESS = {"transformer_options", "_inside_attn_wrapper", "low_precision_attention"}


def override(model: Any) -> None:
    """Lets one model compute its attention with this package.

    Args:
        model: a `ModelPatcher`, cloned before if others are to keep theirs, or its `model_options`.
    """
    options = model if isinstance(model, dict) else model.model_options
    # A copy: clones share the inner dictionary.
    options["transformer_options"] = {
        **options.get("transformer_options", {}),
        _KEY: attention_override,
    }


def register(name: str = NAME) -> str:
    """Makes the function known to nodes that choose an attention by its name.

    Returns:
        The name.

    Raises:
        ImportError: outside of ComfyUI.
    """
    from comfy.ldm.modules import attention as comfy_attention  # noqa: PLC0415

    comfy_attention.register_attention_function(name, attention_function)
    return name


def attention_override(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """What ComfyUI calls instead of `function`, which gets the calls that are not served."""
    if not _is_served(q, k, v, kwargs):
        return function(q, k, v, *args, **kwargs)
    return attention_function(q, k, v, *args, **kwargs)


def attention_function(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Attention with ComfyUI's arguments.

    Args:
        q: `[B, Lq, H * D]`, or `[B, H, Lq, D]` with `skip_reshape`.
        k: `[B, Lk, H * D]`, or `[B, Hk, Lk, D]`.
        v: like k.
        heads: H.
        mask: bool or additive, `[Lq, Lk]`, `[B, Lq, Lk]` or `[B, H, Lq, Lk]`, where sizes may be 1.
        attn_precision: accepted; sums and softmax are float32 anyway.
        skip_reshape: q, k and v come with heads apart.
        skip_output_reshape: out leaves with heads apart.
        scale: factor on the scores; `D ** -0.5` if None.
        enable_gqa: accepted; Hk may divide H in any case.
        kwargs: whatever else ComfyUI passes.

    Returns:
        `[B, Lq, H * D]`, or `[B, H, Lq, D]` with `skip_output_reshape`.
    """
    del attn_precision, enable_gqa, kwargs
    if skip_reshape:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    else:
        q, k, v = (tensor.unflatten(-1, (heads, -1)) for tensor in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
    is_boolean = mask is not None and mask.dtype == torch.bool
    out: Tensor = attention(
        q,
        k,
        v,
        softmax_scale=scale,
        mask=mask if is_boolean else None,
        bias=None if is_boolean else mask,
    )
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)


def _is_served(q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> bool:
    known = {"heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape"}
    if set(kwargs) - known - _HARMLESS - {"scale", "enable_gqa"}:
        return False
    dtypes = {torch.float32, torch.float16, torch.bfloat16}
    if q.device.type not in {"mps", "cpu"} or q.dtype not in dtypes:
        return False
    if not (q.dtype == k.dtype == v.dtype):
        return False
    return not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
