"""Packing of padded batches and back, after `flash_attn.bert_padding` 2.8.

A padded batch `[batch, length, ...]` is packed into `[tokens, ...]`: the valid tokens of all
sequences end to end, as the varlen functions want them. Everything is differentiable.
"""

# ruff: noqa: A002 (the names of arguments are flash_attn's)

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of a tensor.

    Args:
        input: `[rows, ...]`.
        indices: `[count]`, int64 or int32.

    Returns:
        `[count, ...]`. Where an index repeats, the gradients of its copies add up.
    """
    return torch.index_select(input, 0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Rows put into a tensor of zeros.

    Args:
        values: `[count, ...]`.
        indices: `[count]`, int64 or int32; which row of the result each row of `values` becomes.
        first_axis_dim: number of rows of the result.

    Returns:
        `[first_axis_dim, ...]`, zero in the rows that no index names.
    """
    zeros = values.new_zeros(first_axis_dim, *values.shape[1:])
    return zeros.index_put((indices,), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`index_first_axis` together with a view of the whole input for a residual connection.

    Args:
        input: `[rows, ...]`.
        indices: `[count]`, int64 or int32.

    Returns:
        The rows, `[count, ...]`, and `input` as a view.
    """
    return index_first_axis(input, indices), input.view_as(input)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens that a mask keeps.

    Args:
        hidden_states: `[batch, length, ...]`.
        attention_mask: `[batch, length]`, bool or integer; nonzero marks a valid token.
        unused_mask: `[batch, length]`, bool or integer; nonzero marks a token that is packed as
            well although no attention may use it.

    Returns:
        The tokens `[tokens, ...]`; their places in the flattened batch, int64 `[tokens]`; the
        cumulative sequence lengths, int32 `[batch + 1]`; the longest sequence; and the number of
        valid tokens of each sequence, int32 `[batch]`.
    """
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    packed, indices = _pack(hidden_states, kept)
    cu_seqlens, max_seqlen = _cumulative(kept.sum(dim=-1, dtype=torch.int32))
    return packed, indices, cu_seqlens, max_seqlen, used.sum(dim=-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pack a batch whose rows hold several short sequences one after the other.

    Args:
        hidden_states: `[batch, length, ...]`.
        attention_mask_in_length: `[batch, length]`, integer. The nonzero entries of a row are the
            lengths of its sequences, in order; `[2, 3, 0, 0, 0, 0]` is a row of length 6 with a
            sequence of 2 tokens, one of 3, and one token of padding.

    Returns:
        The tokens `[tokens, ...]`; their places in the flattened batch, int64 `[tokens]`; the
        cumulative sequence lengths, int32 `[sequences + 1]`; and the longest sequence.
    """
    positions = torch.arange(attention_mask_in_length.shape[-1], device=hidden_states.device)
    kept = positions < attention_mask_in_length.sum(dim=-1, keepdim=True)
    packed, indices = _pack(hidden_states, kept)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    return packed, indices, *_cumulative(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undo `unpad_input`.

    Args:
        hidden_states: `[tokens, ...]`.
        indices: `[tokens]`, int64 or int32: the second value that `unpad_input` returned.
        batch: number of sequences.
        seqlen: padded length of each.

    Returns:
        `[batch, seqlen, ...]`, zero where a token was left out.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.reshape(batch, seqlen, *hidden_states.shape[1:])


def _pack(hidden_states: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    indices = kept.flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices


def _cumulative(lengths: Tensor) -> tuple[Tensor, int]:
    ends = lengths.cumsum(dim=0, dtype=torch.int32)
    longest = int(lengths.max()) if lengths.numel() else 0
    return torch.nn.functional.pad(ends, (1, 0)), longest
