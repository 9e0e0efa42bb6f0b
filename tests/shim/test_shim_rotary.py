"""flash_attn.layers.rotary and ops.triton.rotary against products of complex numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from metal_flash_attn.shim.flash_attn.layers.rotary import (
    ApplyRotaryEmb,
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from metal_flash_attn.shim.flash_attn.ops.triton.rotary import apply_rotary
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

F64 = torch.float64


def tables(positions: int, rotary_dim: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    frequencies = 10.0 ** -torch.arange(rotary_dim // 2, dtype=F64)
    angles = torch.outer(torch.arange(positions, dtype=F64), frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated_token(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One token `[heads, head_dim]` in float64, by multiplication of complex numbers."""
    half = cos.shape[-1]
    out = x.to(F64).clone()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    turned = torch.complex(out[:, first], out[:, second]) * torch.complex(cos, sin).to(
        torch.complex128
    )
    out[:, first], out[:, second] = turned.real, turned.imag
    return out


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, starts: list[int], interleaved: bool = False
) -> Tensor:
    """`[batch, length, heads, head_dim]`; sequence b begins at position starts[b]."""
    out = x.to(F64).clone()
    for b, start in enumerate(starts):
        for t in range(x.shape[1]):
            if start + t < cos.shape[0]:
                row = cos[start + t].to(F64), sin[start + t].to(F64)
                out[b, t] = rotated_token(x[b, t], *row, interleaved)
    return out


def tolerance(dtype: torch.dtype, largest: float) -> float:
    """Three roundings of the fp32 arithmetic and one of the result."""
    if dtype == F64:
        return 4 * torch.finfo(F64).eps * largest
    return (3 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps) * largest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("offsets", [0, 3, [2, 0, 5]])
@pytest.mark.parametrize("inplace", [False, True])
def test_apply_rotary(
    dtype: torch.dtype, interleaved: bool, rotary_dim: int, offsets: Any, inplace: bool
) -> None:
    x = torch.randn(3, 5, 2, 8, dtype=dtype)
    cos, sin = tables(8, rotary_dim, dtype)
    starts = offsets if isinstance(offsets, list) else [offsets] * 3
    expected = rotated(x, cos, sin, starts, interleaved)
    given = torch.tensor(offsets) if isinstance(offsets, list) else offsets
    out = apply_rotary(x, cos, sin, given, interleaved=interleaved, inplace=inplace)
    assert out.dtype == dtype
    assert (out is x) == inplace
    bound = tolerance(dtype, 2 * float(x.abs().max()))
    assert float((out.to(F64) - expected).abs().max()) <= bound


def test_positions_past_the_tables_leave_the_token() -> None:
    x = torch.randn(2, 4, 1, 4, dtype=F64)
    cos, sin = tables(6, 4)
    out = apply_rotary(x, cos, sin, torch.tensor([4, 1]))
    torch.testing.assert_close(out, rotated(x, cos, sin, [4, 1]))
    assert torch.equal(out[0, 2:], x[0, 2:])


@pytest.mark.parametrize("offsets", [0, 2, [3, 0, 1, 2]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences(offsets: Any, dtype: torch.dtype) -> None:
    # The second sequence is empty, and two tokens follow the last one.
    cu_seqlens = torch.tensor([0, 3, 3, 7, 8], dtype=torch.int32)
    x = torch.randn(10, 2, 6, dtype=F64)
    cos, sin = tables(9, 4)
    starts = offsets if isinstance(offsets, list) else [offsets] * 4
    given = torch.tensor(offsets, dtype=dtype) if isinstance(offsets, list) else offsets
    out = apply_rotary(x, cos, sin, given, cu_seqlens=cu_seqlens, max_seqlen=4)
    expected = x.clone()
    for b, start in enumerate(starts):
        begin, end = int(cu_seqlens[b]), int(cu_seqlens[b + 1])
        expected[begin:end] = rotated(x[None, begin:end], cos, sin, [start])[0]
    torch.testing.assert_close(out, expected)


def test_no_sequences_at_all() -> None:
    x = torch.randn(3, 1, 4)
    cos, sin = tables(2, 4, torch.float32)
    cu_seqlens = torch.tensor([0], dtype=torch.int32)
    assert torch.equal(apply_rotary(x, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=0), x)


def test_conjugate_undoes_it() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=F64)
    cos, sin = tables(5, 8)
    there = apply_rotary(x, cos, sin)
    torch.testing.assert_close(apply_rotary(there, cos, sin, conjugate=True), x)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate_half(interleaved: bool) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = [-2.0, 1.0, -4.0, 3.0] if interleaved else [-3.0, -4.0, 1.0, 2.0]
    assert rotate_half(x, interleaved).tolist() == expected


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_apply_rotary_emb_torch(interleaved: bool, batched: bool) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=F64)
    cos, sin = tables(5, 4)
    expected = rotated(x, cos, sin, [0, 0], interleaved)
    if batched:
        cos, sin = cos.expand(2, -1, -1), sin.expand(2, -1, -1)
    torch.testing.assert_close(apply_rotary_emb_torch(x, cos, sin, interleaved), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_packed_queries_keys_and_values(
    interleaved: bool, own_tables: bool, contiguous: bool
) -> None:
    qkv = torch.randn(2, 4, 3, 2, 8, dtype=F64)
    if not contiguous:
        qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    cos, sin = tables(6, 4)
    cos_k, sin_k = (cos * 0.5, sin * 0.5) if own_tables else (None, None)
    q, k, v = (x.clone() for x in qkv.unbind(2))
    out = apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, interleaved, 2)
    keys = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
    torch.testing.assert_close(out[:, :, 0], rotated(q, cos, sin, [2, 2], interleaved))
    torch.testing.assert_close(out[:, :, 1], rotated(k, *keys, [2, 2], interleaved))
    assert torch.equal(out[:, :, 2], v)
    assert out.data_ptr() == qkv.data_ptr()


