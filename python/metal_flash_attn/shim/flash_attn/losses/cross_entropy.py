"""Cross-entropy loss as a module, after `flash_attn.losses.cross_entropy` 2.8."""

# ruff: noqa: A002 (the names of arguments are flash_attn's)

from __future__ import annotations

from torch import Tensor, nn

# Relative: the package is served under the name flash_attn.
from ..ops.triton.cross_entropy import cross_entropy_loss  # noqa: TID252

__all__ = ["CrossEntropyLoss"]

_REDUCTIONS = ("mean", "none", "sum")


class CrossEntropyLoss(nn.Module):
    """`cross_entropy_loss` reduced over the rows.

    Args:
        ignore_index: rows with this label have loss 0 and do not count in the mean.
        reduction: "mean", "none" or "sum".
        label_smoothing: from 0 to 1.
        logit_scale: greater than 0; the logits are multiplied by it.
        lse_square_scale: weight of the z-loss.
        inplace_backward: accepted; the gradient always gets memory of its own.
        process_group: None.
        return_z_loss: return the z-loss as well.

    Raises:
        NotImplementedError: another `reduction`, or a `process_group` is given.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: object = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise NotImplementedError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
        if process_group is not None:
            raise NotImplementedError(
                "process_group: a loss over a vocabulary split between processes is not "
                "supported; gather the logits and pass process_group=None"
            )
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of logits `input` `[rows, classes]` against labels `target` `[rows]`.

        Args:
            input: any floating dtype.
            target: integers.
            precomputed_lse: `[rows]`; see `cross_entropy_loss`.

        Returns:
            A scalar, or `[rows]` where `reduction` is "none"; fp32 (float64 for float64 logits).
            With `return_z_loss` a pair: it and the z-loss, reduced alike, without gradient.
        """
        losses, z_losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        loss = self._reduce(losses, target)
        return (loss, self._reduce(z_losses, target)) if self.return_z_loss else loss

    def _reduce(self, losses: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        if self.reduction == "sum":
            return total
        return total / (target != self.ignore_index).sum()
