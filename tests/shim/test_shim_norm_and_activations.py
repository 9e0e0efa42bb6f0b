"""flash_attn.ops.rms_norm and flash_attn.ops.activations against formulas in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from metal_flash_attn.shim.flash_attn.ops import activations
from metal_flash_attn.shim.flash_attn.ops.rms_norm import (
    DropoutAddRMSNorm,
    RMSNorm,
    dropout_add_rms_norm,
    rms_norm,
)
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

F64 = torch.float64
DTYPES = [torch.float16, torch.bfloat16, torch.float32, F64]


def normalized(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x, weight = x.to(F64), weight.to(F64)
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def assert_rounded(got: Tensor, expected: Tensor, operations: int) -> None:
    """`got` is `expected` after so many fp32 roundings and one, to nearest, to its own dtype."""
    own, wide = torch.finfo(got.dtype), torch.finfo(F64 if got.dtype == F64 else torch.float32)
    bound = operations * wide.eps * expected.abs().max() + own.eps / 2 * expected.abs()
    assert bool(((got.to(F64) - expected).abs() <= bound + own.smallest_normal * own.eps).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_rms_norm(dtype: torch.dtype, weight_dtype: torch.dtype, epsilon: float) -> None:
    x, weight = 3 * torch.randn(2, 5, 64).to(dtype), torch.randn(64).to(weight_dtype)
    out = rms_norm(x, weight, epsilon)
    assert out.dtype == dtype
    # 64 squares are summed, then a square root, a division and a product.
    assert_rounded(out, normalized(x, weight, epsilon), 70)


def test_rms_norm_of_large_half_precision_numbers_does_not_overflow() -> None:
    x = torch.full((1, 8), 3e4, dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones(8), 0.0), torch.ones(1, 8, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_sum_before_the_norm(
    dtype: torch.dtype, residual_dtype: torch.dtype | None, residual_in_fp32: bool, scaled: bool
) -> None:
    x0, weight, bias = torch.randn(2, 5, 16).to(dtype), torch.randn(16), torch.randn(16)
    residual = None if residual_dtype is None else torch.randn(2, 5, 16).to(residual_dtype)
    rowscale = torch.rand(2, 5).to(dtype) if scaled else None
    layerscale = torch.rand(16) if scaled else None
    results = dropout_add_rms_norm(
        x0,
        residual,
        weight,
        bias,
        0.0,
        1e-5,
        rowscale=rowscale,
        layerscale=layerscale,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        return_dropout_mask=True,
    )
    assert isinstance(results, tuple)
    out, x, mask = results

    expected = x0.to(F64)
    if rowscale is not None and layerscale is not None:
        expected = expected * rowscale.to(F64).unsqueeze(-1) * layerscale.to(F64)
    if residual is not None:
        expected = expected + residual.to(F64)
    assert x.dtype == (residual_dtype or (torch.float32 if residual_in_fp32 else dtype))
    assert_rounded(x, expected, 4)
    assert out.dtype == dtype
    assert_rounded(out, normalized(expected, weight, 1e-5) + bias.to(F64), 30)
    assert mask.dtype == torch.uint8
    assert bool((mask == 1).all())


def test_what_is_returned() -> None:
    x, weight = torch.randn(3, 8), torch.ones(8)
    arguments: Any = (x, None, weight, None, 0.0, 1e-5)
    plain = dropout_add_rms_norm(*arguments)
    assert isinstance(plain, Tensor)
    cases: list[tuple[Any, int]] = [
        ({"prenorm": True}, 2),
        ({"return_dropout_mask": True}, 2),
        ({"prenorm": True, "return_dropout_mask": True}, 3),
    ]
    for options, count in cases:
        results = dropout_add_rms_norm(*arguments, **options)
        assert isinstance(results, tuple)
        assert len(results) == count
        assert torch.equal(results[0], plain)


def test_dropout() -> None:
    p, count = 0.25, 40_000
    x0 = torch.randn(count // 100, 100)
    x0[0, 0] = torch.inf
    torch.manual_seed(0)
    results = dropout_add_rms_norm(
        x0, None, torch.ones(100), None, p, 1e-5, prenorm=True, return_dropout_mask=True
    )
    assert isinstance(results, tuple)
    _, x, mask = results
    assert torch.equal(x, torch.where(mask.bool(), x0 / (1 - p), 0.0))
    # Four standard deviations of a binomial distribution.
    assert abs(float(mask.float().mean()) - (1 - p)) <= 4 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_wrong_dropout_probability(p: float) -> None:
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=rf"dropout_p .*got {p}"):
        dropout_add_rms_norm(x, None, torch.ones(4), None, p, 1e-5)


def test_gradients_of_the_norm() -> None:
    x, residual = (torch.randn(2, 3, 6, dtype=F64, requires_grad=True) for _ in range(2))
    weight, bias, scale = (torch.randn(6, dtype=F64, requires_grad=True) for _ in range(3))

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Any:
        return dropout_add_rms_norm(
            x, residual, weight, bias, 0.0, 1e-5, layerscale=scale, prenorm=True
        )

    assert torch.autograd.gradcheck(function, (x, residual, weight, bias, scale))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))


def test_the_norm_as_a_module() -> None:
    norm = RMSNorm(8, eps=1e-3, dtype=torch.bfloat16)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    assert norm._parameters["bias"] is None
    assert norm.weight.dtype == torch.bfloat16
    assert bool((norm.weight == 1).all())
    x = torch.randn(4, 8)
    assert torch.equal(norm(x), rms_norm(x, norm.weight, 1e-3))


def test_the_norm_with_residual_as_a_module() -> None:
    norm = DropoutAddRMSNorm(8, prenorm=True, p=0.5, residual_in_fp32=True)
    x0, residual = torch.randn(64, 8), torch.randn(64, 8)
    torch.manual_seed(0)
    _, dropped = norm(x0, residual)
    assert not torch.equal(dropped, x0 + residual)
    out, kept = norm.eval()(x0, residual)
    assert torch.equal(kept, x0 + residual)
    assert torch.equal(out, rms_norm(x0 + residual, norm.weight, 1e-5))
    assert norm(x0.bfloat16())[1].dtype == torch.float32


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x.to(F64)))


def gelu(x: Tensor) -> Tensor:
    x = x.to(F64)
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    x, y = 4 * torch.randn(2, 50).to(dtype), torch.randn(2, 50).to(dtype)
    out = activations.swiglu(x, y)
    assert out.dtype == dtype
    assert_rounded(out, x.to(F64) * sigmoid(x) * y.to(F64), 8)
    assert torch.equal(activations.swiglu_fwd(x, y), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype: torch.dtype) -> None:
    x, bias = torch.randn(20, 5).to(dtype), torch.randn(5).to(dtype)
    assert_rounded(activations.gelu_fwd(x), gelu(x), 16)
    assert torch.equal(activations.fast_gelu_impl(x), activations.gelu_fwd(x))
    assert_rounded(activations.bias_gelu(x, bias), gelu(x + bias), 16)
    assert torch.equal(activations.bias_gelu_impl(x, bias), activations.bias_gelu(x, bias))


def test_squared_relu() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert activations.sqrelu_fwd(x).tolist() == [0.0, 0.0, 9.0]


X, Y, G = (torch.randn(4, 7, dtype=F64) for _ in range(3))
BIAS = torch.randn(7, dtype=F64)


@pytest.mark.parametrize(
    ("function", "inputs", "gradients"),
    [
        (activations.swiglu, (X, Y), lambda: activations.swiglu_bwd(X, Y, G)),
        (activations.gelu_fwd, (X,), lambda: (activations.gelu_bwd(G, X),)),
        (activations.bias_gelu, (X, BIAS), lambda: activations.bias_gelu_back(G, X, BIAS)),
        (activations.sqrelu_fwd, (X,), lambda: (activations.sqrelu_bwd(G, X),)),
        (torch.relu, (X,), lambda: (activations.relu_bwd(G, X),)),
    ],
)
def test_gradients_as_functions(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradients: Callable[[], object]
) -> None:
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, leaves)
    expected = torch.autograd.grad(function(*leaves), leaves, G)
    torch.testing.assert_close(gradients(), expected)


def test_gradients_of_half_precision_keep_their_dtype() -> None:
    x, y, g = (t.bfloat16() for t in (X, Y, G))
    assert {t.dtype for t in activations.swiglu_bwd(x, y, g)} == {torch.bfloat16}
    for function in (activations.gelu_bwd, activations.relu_bwd, activations.sqrelu_bwd):
        assert function(g, x).dtype == torch.bfloat16