def test_packed_heads_of_grouped_queries() -> None:
    qkv = torch.randn(2, 4, 6 + 2 * 2, 8, dtype=F64)
    before = qkv.clone()
    cos, sin = tables(4, 8)
    apply_rotary_emb_qkv_(qkv, cos, sin, num_heads_q=6)
    torch.testing.assert_close(qkv[:, :, :8], rotated(before[:, :, :8], cos, sin, [0, 0]))
    assert torch.equal(qkv[:, :, 8:], before[:, :, 8:])


def test_packed_keys_and_values() -> None:
    kv = torch.randn(2, 4, 2, 3, 8, dtype=F64)
    before = kv.clone()
    cos, sin = tables(8, 8)
    out = apply_rotary_emb_kv_(kv, cos, sin, seqlen_offsets=torch.tensor([4, 1]))
    torch.testing.assert_close(out[:, :, 0], rotated(before[:, :, 0], cos, sin, [4, 1]))
    assert torch.equal(out[:, :, 1], before[:, :, 1])
    assert out.data_ptr() == kv.data_ptr()


COS, SIN = tables(6, 4)
CU_SEQLENS = torch.tensor([0, 1, 3, 5], dtype=torch.int32)
OFFSETS = torch.tensor([2, 0, 1])


@pytest.mark.parametrize(
    ("shape", "function"),
    [
        ((2, 3, 2, 6), lambda x: apply_rotary(x, COS, SIN, interleaved=True)),
        ((2, 3, 2, 6), lambda x: apply_rotary_emb(x, COS, SIN, True, seqlen_offsets=2)),
        ((3, 3, 2, 6), lambda x: apply_rotary_emb(x, COS, SIN, seqlen_offsets=OFFSETS)),
        ((2, 3, 2, 6), lambda x: apply_rotary_emb(x.clone(), COS, SIN, inplace=True)),
        (
            (5, 2, 6),
            lambda x: apply_rotary_emb(
                x, COS, SIN, seqlen_offsets=OFFSETS, cu_seqlens=CU_SEQLENS, max_seqlen=2
            ),
        ),
        ((2, 3, 3, 2, 6), lambda x: apply_rotary_emb_qkv_(x.clone(), COS, SIN, COS / 2, SIN / 2)),
        ((2, 3, 7, 6), lambda x: apply_rotary_emb_qkv_(x.clone(), COS, SIN, num_heads_q=3)),
        ((3, 3, 2, 2, 6), lambda x: apply_rotary_emb_kv_(x.clone(), COS, SIN, True, OFFSETS)),
    ],
)
def test_gradients(shape: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def test_in_place_on_leaves_and_on_views_of_one_projection() -> None:
    # Autograd refuses plain in-place operations on both; flash_attn takes them.
    leaf = torch.randn(1, 3, 3, 1, 4, dtype=F64, requires_grad=True)
    apply_rotary_emb_qkv_(leaf, COS, SIN).sum().backward()
    assert leaf.grad is not None

    projection = torch.randn(1, 3, 3, 4, dtype=F64, requires_grad=True) * 1.0
    q, *_ = projection.split(1, dim=2)
    weights = torch.randn_like(q)
    out = apply_rotary_emb(q, COS, SIN, inplace=True)
    gradient = torch.autograd.grad((out * weights).sum(), projection)[0]
    torch.testing.assert_close(gradient[:, :, :1], apply_rotary(weights, COS, SIN, conjugate=True))


def test_class_and_alias_give_the_same() -> None:
    x = torch.randn(2, 3, 2, 6, dtype=F64)
    assert torch.equal(ApplyRotaryEmb.apply(x, COS, SIN, True), apply_rotary_emb(x, COS, SIN, True))
    assert apply_rotary_emb_func is apply_rotary_emb


def test_it_compiles_without_graph_breaks() -> None:
    x = torch.randn(3, 3, 2, 6, dtype=F64, requires_grad=True)
    compiled = torch.compile(apply_rotary_emb, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x, COS, SIN, seqlen_offsets=OFFSETS),
        apply_rotary_emb(x, COS, SIN, seqlen_offsets=OFFSETS),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": torch.zeros(3, 2, 4)}, ValueError, ["x", "[batch, length", "(3, 2, 4)"]),
        ({"sin": torch.zeros(5, 2)}, ValueError, ["sin", "(5, 2)"]),
        ({"cos": torch.zeros(6, 4), "sin": torch.zeros(6, 4)}, ValueError, ["cos", "head_dim 6"]),
        ({"x": torch.zeros(1, 7, 1, 6)}, ValueError, ["cos", "6 positions", "7"]),
        ({"seqlen_offsets": 4}, ValueError, ["seqlen_offsets", "from 0 to 3", "got 4"]),
        ({"seqlen_offsets": -1}, ValueError, ["seqlen_offsets", "from 0 to 3", "got -1"]),
        ({"seqlen_offsets": torch.zeros(3, dtype=torch.int32)}, ValueError, ["(2,)", "(3,)"]),
        ({"seqlen_offsets": torch.zeros(2)}, TypeError, ["seqlen_offsets", "torch.float32"]),
        ({"seqlen_offsets": 0.5}, TypeError, ["seqlen_offsets", "int", "float"]),
        ({"x": torch.zeros(5, 2, 6), "cu_seqlens": CU_SEQLENS}, ValueError, ["max_seqlen"]),
        ({"x": [1.0]}, TypeError, ["x is a list", "torch.Tensor"]),
        ({"x": torch.zeros(2, 3, 2, 6).int()}, TypeError, ["x", "float16", "torch.int32"]),
        ({"cos": COS.to("meta")}, ValueError, ["cos", "cpu", "meta"]),
        ({"x": torch.zeros(1, 3, 2, 6).expand(2, -1, -1, -1), "inplace": True}, ValueError, ["x"]),
    ],
)
def test_wrong_arguments(
    arguments: dict[str, object], error: type[Exception], words: list[str]
) -> None:
    right = {"x": torch.zeros(2, 3, 2, 6), "cos": COS, "sin": SIN}
    with pytest.raises(error) as raised:
        apply_rotary(**{**right, **arguments})  # type: ignore[arg-type]
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: apply_rotary_emb_qkv_(torch.zeros(2, 3, 7, 6), COS, SIN), ["num_heads_q"]),
        (
            lambda: apply_rotary_emb_qkv_(torch.zeros(2, 3, 7, 6), COS, SIN, num_heads_q=2),
            ["num_heads_q", "7 heads", "got 2"],
        ),
        (lambda: apply_rotary_emb_qkv_(torch.zeros(3, 7, 6), COS, SIN), ["qkv", "(3, 7, 6)"]),
        (lambda: apply_rotary_emb_kv_(torch.zeros(3, 7, 3, 2, 6), COS, SIN), ["kv", "(3, 7, 3"]),
        (
            lambda: RotaryEmbedding(4)(torch.zeros(1, 2, 3, 1, 4), seqlen_offset=torch.zeros(1)),
            ["max_seqlen", "None"],
        ),
    ],
)
def test_wrong_packed_arguments(call: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(ValueError, match="must") as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value


def module_tables(positions: int, dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    frequencies = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=F64)
    angles = torch.outer(torch.arange(positions, dtype=F64), frequencies)
    return angles.cos(), angles.sin()


def module_tolerance(positions: int, x: Tensor) -> float:
    """Angles up to `positions` in fp32, then the products."""
    eps = torch.finfo(torch.float32).eps
    return (2 * positions + 4) * eps * 2 * float(x.abs().max())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 7])
