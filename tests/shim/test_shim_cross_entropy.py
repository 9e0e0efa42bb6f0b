"""flash_attn.losses.cross_entropy against the formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from metal_flash_attn.shim.flash_attn.losses.cross_entropy import CrossEntropyLoss
from metal_flash_attn.shim.flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from torch import Tensor

F64 = torch.float64
ROWS, CLASSES = 6, 9
LABELS = torch.tensor([0, 8, 3, -100, 5, 3])
OPTIONS: list[dict[str, float]] = [
    {},
    {"label_smoothing": 0.1},
    {"logit_scale": 0.7},
    {"lse_square_scale": 0.05},
    {"label_smoothing": 0.2, "logit_scale": 1.5, "lse_square_scale": 0.01},
    {"ignore_index": 3},
]


def formula(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
) -> tuple[list[float], list[float]]:
    losses, z_losses = [], []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label == ignore_index:
            losses.append(0.0)
            z_losses.append(0.0)
            continue
        x = [logit_scale * value for value in row]
        lse = math.log(sum(math.exp(value) for value in x))
        target = [label_smoothing / len(x)] * len(x)
        if 0 <= label < len(x):
            target[label] += 1 - label_smoothing
        z_losses.append(lse_square_scale * lse * lse)
        entropy = sum(p * (lse - value) for p, value in zip(target, x, strict=True))
        losses.append(entropy + z_losses[-1])
    return losses, z_losses


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_the_loss_of_each_row(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(ROWS, CLASSES)).to(dtype)
    labels = LABELS.masked_fill(LABELS == -100, options.get("ignore_index", -100))
    losses, z_losses = cross_entropy_loss(logits, labels, **options)
    expected, expected_z = formula(logits, labels, **options)
    assert losses.dtype == z_losses.dtype == (F64 if dtype == F64 else torch.float32)
    # A sum over the classes, its logarithm and a handful of operations on numbers below 100.
    bound = 100 * (CLASSES + 8) * torch.finfo(losses.dtype).eps
    torch.testing.assert_close(
        losses.to(F64), torch.tensor(expected, dtype=F64), rtol=0, atol=bound
    )
    torch.testing.assert_close(
        z_losses.to(F64), torch.tensor(expected_z, dtype=F64), rtol=0, atol=bound
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_outside_the_classes(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(3, 4, dtype=F64), torch.tensor([4, -1, 2], dtype=dtype)
    options: Any = {"label_smoothing": 0.1, "lse_square_scale": 0.3}
    losses, _ = cross_entropy_loss(logits, labels, **options)
    lse = logits.logsumexp(-1)
    outside = 0.1 * (lse - logits.mean(-1)) + 0.3 * lse.square()
    torch.testing.assert_close(losses[:2], outside[:2])
    torch.testing.assert_close(losses[2].item(), formula(logits[2:], labels[2:], **options)[0][0])


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients(options: dict[str, Any]) -> None:
    logits = torch.randn(ROWS, CLASSES, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cross_entropy_loss(x, LABELS, **options)[0], logits)


def test_ignored_rows_have_no_gradient() -> None:
    logits = torch.randn(ROWS, CLASSES, requires_grad=True)
    losses, z_losses = cross_entropy_loss(logits, LABELS, lse_square_scale=0.1)
    assert not z_losses.requires_grad
    losses.sum().backward()
    assert logits.grad is not None
    assert [bool(row.any()) for row in logits.grad] == [True, True, True, False, True, True]


def test_a_given_log_sum_exp_is_used_for_values_and_not_for_gradients() -> None:
    logits = torch.randn(ROWS, CLASSES, dtype=F64)
    losses, _ = cross_entropy_loss(logits, LABELS)
    shifted, _ = cross_entropy_loss(logits, LABELS, precomputed_lse=logits.logsumexp(-1) + 1)
    torch.testing.assert_close(shifted, (losses + 1).masked_fill(LABELS == -100, 0.0))
    others: list[Any] = [{"logit_scale": 2.0}, {"label_smoothing": 0.1}]
    for options in others:
        with_lse, _ = cross_entropy_loss(logits, LABELS, logits.logsumexp(-1) + 1, **options)
        assert torch.equal(with_lse, cross_entropy_loss(logits, LABELS, **options)[0])

    lse = logits.logsumexp(-1)
    leaf = logits.requires_grad_()
    given = torch.autograd.grad(cross_entropy_loss(leaf, LABELS, lse)[0].sum(), leaf)
    torch.testing.assert_close(
        given, torch.autograd.grad(cross_entropy_loss(leaf, LABELS)[0].sum(), leaf)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_module_reduces(reduction: str, options: dict[str, Any]) -> None:
    logits = torch.randn(ROWS, CLASSES)
    loss = CrossEntropyLoss(reduction=reduction, return_z_loss=True, **options)
    results = loss(logits, LABELS)
    assert isinstance(results, tuple)
    ignore_index = options.get("ignore_index", -100)
    counted = sum(label != ignore_index for label in LABELS.tolist())
    for got, rows in zip(results, cross_entropy_loss(logits, LABELS, **options), strict=True):
        expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counted}[reduction]
        torch.testing.assert_close(got, expected)
    alone = CrossEntropyLoss(reduction=reduction, **options)(logits, LABELS)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, results[0])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_module_agrees_with_torch(label_smoothing: float) -> None:
    logits = torch.randn(ROWS, CLASSES, dtype=F64)
    ours = CrossEntropyLoss(label_smoothing=label_smoothing, inplace_backward=True)
    torchs = torch.nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    torch.testing.assert_close(ours(logits, LABELS), torchs(logits, LABELS))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: CrossEntropyLoss(reduction="max"), NotImplementedError, ["reduction", "'max'"]),
        (lambda: CrossEntropyLoss(process_group=object()), NotImplementedError, ["process_group"]),
        (
            lambda: cross_entropy_loss(torch.zeros(2, 3), LABELS[:2], process_group=object()),
            NotImplementedError,
            ["process_group"],
        ),
        (
            lambda: cross_entropy_loss(torch.zeros(2, 3, 4), LABELS[:2]),
            ValueError,
            ["logits", "(2, 3, 4)"],
        ),
        (lambda: cross_entropy_loss(torch.zeros(2, 3), LABELS), ValueError, ["labels", "(6,)"]),
        (
            lambda: cross_entropy_loss(torch.zeros(2, 3), LABELS[:2], logit_scale=0.0),
            ValueError,
            ["logit_scale", "got 0.0"],
        ),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value
