"""metal_flash_attn as an attention implementation of transformers.

BERT calls the attention interface from transformers 5.0 on; before, it has attention of its own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from metal_flash_attn import flash_attn_func, flash_attn_varlen_func
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

# Without the word "flash": transformers takes a name that contains it for a package or kernel of
# its own list and tries to import that.
NAME = "metal_fa"


def flash_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer.

    query, key, value: `[batch, heads, tokens, head_dim]`, as transformers holds them.
    attention_mask: bool `[batch, tokens]`, false at padding, or None where nothing is padded.
    Returns the output as `[batch, tokens, heads, head_dim]` (zero at padding), and no weights.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    causal = bool(getattr(module, "is_causal", False))
    if attention_mask is None:
        output = flash_attn_func(query, key, value, dropout, scaling, causal)
        return cast("torch.Tensor", output), None

    if query.shape[:2] != attention_mask.shape or key.shape[:2] != attention_mask.shape:
        raise NotImplementedError(
            f"attention_mask of shape {tuple(attention_mask.shape)} must cover queries of shape "
            f"{tuple(query.shape)} and keys of shape {tuple(key.shape)}: self-attention only"
        )
    # The padding is dropped instead of masked: sequences stand end to end, cu_seqlens says where.
    lengths = attention_mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    packed = flash_attn_varlen_func(
        query[attention_mask],
        key[attention_mask],
        value[attention_mask],
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=causal,
    )
    padded = query.new_zeros(query.shape)
    padded[attention_mask] = cast("torch.Tensor", packed)
    return padded, None


def register() -> None:
    """Make `attn_implementation="metal_fa"` known to transformers.

    The mask function is transformers' own for FlashAttention: it hands the padding mask on as it
    is, and None where nothing is padded.
    """
    AttentionInterface.register(NAME, flash_attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