def test_the_module_on_packed_input(interleaved: bool, offset: int) -> None:
    rope = RotaryEmbedding(8, base=500.0, interleaved=interleaved)
    qkv = torch.randn(2, 5, 3, 2, 16)
    q, k, v = (x.clone() for x in qkv.unbind(2))
    out = rope(qkv, seqlen_offset=offset)
    cos, sin = module_tables(12, 8, 500.0)
    bound = module_tolerance(12, qkv)
    for got, before in ((out[:, :, 0], q), (out[:, :, 1], k)):
        expected = rotated(before, cos, sin, [offset] * 2, interleaved)
        assert float((got.to(F64) - expected).abs().max()) <= bound
    assert torch.equal(out[:, :, 2], v)
    assert out.data_ptr() == qkv.data_ptr()


def test_the_module_on_separate_input_with_tensor_offsets() -> None:
    rope = RotaryEmbedding(8)
    q, kv = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 2, 8)
    q_before, kv_before = q.clone(), kv.clone()
    q_out, kv_out = rope(q, kv, seqlen_offset=torch.tensor([4, 9]), max_seqlen=16)
    cos, sin = module_tables(16, 8)
    expected = rotated(q_before, cos, sin, [4, 9])
    assert float((q_out.to(F64) - expected).abs().max()) <= module_tolerance(16, q)
    expected = rotated(kv_before[:, :, 0], cos, sin, [4, 9])
    assert float((kv_out[:, :, 0].to(F64) - expected).abs().max()) <= module_tolerance(16, kv)
    assert torch.equal(kv_out[:, :, 1], kv_before[:, :, 1])
    assert q_out.data_ptr() == q.data_ptr()
    assert kv_out.data_ptr() == kv.data_ptr()


