"""Random problems for the public functions, and what they are called with."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from reference import Rules
from torch import Tensor
from ways import Way

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def strided(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The same values behind other strides."""
    kind = draw(st.sampled_from(["contiguous", "heads first", "padded", "every other", "column"]))
    match kind:
        case "heads first":
            return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
        case "padded":
            return torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2]
        case "every other":
            return tensor.repeat_interleave(2, dim=-3)[..., ::2, :, :]
        case "column":
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        case _:
            return tensor


@st.composite
def all_rules(draw: st.DrawFn, batch: int, heads: int) -> Rules:
    """Rules that flash_attn can express."""
    bound = st.one_of(st.just(-1), st.integers(-3, 40))
    slopes = draw(st.sampled_from([None, (heads,), (batch, heads)]))
    return Rules(
        causal=draw(st.booleans()),
        window=(draw(bound), draw(bound)),
        scale=draw(st.sampled_from([None, 0.3, 1.0, -0.2, 0.0])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5, 20.0])),
        alibi_slopes=None if slopes is None else torch.rand(slopes),
    )


def keywords(way: Way, rules: Rules) -> dict[str, Any]:
    slopes = rules.alibi_slopes
    return {
        "softmax_scale": rules.scale,
        "causal": rules.causal,
        "window_size": rules.window,
        "softcap": rules.softcap,
        "alibi_slopes": None if slopes is None else way.put(slopes),
    }


@st.composite
def heads_and_dims(draw: st.DrawFn, way: Way) -> tuple[int, int, int]:
    """Heads of k, query heads for each of them, head dimension."""
    usual = [1, 8, 40, 64, 80, 128, 256, 300]
    if way.is_simulated:
        # Every head dimension is a kernel of its own, which takes a second to compile.
        return draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from(usual[:6]))
    dim = draw(st.one_of(st.sampled_from(usual), st.integers(1, 70)))
    return draw(st.integers(1, 3)), draw(st.integers(1, 4)), dim


@st.composite
def offsets(draw: st.DrawFn, way: Way, batch: int) -> tuple[list[int], int, int]:
    """Offsets of ragged, sometimes empty sequences; rows in all; the longest length."""
    length = st.integers(0, way.at_most(70))
    lengths = draw(st.lists(length, min_size=batch, max_size=batch))
    start = draw(st.integers(0, 3))
    ends = [start + sum(lengths[: i + 1]) for i in range(batch)]
    total = ends[-1] + draw(st.integers(0, 5)) if ends else start + draw(st.integers(0, 5))
    return [start, *ends], total, max(lengths, default=0) + draw(st.integers(0, 9))


@st.composite
def dense_problems(draw: st.DrawFn, way: Way) -> tuple[Tensor, Tensor, Tensor, Rules]:
    """q, k, v `[batch, length, heads, dim]` of one dtype with any strides, and rules."""
    lengths = st.integers(1, way.at_most(150))
    batch, query_len, key_len = draw(st.tuples(st.integers(1, 3), lengths, lengths))
    key_heads, group, dim = draw(heads_and_dims(way))
    dtype = draw(st.sampled_from(DTYPES))
    q, k, v = (
        strided(draw, way.put(torch.randn(batch, length, heads, dim).to(dtype)))
        for length, heads in [(query_len, key_heads * group), *[(key_len, key_heads)] * 2]
    )
    return q, k, v, draw(all_rules(batch, q.shape[2]))


@st.composite
def packed_problems(
    draw: st.DrawFn, way: Way, least_batch: int = 1
) -> tuple[Tensor, Tensor, Tensor, list[int], list[int], tuple[int, int], Rules]:
    """q, k, v `[rows, heads, dim]`, offsets of q and k, the longest lengths of both, and rules."""
    batch = draw(st.integers(least_batch, 4))
    cu_q, query_rows, longest_q = draw(offsets(way, batch))
    cu_k, key_rows, longest_k = draw(offsets(way, batch))
    key_heads, group, dim = draw(heads_and_dims(way))
    dtype = draw(st.sampled_from(DTYPES))
    q, k, v = (
        strided(draw, way.put(torch.randn(rows, heads, dim).to(dtype)))
        for rows, heads in [(query_rows, key_heads * group), *[(key_rows, key_heads)] * 2]
    )
    rules = draw(all_rules(batch, q.shape[1]))
    return q, k, v, cu_q, cu_k, (longest_q, longest_k), rules


def strides_of_result(tensor: Tensor) -> tuple[int, ...]:
    """The strides that flash_attn gives to what has the shape of `tensor`."""
    has_rows = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return torch.empty_like(tensor if has_rows else tensor.contiguous()).stride()
