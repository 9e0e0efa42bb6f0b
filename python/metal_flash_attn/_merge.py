"""Exact merging of attention over parts of the keys."""

import torch
from torch import Tensor

from ._ops import check_operand

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of two parts, from attention over each of them.

    The results are those of one call over all keys, but for rounding, whatever the magnitudes of
    the scores. Any number of parts merges, two at a time, in any order: ring attention, split keys,
    a prefix that many sequences share.

    A row without keys has lse +inf, as the functions of this package return it (-inf, the logarithm
    of no weight, counts as well), and whatever stands in its out does not matter. If neither part
    has keys for a row, out is 0 and lse +inf.

    The weights of Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021: computed in
    float32, out is rounded once. Differentiable in all four tensors, also twice; no device is
    waited for.

    Args:
        out_a, out_b: `[B, L, H, D]`, or `[T, H, D]` packed; float32, float16, bfloat16 or float64.
        lse_a, lse_b: natural logarithms, float32 `[B, H, L]`, or `[H, T]`; float64 with out in
            float64. A sink must count in one part only.

    Returns:
        out like out_a, and lse like lse_a.

    Raises:
        ValueError: shapes do not belong together, or tensors lie on different devices.
        TypeError: a dtype is none of these, or not that of the other part.
    """
    _check(out_a, lse_a, out_b, lse_b)
    empty_a, empty_b = torch.isinf(lse_a), torch.isinf(lse_b)
    nothing = empty_a & empty_b
    # A shift that cancels has no gradient. It is finite, so that no infinity meets another.
    largest = torch.where(
        empty_a, lse_b, torch.where(empty_b, lse_a, torch.maximum(lse_a, lse_b))
    ).detach()
    largest = torch.where(nothing, 0, largest)
    weight_a, weight_b = (
        torch.where(empty, 0, (torch.where(empty, largest, lse) - largest).exp())
        for empty, lse in ((empty_a, lse_a), (empty_b, lse_b))
    )
    total = torch.where(nothing, 1, weight_a + weight_b)
    lse = torch.where(nothing, torch.inf, largest + total.log())
    parts = (
        _by_token(weight / total) * torch.where(_by_token(empty), 0, out).to(lse.dtype)
        for weight, empty, out in ((weight_a, empty_a, out_a), (weight_b, empty_b, out_b))
    )
    return sum(parts, start=lse.new_zeros(())).to(out_a.dtype), lse


def _by_token(rows: Tensor) -> Tensor:
    """`[.., H, L]` as `[.., L, H, 1]`."""
    return rows.transpose(-1, -2).unsqueeze(-1)


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    tensors = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, tensor in tensors.items():
        check_operand(name, tensor)
        if tensor.device != out_a.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: {out_a.device}, as out_a")
    if out_a.dtype not in _DTYPES:
        names = ", ".join(_name(dtype) for dtype in _DTYPES)
        raise TypeError(f"out_a is {_name(out_a.dtype)}; allowed: {names}")
    if out_b.dtype != out_a.dtype:
        raise TypeError(
            f"out_b is {_name(out_b.dtype)}; allowed: {_name(out_a.dtype)}, the dtype of out_a"
        )
    lse_dtype = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    for name, tensor in (("lse_a", lse_a), ("lse_b", lse_b)):
        if tensor.dtype != lse_dtype:
            raise TypeError(f"{name} is {_name(tensor.dtype)}; allowed: {_name(lse_dtype)}")
    if out_a.dim() not in (3, 4):
        raise ValueError(
            f"out_a has shape {tuple(out_a.shape)}; allowed: (batch, seqlen, heads, head_dim), or "
            "(total, heads, head_dim)"
        )
    *batch, tokens, heads, _ = out_a.shape
    expected = {"out_b": tuple(out_a.shape)} | dict.fromkeys(
        ("lse_a", "lse_b"), (*batch, heads, tokens)
    )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}; allowed: {shape}, "
                f"for out_a of shape {tuple(out_a.shape)}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
