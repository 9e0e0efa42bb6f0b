"""Rotary position embedding as functions and a module, after `flash_attn.layers.rotary` 2.8.

Functions whose name ends in an underscore write into their argument, and so does `RotaryEmbedding`.
Where a gradient is wanted, go on with the tensor they return: it is the one that autograd follows.
`apply_rotary_emb_torch` apart, no gradient reaches the tables `cos` and `sin`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metal_flash_attn._ops import check_operand

# Relative: the package is served under the name flash_attn.
from ..ops.triton.rotary import apply_rotary, check_length  # noqa: TID252

__all__ = [
    "ApplyRotaryEmb",
    "ApplyRotaryEmbKV_",
    "ApplyRotaryEmbQKV_",
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Every pair `(a, b)` of the last dimension as `(-b, a)`.

    Args:
        x: `[..., features]`, an even number of features.
        interleaved: pairs are (0, 1), (2, 3), ... instead of the first half with the second.
    """
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """Rotation in the dtypes as given, without offsets: what the others are compared with.

    Args:
        x: `[batch, length, heads, head_dim]`.
        cos: `[length, rotary_dim / 2]` or `[batch, length, rotary_dim / 2]`.
        sin: as `cos`.
        interleaved: pairs are (0, 1), (2, 3), ... instead of the first half with the second.

    Raises:
        ValueError: `rotary_dim` exceeds `head_dim`.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise ValueError(f"cos: rotary_dim {rotary_dim} exceeds the head_dim {x.shape[-1]} of x")
    if interleaved:
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    else:
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    part = x[..., :rotary_dim]
    rotated = part * cos.unsqueeze(-2) + rotate_half(part, interleaved) * sin.unsqueeze(-2)
    return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


# The functions below are autograd functions, not plain operations, because an input may be a leaf
# or one of several views of a projection: autograd refuses an in-place operation on either.


class ApplyRotaryEmb(torch.autograd.Function):
    """Autograd function behind `apply_rotary_emb`; call that."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        inplace: bool = False,
        seqlen_offsets: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Rotate."""
        rotated = apply_rotary(
            x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace
        )
        _save(ctx, [cos, sin, cu_seqlens], seqlen_offsets)
        ctx.options = {"interleaved": interleaved, "max_seqlen": max_seqlen}
        return rotated

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Rotate the gradient backwards."""
        (cos, sin, cu_seqlens), seqlen_offsets = _saved(ctx)
        gradient = apply_rotary(
            gradients[0],
            cos,
            sin,
            seqlen_offsets=seqlen_offsets,
            cu_seqlens=cu_seqlens,
            conjugate=True,
            **ctx.options,
        )
        return gradient, *[None] * 7


class ApplyRotaryEmbQKV_(torch.autograd.Function):  # noqa: N801
    """Autograd function behind `apply_rotary_emb_qkv_`; call that."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cos_k: Tensor | None = None,
        sin_k: Tensor | None = None,
        interleaved: bool = False,
        seqlen_offsets: int | Tensor = 0,
        num_heads_q: int | None = None,
    ) -> Tensor:
        """Rotate queries and keys in place."""
        tables = (cos, sin, cos_k, sin_k)
        _rotate_qkv_(qkv, tables, interleaved, seqlen_offsets, num_heads_q, conjugate=False)
        _save(ctx, [cos, sin, cos_k, sin_k], seqlen_offsets)
        ctx.interleaved, ctx.num_heads_q = interleaved, num_heads_q
        return qkv

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Rotate the gradient of queries and keys backwards."""
        tables, seqlen_offsets = _saved(ctx)
        gradient = gradients[0].clone()
        _rotate_qkv_(
            gradient, tables, ctx.interleaved, seqlen_offsets, ctx.num_heads_q, conjugate=True
        )
        return gradient, *[None] * 7


