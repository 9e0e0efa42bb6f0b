"""Activation functions, after `flash_attn.ops.activations` 2.8.

The names ending in `_fwd`, `_bwd` and `_back` are a value and its gradient as separate functions;
the others are differentiable. `gelu` means the tanh approximation of Hendrycks and Gimpel,
https://arxiv.org/abs/1606.08415.
"""

# ruff: noqa: A002 (the names of arguments are flash_attn's)

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "bias_gelu",
    "bias_gelu_back",
    "bias_gelu_impl",
    "fast_gelu_impl",
    "gelu_bwd",
    "gelu_fwd",
    "relu_bwd",
    "sqrelu_bwd",
    "sqrelu_fwd",
    "swiglu",
    "swiglu_bwd",
    "swiglu_fwd",
]


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """`silu(x) * y` (Shazeer, https://arxiv.org/abs/2002.05202), elementwise.

    The product is formed in fp32 at least and rounded once, to the dtype of `x`.
    """
    wide = _wide(x)
    return (functional.silu(x.to(wide)) * y.to(wide)).to(x.dtype)


def swiglu_fwd(x: Tensor, y: Tensor) -> Tensor:
    """`swiglu(x, y)`."""
    return swiglu(x, y)


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu(x, y)` with respect to `x` and `y`, given the output's, `g`."""
    wide = _wide(x)
    x_wide, y_wide, g_wide = x.to(wide), y.to(wide), g.to(wide)
    dx = torch.ops.aten.silu_backward(g_wide * y_wide, x_wide)
    return dx.to(x.dtype), (g_wide * functional.silu(x_wide)).to(y.dtype)


def gelu_fwd(x: Tensor) -> Tensor:
    """`gelu(x)`."""
    return functional.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Gradient of `gelu(x)`, given the output's, `g`."""
    gradient: Tensor = torch.ops.aten.gelu_backward(g, x, approximate="tanh")
    return gradient.to(x.dtype)


def fast_gelu_impl(input: Tensor) -> Tensor:
    """`gelu(input)`, differentiable."""
    return gelu_fwd(input)


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """`gelu(y + bias)` for `y` of `[..., features]` and `bias` of `[features]`."""
    return gelu_fwd(y + bias).to(y.dtype)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `bias_gelu(y, bias)`, `y` of `[rows, features]`, given the output's, `g`."""
    gradient = gelu_bwd(g, y + bias)
    return gradient.to(y.dtype), gradient.sum(dim=0, dtype=bias.dtype)


def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu(input, bias)`, differentiable in both."""
    return bias_gelu(input, bias)


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Gradient of `relu(x)`, given the output's, `g`; at `x == 0` it is `g`, as in flash_attn."""
    return torch.where(x >= 0, g, 0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """`relu(x) ** 2` (So et al., https://arxiv.org/abs/2109.08668)."""
    return functional.relu(x).square()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """Gradient of `sqrelu_fwd(x)`, given the output's, `g`."""
    return (2 * g * functional.relu(x)).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
