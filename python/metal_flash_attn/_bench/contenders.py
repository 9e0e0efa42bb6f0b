"""The calls that are compared: torch's attention, and each tier of this package that can serve.

Each library gets the memory order that it is used with: ours `[batch, seqlen, heads, head_dim]`,
torch's `[batch, heads, seqlen, head_dim]`, both contiguous; where `Problem.layout` is "heads", ours
reads torch's. Packed sequences are padded for torch, and what torch has no argument for becomes a
boolean mask.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from metal_flash_attn import _native
from metal_flash_attn._doctor import environment
from metal_flash_attn.interface import flash_attn_func, flash_attn_varlen_func, plan

from .problem import Problem

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

STOCK = "stock"
"""torch's scaled_dot_product_attention, with the backend that it chooses itself."""
MATH = "math"
"""The same with torch's math backend, which holds all scores."""
UNMEASURED = frozenset({"scalar"})
"""Tiers that are measured only when they are named: they are meant to be right, not fast."""
UNSIMULATED = frozenset({"cpu", "torch"})
"""Tiers without a Metal kernel."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of the output, in the memory order of each library.

    Attributes:
        offsets: where packed sequences begin and end, int32; None for others.
        mask: what torch's call hides by a boolean mask.
        torch_causal: whether torch's call hides keys by `is_causal`.
    """

    problem: Problem
    ours: list[Tensor]
    stock: list[Tensor]
    offsets: Tensor | None
    mask: Tensor | None
    torch_causal: bool

    def our_call(self) -> Call:
        """A call of this package, by the tier that the settings ask for."""
        problem, (q, k, v, gradient), offsets = self.problem, self.ours, self.offsets
        causal, window = problem.causal, problem.window

        def dense() -> Any:
            return flash_attn_func(q, k, v, causal=causal, window_size=window)

        def packed(offsets: Tensor) -> Any:
            longest = problem.query_len
            return flash_attn_varlen_func(
                q, k, v, offsets, offsets, longest, longest, causal=causal, window_size=window
            )

        forward = dense if offsets is None else functools.partial(packed, offsets)
        if not problem.backward:
            return forward
        return lambda: torch.autograd.grad(forward(), (q, k, v), gradient)

    def stock_call(self) -> Call:
        """A call of torch, by the backend that it chooses."""
        problem, (q, k, v, gradient) = self.problem, self.stock
        causal, mask = self.torch_causal, self.mask
        grouped = problem.heads != problem.key_heads

        def forward() -> Tensor:
            return sdpa(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

        if not problem.backward:
            return forward
        return lambda: torch.autograd.grad(forward(), (q, k, v), gradient)

    def plan(self, *, backward: bool) -> Any:
        """What would serve our call under the present settings."""
        q, k, v, _ = self.ours
        return plan(
            q,
            k,
            v,
            causal=self.problem.causal,
            window_size=self.problem.window,
            cu_seqlens_q=self.offsets,
            cu_seqlens_k=self.offsets,
            max_seqlen_q=self.problem.query_len if self.problem.lengths else 0,
            max_seqlen_k=self.problem.key_len if self.problem.lengths else 0,
            backward=backward,
        )

    def in_our_order(self, result: Tensor) -> Tensor:
        """A result of torch's call as ours is laid out, without what was padded."""
        rows = result.transpose(1, 2)
        if not self.problem.lengths:
            return rows
        return torch.cat(
            [row[:length] for row, length in zip(rows, self.problem.lengths, strict=True)]
        )


def prepare(problem: Problem, device: str = "cpu") -> Inputs:
    """Random inputs of a normal distribution, made on the device."""
    dtype = DTYPES[problem.dtype]
    query_rows, key_rows = problem.tokens
    sizes = [
        (query_rows, problem.heads, problem.head_dim),
        (key_rows, problem.key_heads, problem.head_dim),
        (key_rows, problem.key_heads, problem.value_dim),
        (query_rows, problem.heads, problem.value_dim),
    ]
    ours = [torch.randn(size, device=device, dtype=dtype) for size in sizes]
    if not problem.lengths:
        ours = [tensor.unflatten(0, (problem.batch, -1)) for tensor in ours]
        stock = [tensor.transpose(1, 2).contiguous() for tensor in ours]
    else:
        stock = [_padded(tensor, problem.lengths).transpose(1, 2).contiguous() for tensor in ours]
    if problem.layout == "heads" and not problem.lengths:
        ours = [tensor.transpose(1, 2) for tensor in stock]
    if problem.backward:
        for tensors in (ours, stock):
            tensors[:3] = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    offsets = None
    if problem.lengths:
        starts = [0, *accumulate(problem.lengths)]
        offsets = torch.tensor(starts, dtype=torch.int32, device=device)
    mask = _mask(problem, device)
    return Inputs(problem, ours, stock, offsets, mask, problem.causal and mask is None)


def _padded(packed: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(packed.split(list(lengths))), batch_first=True)


def _mask(problem: Problem, device: str) -> Tensor | None:
    """What torch's call has to hide beyond `is_causal`, whose diagonal starts at the first key."""
    left, right = problem.window
    right = 0 if problem.causal else right
    windowed = left >= 0 or (right >= 0 and not problem.causal)
    shifted = problem.causal and problem.query_len != problem.key_len
    mask = None
    if windowed or shifted or (problem.causal and problem.lengths):
        queries = torch.arange(problem.query_len, device=device)[:, None]
        keys = torch.arange(problem.key_len, device=device)
        distance = keys - (queries + problem.key_len - problem.query_len)
        mask = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            mask &= distance >= -left
        if right >= 0:
            mask &= distance <= right
    if problem.lengths:
        lengths = torch.tensor(problem.lengths, device=device)[:, None, None, None]
        real = torch.arange(problem.key_len, device=device) < lengths
        # Rows of the padding see the keys that all sequences have, so that none of them is empty.
        mask = real if mask is None else real & mask
    return mask


@dataclass
class Contender:
    """One way to compute a problem.

    Attributes:
        name: "stock", "math" or a tier.
        call: computes it once, under `settings`.
        settings: what has to hold meanwhile.
        detail: what serves, in the planner's words.
    """

    name: str
    call: Call
    settings: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    detail: str = ""


@dataclass
class Absent:
    """A contender that takes no part, and why."""

    name: str
    reason: str


def _math() -> contextlib.AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH)


def tiers() -> list[str]:
    """Names of all tiers, in the planner's order."""
    names: list[str] = _native._machine()["tiers"]
    return names


def contenders(inputs: Inputs, names: Sequence[str]) -> Iterator[Contender | Absent]:
    """Each of `names` as a call, or the planner's reason why it cannot serve."""
    for name in names:
        if name == STOCK:
            yield Contender(name, inputs.stock_call())
        elif name == MATH:
            yield Contender(name, inputs.stock_call(), _math)
        else:
            yield _tier(inputs, name)


def _tier(inputs: Inputs, name: str) -> Contender | Absent:
    def settings() -> contextlib.AbstractContextManager[None]:
        return environment(MTLFLASHATTN_KERNEL=name)

    try:
        with settings():
            planned = inputs.plan(backward=False)
            if inputs.problem.backward:
                inputs.plan(backward=True)
    except NotImplementedError as error:
        return Absent(name, reason_of(str(error), name))
    detail = planned.tile or planned.isa or ""
    return Contender(name, inputs.our_call(), settings, detail)


def reason_of(message: str, tier: str) -> str:
    """The planner's reason within an error about a tier, or all of the error."""
    found = re.search(rf"\b{re.escape(tier)}: (.*?)\)? is not supported", message)
    return found[1] if found else message