class ApplyRotaryEmbKV_(torch.autograd.Function):  # noqa: N801
    """Autograd function behind `apply_rotary_emb_kv_`; call that."""

    @staticmethod
    def forward(
        ctx: Any,
        kv: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        seqlen_offsets: int | Tensor = 0,
    ) -> Tensor:
        """Rotate the keys in place."""
        check_operand("kv", kv)
        if kv.dim() != 5 or kv.shape[2] != 2:
            raise ValueError(
                f"kv must be [batch, length, 2, heads, head_dim], got shape {tuple(kv.shape)}"
            )
        apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
        _save(ctx, [cos, sin], seqlen_offsets)
        ctx.interleaved = interleaved
        return kv

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Rotate the gradient of the keys backwards."""
        (cos, sin), seqlen_offsets = _saved(ctx)
        gradient = gradients[0].clone()
        apply_rotary(
            gradient[:, :, 0],
            cos,
            sin,
            seqlen_offsets,
            interleaved=ctx.interleaved,
            inplace=True,
            conjugate=True,
        )
        return gradient, *[None] * 4


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate the first `rotary_dim` features of every token by its position; differentiable in `x`.

    Args:
        x: `[batch, length, heads, head_dim]`, or `[tokens, heads, head_dim]` with `cu_seqlens`.
        cos: `[positions, rotary_dim / 2]`.
        sin: as `cos`.
        interleaved: pairs are (0, 1), (2, 3), ... instead of the first half with the second.
        inplace: write the result into `x`.
        seqlen_offsets: position of the first token, an int or an integer tensor `[batch]`.
        cu_seqlens: int32 `[batch + 1]`, cumulative sequence lengths.
        max_seqlen: longest sequence; wanted with `cu_seqlens`.

    Returns:
        A tensor like `x`.

    Raises:
        TypeError, ValueError: as `flash_attn.ops.triton.rotary.apply_rotary`.
    """
    rotated: Tensor = ApplyRotaryEmb.apply(
        x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen
    )
    return rotated


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate queries and keys of a packed tensor in place; differentiable in `qkv`.

    Args:
        qkv: `[batch, length, 3, heads, head_dim]`, or with `num_heads_q`
            `[batch, length, num_heads_q + 2 * kv_heads, head_dim]`.
        cos: `[positions, rotary_dim / 2]`.
        sin: as `cos`.
        cos_k: table for the keys where it differs, as `cos`.
        sin_k: as `cos_k`.
        interleaved: pairs are (0, 1), (2, 3), ... instead of the first half with the second.
        seqlen_offsets: position of the first token, an int or an integer tensor `[batch]`.
        num_heads_q: number of query heads; wanted where `qkv` has four dimensions.

    Returns:
        `qkv`.

    Raises:
        TypeError, ValueError: as `flash_attn.ops.triton.rotary.apply_rotary`, or `qkv` and
            `num_heads_q` do not fit.
    """
    rotated: Tensor = ApplyRotaryEmbQKV_.apply(
        qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q
    )
    return rotated


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotate the keys of a packed tensor in place; differentiable in `kv`.

    Args:
        kv: `[batch, length, 2, heads, head_dim]`.
        cos: `[positions, rotary_dim / 2]`.
        sin: as `cos`.
        interleaved: pairs are (0, 1), (2, 3), ... instead of the first half with the second.
        seqlen_offsets: position of the first token, an int or an integer tensor `[batch]`.

    Returns:
        `kv`.

    Raises:
        TypeError, ValueError: as `flash_attn.ops.triton.rotary.apply_rotary`, or the shape of `kv`
            is another.
    """
    rotated: Tensor = ApplyRotaryEmbKV_.apply(kv, cos, sin, interleaved, seqlen_offsets)
    return rotated


