"""Cross-entropy loss of each row, after `flash_attn.ops.triton.cross_entropy` 2.8."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cross_entropy_loss"]


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,  # noqa: ARG001
    process_group: object = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy between logits and labels, with label smoothing and z-loss.

    With `x = logits * logit_scale`, `lse = logsumexp(x)` and smoothing `s`, a row's loss is
    `lse - (1 - s) * x[label] - s * mean(x) + lse_square_scale * lse ** 2`. The last term is the
    z-loss (Chowdhery et al., https://arxiv.org/abs/2204.02311, section 5).

    Args:
        logits: `[rows, classes]`.
        labels: `[rows]`, integer. A label outside the classes adds no cross entropy, but its share
            of smoothing and z-loss, as in flash_attn.
        precomputed_lse: `[rows]`, `logsumexp(logits)`, to save that pass where no gradient is
            wanted, `logit_scale` is 1 and `label_smoothing` is 0.
        label_smoothing: from 0 to 1.
        logit_scale: greater than 0.
        lse_square_scale: weight of the z-loss.
        ignore_index: a row with this label has loss 0.
        inplace_backward: accepted; the gradient always gets memory of its own.
        process_group: None.

    Returns:
        Losses and z-losses, `[rows]` each, fp32 (float64 for float64 logits). The second is part of
        the first and carries no gradient.

    Raises:
        NotImplementedError: a `process_group` is given.
        ValueError: shapes do not fit, or `logit_scale` is not positive.
    """
    _check(logits, labels, logit_scale, process_group)
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        x = x * logit_scale

    lse_is_given = precomputed_lse is not None and logit_scale == 1.0 and label_smoothing == 0.0
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    if precomputed_lse is not None and lse_is_given and not wants_gradient:
        lse = precomputed_lse.to(x.dtype)
    else:
        lse = x.logsumexp(dim=-1)

    in_range = (labels >= 0) & (labels < logits.shape[1])
    index = torch.where(in_range, labels, 0).long().unsqueeze(-1)
    losses = torch.where(in_range, lse - x.gather(-1, index).squeeze(-1), 0.0)
    if label_smoothing != 0.0:
        losses = (1.0 - label_smoothing) * losses + label_smoothing * (lse - x.mean(dim=-1))
    z_losses = lse_square_scale * lse.square()
    ignored = labels == ignore_index
    losses = (losses + z_losses).masked_fill(ignored, 0.0)
    return losses, z_losses.detach().masked_fill(ignored, 0.0)


def _check(logits: Tensor, labels: Tensor, logit_scale: float, process_group: object) -> None:
    if process_group is not None:
        raise NotImplementedError(
            "process_group: a loss over a vocabulary split between processes is not supported; "
            "gather the logits and pass process_group=None"
        )
    if logits.dim() != 2:
        raise ValueError(f"logits must be [rows, classes], got shape {tuple(logits.shape)}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must have shape ({logits.shape[0]},) like the rows of logits, "
            f"got {tuple(labels.shape)}"
        )
    if not logit_scale > 0.0:
        raise ValueError(f"logit_scale must be greater than 0, got {logit_scale}")
