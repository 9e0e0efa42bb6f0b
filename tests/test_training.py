"""Small trainings: our loss curve lies as near to stock's as stock's two implementations do."""

# mypy: disable-error-code="call-arg"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from characters import Characters, Sequences, Size, read_documents
from metal_flash_attn import trace
from torch import Tensor
from training import ATTENTIONS, MOST_NOISE, SETTINGS, Plan, Setting, compare, noise_ratio, ours

SMALL = Plan(steps=12, tokens=256, size=Size(layers=1, heads=2, width=32, longest=48))
TEXT = read_documents()[:20_000]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_loss_curve_is_that_of_stock_attention(setting: Setting) -> None:
    with trace() as calls:
        curves = compare(setting, SMALL, TEXT)
    # Ours did compute, forward and backward, in the dtype of the setting.
    served = {(entry.dtype, entry.backward): entry.calls for entry in calls.calls}
    name = str(setting.dtype).removeprefix("torch.")
    assert {kind for kind in served if kind[0] == name} == {(name, False), (name, True)}
    assert curves["ours"].losses[-1] < 0.95 * curves["ours"].losses[0]
    assert noise_ratio(curves) <= MOST_NOISE


def damaged(how: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
        return ours(*how(q, k, v), sequences)

    return attend


DAMAGES = {
    "a scale off by three per cent": lambda q, k, v: (1.03 * q, k, v),
    "no gradient of k": lambda q, k, v: (q, k.detach(), v),
    "values of the key before": lambda q, k, v: (q, k, v.roll(1, 0)),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_wrong_attention_is_noticed(what: str) -> None:
    attentions = ATTENTIONS | {"ours": damaged(DAMAGES[what])}
    curves = compare(SETTINGS[0], SMALL, TEXT, attentions)
    assert noise_ratio(curves) > 2 * MOST_NOISE


def test_batches_are_reproducible_and_cover_any_length() -> None:
    first, second = (Characters(TEXT, seed=3) for _ in range(2))
    lengths = set()
    for _ in range(20):
        (inputs, targets, sequences), other = (c.batch(256, 48, True) for c in (first, second))
        assert torch.equal(inputs, other[0])
        assert sequences.ends[-1] == len(inputs) == len(targets) == 256
        # The target of each token is the next one of the same piece.
        start = 0
        for end in sequences.ends:
            assert torch.equal(inputs[start + 1 : end], targets[start : end - 1])
            start = end
        lengths.update(sequences.lengths)
    assert min(lengths) < 10
    assert max(lengths) == 48
