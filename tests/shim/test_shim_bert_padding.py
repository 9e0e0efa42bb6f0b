"""flash_attn.bert_padding against loops over the sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metal_flash_attn.shim.flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

if TYPE_CHECKING:
    from collections.abc import Callable

masks = st.integers(1, 5).flatmap(
    lambda length: st.lists(
        st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=4
    )
)


def hidden(batch: int, length: int, *rest: int) -> torch.Tensor:
    count = batch * length * int(torch.tensor(rest).prod())
    return torch.arange(1.0, count + 1.0, dtype=torch.float64).reshape(batch, length, *rest)


@given(masks, st.sampled_from([torch.bool, torch.int64, torch.int32]), st.sampled_from([(), (3,)]))
def test_unpad_input(rows: list[list[bool]], dtype: torch.dtype, heads: tuple[int, ...]) -> None:
    x = hidden(len(rows), len(rows[0]), *heads, 2)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, torch.tensor(rows).to(dtype))

    kept = [x[b, t] for b, row in enumerate(rows) for t, keep in enumerate(row) if keep]
    lengths = [sum(row) for row in rows]
    assert torch.equal(packed, torch.stack(kept) if kept else x.new_empty(0, *heads, 2))
    assert torch.equal(packed, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(rows) + 1)]
    assert (longest, used.tolist()) == (max(lengths), lengths)
    assert (indices.dtype, cu_seqlens.dtype, used.dtype) == (torch.int64, torch.int32, torch.int32)
    assert type(longest) is int


@given(masks)
def test_pad_input_undoes_it(rows: list[list[bool]]) -> None:
    x, mask = hidden(len(rows), len(rows[0]), 3, 2), torch.tensor(rows)
    packed, indices, *_ = unpad_input(x, mask)
    assert torch.equal(pad_input(packed, indices, *mask.shape), x * mask[..., None, None])


def test_unused_tokens_are_packed_but_not_counted_as_used() -> None:
    x = hidden(2, 3, 1)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]])
    unused = torch.tensor([[0, 1, 0], [0, 0, 0]])
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 3, 4]
    assert packed.flatten().tolist() == [1.0, 2.0, 4.0, 5.0]
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 2, 4], 2, [1, 2])


def test_a_batch_without_sequences() -> None:
    packed, indices, cu_seqlens, longest, used = unpad_input(
        torch.zeros(0, 4, 8), torch.zeros(0, 4, dtype=torch.bool)
    )
    assert (packed.shape, indices.shape, used.shape) == ((0, 8), (0,), (0,))
    assert (cu_seqlens.tolist(), longest) == ([0], 0)


def test_concatenated_sequences() -> None:
    x = hidden(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, *range(12, 18)]
    assert torch.equal(packed, x.flatten(0, 1)[indices])
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 8, 10, 16], 6)
    assert cu_seqlens.dtype == torch.int32


def test_index_put_first_axis() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float16)
    out = index_put_first_axis(values, torch.tensor([2, 0]), 4)
    assert out.dtype == torch.float16
    assert out.tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]


def test_the_residual_is_the_input_itself() -> None:
    x = hidden(4, 3)
    rows, residual = index_first_axis_residual(x, torch.tensor([3, 1]))
    assert torch.equal(rows, x[[3, 1]])
    assert residual.data_ptr() == x.data_ptr()
    assert residual.shape == x.shape


INDICES = torch.tensor([4, 0, 4, 2])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: index_first_axis(x, INDICES),
        lambda x: index_first_axis_residual(x, INDICES),
        lambda x: index_put_first_axis(x, torch.tensor([6, 0, 1, 5, 2]), 7),
        lambda x: pad_input(x, torch.tensor([1, 3, 4, 5, 9]), 2, 5),
        lambda x: unpad_input(x.unsqueeze(0), torch.tensor([[1, 1, 0, 0, 1]]))[0],
        lambda x: unpad_input_for_concatenated_sequences(
            x.unsqueeze(0), torch.tensor([[2, 1, 0, 0, 0]])
        )[0],
    ],
)
def test_gradients(function: Callable[..., Any]) -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x,))