def test_xpos_scales_products_by_the_distance() -> None:
    # q at position m times k at n gains scale ** ((m - n) / scale_base), whatever the table length.
    dim, scale_base, length = 8, 16.0, 12
    rope = RotaryEmbedding(dim, scale_base=scale_base)
    plain = RotaryEmbedding(dim)
    scale = torch.tensor([(2 * i + 0.4 * dim) / (1.4 * dim) for i in range(dim // 2)], dtype=F64)
    qkv = torch.zeros(1, length, 3, 1, dim)
    for pair in range(dim // 2):
        unit = qkv.clone()
        unit[..., pair] = 1.0
        products = []
        for module in (rope, plain):
            out = module(unit.clone()).to(F64)
            products.append(out[0, :, 0, 0] @ out[0, :, 1, 0].T)
        distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
        expected = products[1] * scale[pair] ** (distance / scale_base)
        torch.testing.assert_close(products[0], expected, rtol=0, atol=8e-6)


def test_the_tables_grow_and_follow_dtype_and_mode() -> None:
    rope = RotaryEmbedding(8)
    rope(torch.zeros(1, 4, 3, 1, 8))
    first = rope._cos_cached
    rope(torch.zeros(1, 3, 3, 1, 8))
    assert rope._cos_cached is first
    rope(torch.zeros(1, 9, 3, 1, 8))
    assert rope._cos_cached is not None
    assert rope._cos_cached.shape == (9, 4)
    rope(torch.zeros(1, 3, 3, 1, 8, dtype=torch.bfloat16))
    assert rope._cos_cached.dtype == torch.bfloat16
    with torch.inference_mode():
        rope(torch.zeros(1, 20, 3, 1, 8))
    qkv = torch.zeros(1, 4, 3, 1, 8, requires_grad=True)
    rope.train()(qkv * 1.0).sum().backward()
    assert qkv.grad is not None


def test_half_precision_modules_keep_exact_frequencies() -> None:
    exact, cast = RotaryEmbedding(8), RotaryEmbedding(8).bfloat16()
    exact._update_cos_sin_cache(4096, device=torch.device("cpu"), dtype=torch.float32)
    cast._update_cos_sin_cache(4096, device=torch.device("cpu"), dtype=torch.float32)
    assert cast.inv_freq.dtype == torch.bfloat16
    assert exact._cos_cached is not None
    assert cast._cos_cached is not None
    assert torch.equal(exact._cos_cached, cast._cos_cached)


def test_the_state_dict_is_empty_and_older_arguments_are_taken() -> None:
    rope = RotaryEmbedding(8, 10000.0, False, None, pos_idx_in_fp32=False)
    assert rope.state_dict() == {}
    expected = torch.tensor([10000.0 ** (-i / 4) for i in range(4)])
    torch.testing.assert_close(rope.inv_freq, expected, rtol=4e-7, atol=0)
    assert math.isclose(rope.base, 10000.0)
