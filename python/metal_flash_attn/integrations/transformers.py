"""An attention implementation for Hugging Face transformers.

    from metal_flash_attn.integrations import transformers as adapter

    adapter.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=adapter.NAME)

It takes what eager attention takes: padding and any other pattern through the mask that
transformers makes; sliding windows as windows, where nothing else hides a key; softcap, sinks and
position biases through arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from metal_flash_attn.interface import attention

from ._paged import attend_paged
from ._window_mask import WindowMask, window_mask

NAME = "metal_attention"
"""What to pass as `attn_implementation`. transformers takes any name with "flash" in it for one of
its flash attentions, which get packed inputs and no masks."""


def register(name: str = NAME) -> str:
    """Makes the implementation known to transformers.

    Args:
        name: what models will know it by; must not contain "flash", see `NAME`.

    Returns:
        The name.
    """
    if "flash" in name:
        raise ValueError(
            f'name is {name!r}; allowed: one without "flash", which transformers takes for an '
            "attention with packed inputs"
        )
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, window_mask)
    return name


PAGED_NAME = "metal_flash_paged"
"""The name for continuous batching, which transformers allows for names with "flash" alone."""


def use_for_continuous_batching(model: PreTrainedModel) -> None:
    """Lets `model.generate_batch` and the continuous batching manager attend by this package.

    `model.set_attn_implementation` would look for the name on the model hub.
    """
    AttentionInterface.register(PAGED_NAME, attention_forward)
    model.config._attn_implementation = PAGED_NAME


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that models call.

    Args:
        module: the layer; its `is_causal` counts where the argument is None.
        query: `[B, H, Lq, D]`.
        key: `[B, Hk, Lk, D]`.
        value: `[B, Hk, Lk, Dv]`.
        attention_mask: broadcastable to `[B, H, Lq, Lk]`, bool (True shows a key) or additive; a
            `WindowMask` is served as a window. Without one, causal attention starts at the first
            key.
        dropout, scaling, softcap: of the scores.
        s_aux: sinks `[H]`, one more logit of each head.
        position_bias: added to the scores.
        cache: the paged cache of continuous batching; `query`, `key` and `value` are the new tokens
            of all requests behind one another then.
        kwargs: whatever else models pass.

    Returns:
        out `[B, Lq, H, Dv]`, contiguous, and None for the weights, which are never held.

    Raises:
        NotImplementedError: for softcap or sinks with dropout.
    """
    if cache is not None:
        sliding = kwargs.get("sliding_window")
        scores = {
            "softmax_scale": scaling,
            "softcap": softcap or 0.0,
            "window_size": (-1 if sliding is None else sliding - 1, -1),
            "sinks": None if s_aux is None else s_aux.detach().float(),
        }
        return attend_paged(module, query, key, value, cache, scores, kwargs), None
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if dropout > 0:
        if softcap is not None or s_aux is not None:
            raise NotImplementedError(
                "softcap and s_aux are not supported with dropout; use attn_implementation='eager'"
            )
        # fmt: off
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, position_bias=position_bias, **kwargs,
        )
        # fmt: on
    window, causal = (-1, -1), attention_mask is None and is_causal and query.shape[2] > 1
    if isinstance(attention_mask, WindowMask) and position_bias is None:
        window, attention_mask = attention_mask.window, None
    mask, bias = _mask_and_bias(attention_mask, position_bias, key.shape[2])
    out: Tensor = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        # As transformers uses torch's function: a mask holds the causal pattern, and one query
        # is the last one.
        causal=causal,
        window_size=window,
        top_left=query.shape[2] > 1,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        mask=mask,
        bias=bias,
        sinks=None if s_aux is None else s_aux.float(),
    )
    return out.contiguous(), None


def _mask_and_bias(
    attention_mask: Tensor | None, position_bias: Tensor | None, key_len: int
) -> tuple[Tensor | None, Tensor | None]:
    """A boolean mask or an additive bias, cropped to the keys that there are."""
    if attention_mask is not None:
        attention_mask = attention_mask[..., :key_len]
    if position_bias is None:
        if attention_mask is None or attention_mask.dtype == torch.bool:
            return attention_mask, None
        return None, attention_mask
    position_bias = position_bias[..., :key_len]
    if attention_mask is None:
        return None, position_bias
    if attention_mask.dtype == torch.bool:
        return None, position_bias.masked_fill(~attention_mask, -torch.inf)
    return None, position_bias + attention_mask
