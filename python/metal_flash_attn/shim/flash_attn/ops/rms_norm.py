"""Root-mean-square normalisation, after `flash_attn.ops.rms_norm` 2.8.

`rms_norm(x) = x / sqrt(mean(x ** 2) + epsilon) * weight` over the last dimension (Zhang and
Sennrich, https://arxiv.org/abs/1910.07467). Sums and statistics are formed in fp32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DropoutAddRMSNorm", "RMSNorm", "dropout_add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalise the last dimension.

    Args:
        x: `[..., features]`.
        weight: `[features]`.
        epsilon: added to the mean square.

    Returns:
        `[..., features]` in the dtype of `x`.
    """
    return _normalize(x.to(_wide(x)), weight, None, epsilon).to(x.dtype)


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`x = dropout(x0 * rowscale) * layerscale + residual`, then `rms_norm(x) + bias`.

    Args:
        x0: `[..., features]`.
        residual: as `x0`, or None.
        weight: `[features]`.
        bias: `[features]`, or None.
        dropout_p: probability of dropping an element, at least 0 and less than 1.
        epsilon: added to the mean square.
        rowscale: the shape of `x0` without its last dimension, or None.
        layerscale: `[features]`, or None.
        prenorm: return `x` as well.
        residual_in_fp32: without a `residual`, return `x` in fp32; with one, its dtype counts.
        return_dropout_mask: return the mask as well.

    Returns:
        The normalised tensor in the dtype of `x0`. With `prenorm` or `return_dropout_mask` a tuple:
        it, then `x`, then the mask, uint8 in the shape of `x0`, 1 where an element was kept.

    Raises:
        ValueError: `dropout_p` is outside its range.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p}")
    wide = _wide(x0)
    x = x0.to(wide)
    if rowscale is not None:
        x = x * rowscale.to(wide).unsqueeze(-1)
    mask = None
    if dropout_p > 0.0:
        mask = torch.rand(x0.shape, device=x0.device) >= dropout_p
        x = torch.where(mask, x / (1.0 - dropout_p), 0.0)
    if layerscale is not None:
        x = x * layerscale.to(wide)
    if residual is not None:
        x = x + residual.to(wide)
    out = _normalize(x, weight, bias, epsilon).to(x0.dtype)

    results = [out]
    if prenorm:
        without_residual = torch.float32 if residual_in_fp32 else x0.dtype
        results.append(x.to(without_residual if residual is None else residual.dtype))
    if return_dropout_mask:
        kept = torch.ones_like(x0, dtype=torch.uint8) if mask is None else mask.to(torch.uint8)
        results.append(kept)
    return out if len(results) == 1 else tuple(results)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight of `[hidden_size]`, ones at first.

    Args:
        hidden_size: number of features.
        eps: added to the mean square.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `[..., hidden_size]`."""
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(nn.Module):
    """`dropout_add_rms_norm` with a learned weight of `[hidden_size]`, ones at first.

    Args:
        hidden_size: number of features.
        prenorm: return the sum before normalisation as well.
        p: probability of dropout while training.
        eps: added to the mean square.
        residual_in_fp32: keep that sum in fp32 where there is no residual to give its dtype.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Add `x0` of `[..., hidden_size]`, dropped out, to `residual`, and normalise the sum."""
        return dropout_add_rms_norm(
            x0,
            residual,
            self.weight,
            None,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    normalized = nn.functional.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)
    return normalized if bias is None else normalized + bias.to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