class RotaryEmbedding(nn.Module):
    """Rotary embedding of queries and keys, with tables that grow with the sequence.

    Args:
        dim: number of features that are rotated, even.
        base: of the geometric series of frequencies.
        interleaved: pairs are (0, 1), (2, 3), ... instead of the first half with the second.
        scale_base: None, or the scale base of XPos (Sun et al., https://arxiv.org/abs/2212.10554),
            which lets attention decay with the distance.
        device: of the frequencies.
        pos_idx_in_fp32: accepted for older callers; positions are always in fp32.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
        *,
        pos_idx_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        del pos_idx_in_fp32
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None
        if scale_base is not None:
            even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
            scale = (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return self.base**-exponents

    # Subclasses outside this project call this method and read the tables, by these names.
    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
            # Autograd cannot save tensors that were made in inference mode.
            and not (self.training and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        inv_freq = self.inv_freq
        if inv_freq.dtype != torch.float32:
            # A model cast to half precision has lost the bits that large positions need.
            inv_freq = self._compute_inv_freq(device)
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(positions, inv_freq.to(positions.device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        # Powers are counted from the middle, so that neither end of a long table overflows; only
        # their difference between query and key matters.
        powers = (positions - seqlen // 2) / self.scale_base
        scale = self.scale.to(device=positions.device, dtype=torch.float32) ** powers.unsqueeze(-1)
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate queries and keys in place.

        Args:
            qkv: without `kv` packed as for `apply_rotary_emb_qkv_`; with `kv` the queries alone,
                `[batch, length, heads, head_dim]`.
            kv: `[batch, length, 2, heads, head_dim]`.
            seqlen_offset: position of the first token, an int or an integer tensor `[batch]`.
            max_seqlen: number of positions wanted in the tables; needed, once, where
                `seqlen_offset` is a tensor.
            num_heads_q: as for `apply_rotary_emb_qkv_`.

        Returns:
            `qkv`, or the pair of queries and `kv`.

        Raises:
            TypeError, ValueError: a length is no number or not known, or as the functions of this
                module.
        """
        check_operand("qkv", qkv)
        if qkv.dim() not in (4, 5):
            raise ValueError(f"qkv must have 4 or 5 dimensions, got shape {tuple(qkv.shape)}")
        if max_seqlen is None and not isinstance(seqlen_offset, Tensor):
            check_length("seqlen_offset", seqlen_offset)
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            check_length("max_seqlen", max_seqlen)
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError("max_seqlen must be an int where seqlen_offset is a tensor, got None")
        cos_k, sin_k = (
            (None, None) if self.scale is None else (self._cos_k_cached, self._sin_k_cached)
        )
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(
            qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset
        )
        cos_k, sin_k = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)


def _rotate_qkv_(
    qkv: Tensor,
    tables: tuple[Any, ...],
    interleaved: bool,
    seqlen_offsets: int | Tensor,
    num_heads_q: int | None,
    conjugate: bool,
) -> None:
    q, k = _queries_and_keys(qkv, num_heads_q)
    cos, sin, cos_k, sin_k = tables
    own = (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
    for x, x_cos, x_sin in ((q, cos, sin), (k, *own)):
        apply_rotary(
            x,
            x_cos,
            x_sin,
            seqlen_offsets,
            interleaved=interleaved,
            inplace=True,
            conjugate=conjugate,
        )


def _queries_and_keys(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    check_operand("qkv", qkv)
    shape = tuple(qkv.shape)
    if len(shape) == 5 and shape[2] == 3:
        return qkv[:, :, 0], qkv[:, :, 1]
    if len(shape) != 4:
        raise ValueError(
            "qkv must be [batch, length, 3, heads, head_dim] or "
            f"[batch, length, num_heads_q + 2 * kv_heads, head_dim], got shape {shape}"
        )
    if num_heads_q is None:
        raise ValueError("num_heads_q must be an int where qkv has four dimensions, got None")
    kv_heads, rest = divmod(shape[2] - num_heads_q, 2)
    if num_heads_q < 0 or kv_heads < 0 or rest:
        raise ValueError(
            f"num_heads_q must leave an even number of the {shape[2]} heads of qkv for keys and "
            f"values, got {num_heads_q}"
        )
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + kv_heads]


def _save(ctx: Any, tensors: list[Tensor | None], seqlen_offsets: int | Tensor) -> None:
    is_tensor = isinstance(seqlen_offsets, Tensor)
    ctx.save_for_backward(*tensors, seqlen_offsets if is_tensor else None)
    ctx.seqlen_offset = 0 if is_tensor else seqlen_offsets


def _saved(ctx: Any) -> tuple[tuple[Any, ...], int | Tensor]:
    *tensors, seqlen_offsets = ctx.saved_tensors
    return tuple(tensors), ctx.seqlen_offset if seqlen_offsets is None else seqlen_offsets
