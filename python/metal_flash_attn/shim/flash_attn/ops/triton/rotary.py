"""Rotary position embedding, after `flash_attn.ops.triton.rotary` 2.8.

Su et al., https://arxiv.org/abs/2104.09864: the pair `(a, b)` of a token at position p becomes
`(a * cos - b * sin, a * sin + b * cos)`, with the row p of the tables `cos` and `sin`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metal_flash_attn._ops import check_operand

__all__ = ["apply_rotary"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate the first `rotary_dim` features of every token by its position.

    Products are formed in fp32 at least and rounded once. A position outside the tables leaves its
    token as it is, as in flash_attn.

    Args:
        x: `[batch, length, heads, head_dim]`, or `[tokens, heads, head_dim]` with `cu_seqlens`.
        cos: `[positions, rotary_dim / 2]`.
        sin: as `cos`.
        seqlen_offsets: position of the first token: one int for all sequences, or an int32 or
            int64 tensor `[batch]`.
        cu_seqlens: int32 or int64 `[batch + 1]`, cumulative sequence lengths. Tokens beyond the
            last stay as they are.
        max_seqlen: longest sequence; wanted with `cu_seqlens`.
        interleaved: pair the features (0, 1), (2, 3), ... instead of the first half of
            `rotary_dim` with the second.
        inplace: write the result into `x`.
        conjugate: rotate backwards.

    Returns:
        A tensor like `x`, or `x` itself with `inplace`.

    Raises:
        TypeError: `x` or a table is no tensor of floating-point numbers, `cu_seqlens` none of
            integers, `max_seqlen` no int, `seqlen_offsets` neither an int nor an integer tensor.
        ValueError: shapes do not fit, a length exceeds the tables, tensors lie on different
            devices, or elements of an `x` that is written share memory.
    """
    _check_tensors(x, cos, sin, cu_seqlens)
    if inplace:
        _check_writable(x)
    _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    if x.numel() == 0:
        return x if inplace else x.clone()
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    cos, sin = _rows(cos, positions, 1.0), _rows(sin, positions, 0.0)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    if conjugate:
        sin = -sin
    rotary_dim = 2 * cos.shape[-1]
    rotated = _rotate(x[..., :rotary_dim].to(wide), cos, sin, interleaved).to(x.dtype)
    if inplace:
        x[..., :rotary_dim].copy_(rotated)
        return x
    return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Position of every token: `[batch or 1, length]`, or `[tokens]`; -1 outside all sequences."""
    if cu_seqlens is None:
        places = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return places + (offsets.unsqueeze(1) if isinstance(offsets, Tensor) else offsets)
    batch = cu_seqlens.shape[0] - 1
    if batch == 0:
        return torch.full((x.shape[0],), -1, device=x.device)
    tokens = torch.arange(x.shape[0], device=x.device)
    starts = cu_seqlens.to(tokens.dtype)
    # right=True steps over empty sequences to the one that holds the token.
    sequence = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
    clamped = sequence.clamp(max=batch - 1)
    first = offsets[clamped] if isinstance(offsets, Tensor) else offsets
    inside = (sequence < batch) & (tokens >= starts[0])
    return torch.where(inside, tokens - starts[clamped] + first, -1)


def _rows(table: Tensor, positions: Tensor, outside: float) -> Tensor:
    """Rows of a table at these positions, `outside` where there is no such row."""
    inside = (positions >= 0) & (positions < table.shape[0])
    if table.shape[0] == 0:
        return table.new_full((*positions.shape, table.shape[1]), outside)
    rows = table[torch.where(inside, positions, 0)]
    return torch.where(inside.unsqueeze(-1), rows, outside)


def _check_tensors(x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> None:
    tensors = {"x": x, "cos": cos, "sin": sin}
    if cu_seqlens is not None:
        tensors["cu_seqlens"] = cu_seqlens
    for name, tensor in tensors.items():
        check_operand(name, tensor)
        allowed = (torch.int32, torch.int64) if name == "cu_seqlens" else _DTYPES
        if tensor.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise TypeError(f"{name} must have dtype {names}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, the device of x, got {tensor.device}")


def _check_writable(x: Tensor) -> None:
    shared = any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    if shared or x._is_zerotensor():
        raise ValueError("x must have memory for each element to be written in place")


def _check_integer(name: str, value: Any) -> None:
    if not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_length(name: str, value: Any) -> None:
    """Raises if `value` is no number of tokens."""
    _check_integer(name, value)
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def _check(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    wanted = (
        "[batch, length, heads, head_dim]" if cu_seqlens is None else "[tokens, heads, head_dim]"
    )
    if x.dim() != (4 if cu_seqlens is None else 3):
        raise ValueError(f"x must be {wanted}, got shape {tuple(x.shape)}")
    if cos.dim() != 2 or sin.shape != cos.shape:
        raise ValueError(
            "cos and sin must be [positions, rotary_dim / 2] alike, "
            f"got shapes {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos: rotary_dim = 2 * {cos.shape[1]} must not exceed the head_dim {x.shape[-1]} of x"
        )
    if cu_seqlens is None:
        batch, length = x.shape[:2]
    elif max_seqlen is None:
        raise ValueError("max_seqlen must be an int where cu_seqlens is given, got None")
    elif cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be [batch + 1], got shape {tuple(cu_seqlens.shape)}")
    else:
        check_length("max_seqlen", max_seqlen)
        batch, length = cu_seqlens.shape[0] - 1, max_seqlen
    if length > cos.shape[0]:
        raise ValueError(f"cos has {cos.shape[0]} positions, a sequence has {length}")
    _check_offsets(offsets, batch, length, cos.shape[0])


def _check_offsets(offsets: int | Tensor, batch: int, length: int, positions: int) -> None:
    if isinstance(offsets, Tensor):
        check_operand("seqlen_offsets", offsets)
        if offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"seqlen_offsets must be int32 or int64, got {offsets.dtype}")
        if offsets.shape != (batch,):
            raise ValueError(
                f"seqlen_offsets must have shape ({batch},), got {tuple(offsets.shape)}"
            )
        return
    _check_integer("seqlen_offsets", offsets)
    if offsets < 0 or offsets + length > positions:
        raise ValueError(
            f"seqlen_offsets must be from 0 to {positions - length}, so that {length} tokens fit "
            f"into the {positions} positions of cos; got {offsets}"
        )
