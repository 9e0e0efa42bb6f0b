"""merge_states: attention over parts of the keys becomes attention over all of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metal_flash_attn import attention, flash_attn_varlen_func, merge_states
from torch import Tensor

INF = float("inf")


def by_definition(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The merge of all parts at once, in float64; rows without keys have lse +inf."""
    lses = torch.stack([lse.double() for _, lse in parts])
    lses = torch.where(lses.isinf(), -INF, lses)
    lse = lses.logsumexp(0)
    weights = torch.where(lse.isinf(), 0, (lses - lse).exp()).transpose(-1, -2).unsqueeze(-1)
    outs = torch.stack([out.double() for out, _ in parts])
    return (weights * outs).sum(0), torch.where(lse.isinf(), INF, lse)


@given(
    st.sampled_from([(2, 5, 3, 4), (1, 1, 2, 8), (0, 3, 2, 4), (7, 2, 5)]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.sampled_from([1.0, 30.0, 1e4, 1e30]),
    st.integers(0, 2**32),
)
def test_any_magnitudes(shape: tuple[int, ...], dtype: Any, magnitude: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    *batch, tokens, heads, _ = shape
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    parts = []
    for _ in range(2):
        out = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        lse = magnitude * torch.randn((*batch, heads, tokens), generator=generator)
        empty = torch.rand(lse.shape, generator=generator) < 0.3
        lse = torch.where(empty, INF, lse).to(lse_dtype)
        # What stands in a row without keys does not matter.
        out = torch.where(empty.transpose(-1, -2).unsqueeze(-1), float("nan"), out)
        parts.append((out, lse))
    got_out, got_lse = merge_states(*parts[0], *parts[1])
    clean = [(out.nan_to_num(0.0), lse) for out, lse in parts]
    out, lse = by_definition(clean)
    assert (got_out.dtype, got_lse.dtype) == (dtype, lse_dtype)
    # One rounding of the result; a weight has the error of a difference of two lse.
    unit = torch.finfo(lse_dtype).eps
    error = unit * (8 + 2 * torch.where(lse.isinf(), 0, lse).abs())
    assert ((got_lse.double() - lse).abs() <= error).logical_or(got_lse == lse).all()
    # Rounded operands of a difference were the very inputs: it is off by half a last place.
    spread = torch.stack([lse for _, lse in parts]).double()
    spread = torch.where(spread.isinf(), 0, spread).abs().amax(0)
    relative = torch.minimum(unit * (8 + spread), torch.ones(())).transpose(-1, -2).unsqueeze(-1)
    largest = torch.stack([out.double().abs() for out, _ in clean]).amax(0)
    bound = torch.finfo(dtype).eps * out.abs() + 2 * relative * largest + 1e-7
    assert ((got_out.double() - out).abs() <= bound).all()


def test_all_parts_of_a_ring() -> None:
    q = torch.randn(2, 6, 4, 16)
    k, v = torch.randn(2, 2, 40, 2, 16)
    parts = [
        attention(q, k[:, start:end], v[:, start:end], return_lse=True)
        for start, end in itertools.pairwise([0, 1, 17, 17, 30, 40])
    ]
    out, lse = attention(q, k, v, return_lse=True)
    for order in (parts, parts[::-1]):
        merged = order[0]
        for part in order[1:]:
            merged = merge_states(*merged, *part)
        torch.testing.assert_close(merged[0], out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged[1], lse, rtol=1e-6, atol=1e-6)


def test_packed_sequences_and_rows_without_keys() -> None:
    q, k, v = torch.randn(3, 9, 2, 8)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    # The second sequence has keys in the first part only.
    first = flash_attn_varlen_func(q, k, v, offsets, offsets, 5, 5, return_attn_probs=True)[:2]
    fewer = torch.tensor([0, 2, 2], dtype=torch.int32)
    second = flash_attn_varlen_func(q, k[:2], v[:2], offsets, fewer, 5, 2, return_attn_probs=True)[
        :2
    ]
    assert second[1][:, 4:].eq(INF).all()
    out, lse = merge_states(*first, *second)
    torch.testing.assert_close(out[4:], first[0][4:], rtol=0, atol=0)
    torch.testing.assert_close(lse[:, 4:], first[1][:, 4:], rtol=0, atol=0)
    nothing = merge_states(*second, *second)
    assert nothing[0][4:].eq(0).all()
    assert nothing[1][:, 4:].eq(INF).all()


def _some(shape: tuple[int, ...], *, empty: bool = True) -> list[Tensor]:
    *batch, tokens, heads, _ = shape
    tensors = []
    for part in range(2):
        out = torch.randn(shape, dtype=torch.float64)
        lse = torch.randn((*batch, heads, tokens), dtype=torch.float64)
        if empty:
            lse[..., part] = INF  # one part has no keys for this token
            lse[..., 2] = INF  # and none has for this one
        tensors += [out, lse]
    return tensors


@pytest.mark.parametrize("shape", [(2, 4, 2, 3), (4, 2, 3)])
def test_gradients_are_exact(shape: tuple[int, ...]) -> None:
    tensors = [tensor.requires_grad_() for tensor in _some(shape, empty=False)]
    assert torch.autograd.gradcheck(merge_states, tensors)
    assert torch.autograd.gradgradcheck(merge_states, tensors)


def test_gradients_of_rows_without_keys_are_zero() -> None:
    tensors = [tensor.requires_grad_() for tensor in _some((2, 4, 2, 3))]
    out, lse = merge_states(*tensors)
    (out.sum() + torch.where(lse.isinf(), 0, lse).sum()).backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    first_out, first_lse, second_out, second_lse = (tensor.grad for tensor in tensors)
    for out_grad, lse_grad, token in ((first_out, first_lse, 0), (second_out, second_lse, 1)):
        assert out_grad is not None
        assert lse_grad is not None
        assert out_grad[:, [token, 2]].eq(0).all()
        assert lse_grad[..., [token, 2]].eq(0).all()
        assert lse_grad[..., 3].ne(0).any()


def test_gradients_of_a_split_call_are_those_of_the_whole() -> None:
    """Through the lse of each part, which the backward pass takes a gradient of."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 5, 2, 8), torch.randn(1, 12, 1, 8), torch.randn(1, 12, 1, 8)]
    d_out, d_lse = torch.randn(1, 5, 2, 8), torch.randn(1, 2, 5)

    def gradients(split: bool) -> tuple[Tensor, ...]:
        q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
        if split:
            first = attention(q, k[:, :5], v[:, :5], return_lse=True)
            second = attention(q, k[:, 5:], v[:, 5:], return_lse=True)
            result = merge_states(*first, *second)
        else:
            result = attention(q, k, v, return_lse=True)
        return torch.autograd.grad(result, (q, k, v), (d_out, d_lse))

    for whole, parts in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=2e-6)


def test_it_compiles() -> None:
    tensors = [tensor.float() for tensor in _some((2, 4, 2, 3))]
    compiled = torch.compile(merge_states, fullgraph=True, backend="eager")
    for got, want in zip(compiled(*tensors), merge_states(*tensors), strict=True):
        assert torch.equal(got, want)


OUT, LSE = torch.zeros(2, 5, 3, 4), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((OUT, LSE, OUT, None), TypeError, "lse_b is a NoneType; allowed: torch.Tensor"),
        ((OUT.int(), LSE, OUT, LSE), TypeError, "out_a is int32; allowed: float32, float16"),
        ((OUT, LSE, OUT.half(), LSE), TypeError, "out_b is float16; allowed: float32, the dtype"),
        ((OUT, LSE.double(), OUT, LSE), TypeError, "lse_a is float64; allowed: float32"),
        ((OUT.half(), LSE.half(), OUT.half(), LSE), TypeError, "lse_a is float16; allowed"),
        ((OUT[0, 0], LSE, OUT, LSE), ValueError, r"out_a has shape \(3, 4\); allowed: \(batch,"),
        ((OUT, LSE, OUT[:1], LSE), ValueError, r"out_b has shape \(1, 5, 3, 4\); allowed: \(2, 5"),
        (
            (OUT, LSE.transpose(1, 2), OUT, LSE),
            ValueError,
            r"lse_a has shape \(2, 5, 3\); allowed: \(2, 3, 5\)",
        ),
        ((OUT[0], LSE[0], OUT[0], LSE), ValueError, r"lse_b has shape .*; allowed: \(3, 5\)"),
        ((OUT, LSE, OUT, LSE.to("meta")), ValueError, "lse_b is on meta; allowed: cpu, as out_a"),
    ],
)
def test_wrong_calls(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        merge_states(*arguments)
