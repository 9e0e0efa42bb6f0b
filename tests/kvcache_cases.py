"""Random calls of `flash_attn_with_kvcache`, and what they must do, by its definition.

Values of k and q, and of the tables of rotary embeddings, are small multiples of powers of two:
rotating them is exact in every dtype, so that caches are compared bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from metal_flash_attn import flash_attn_with_kvcache
from reference import Arithmetic, Reference, Rules, attention
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Case:
    """One call: the caches as views of their memory, and the other arguments by name."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    memory: list[Tensor]
    """What the caches are views of."""
    rest: dict[str, Any] = field(default_factory=dict)

    def filled(self) -> list[int]:
        """Positions of each sequence that hold something before the call."""
        lengths, batch = self.rest.get("cache_seqlens"), self.q.shape[0]
        if lengths is None:
            table = self.rest.get("block_table")
            pages = 1 if table is None else table.shape[1]
            return [pages * self.k_cache.shape[1]] * batch
        return [lengths] * batch if isinstance(lengths, int) else lengths.tolist()

    def places(self, sequence: int) -> list[tuple[int, int]]:
        """Slot or page, and row, of each key of a sequence, the new ones last."""
        new = self.rest.get("k")
        end = self.filled()[sequence] + (0 if new is None else new.shape[1])
        pad = self.rest.get("cache_leftpad")
        positions = range(0 if pad is None else int(pad[sequence]), end)
        table, index = self.rest.get("block_table"), self.rest.get("cache_batch_idx")
        if table is not None:
            size = self.k_cache.shape[1]
            return [(int(table[sequence, p // size]), p % size) for p in positions]
        slot = sequence if index is None else int(index[sequence])
        return [(slot, p) for p in positions]

    def advance(self) -> bool:
        """Whether query i stands at its own position."""
        table = self.rest.get("block_table")
        capacity = self.k_cache.shape[1] * (1 if table is None else table.shape[1])
        left, right = self.rest.get("window_size", (-1, -1))
        bounded = 0 <= left < capacity or 0 <= right < capacity
        return bool(self.rest.get("causal")) or bounded

    def rotated(self, x: Tensor, advance: bool) -> Tensor:
        """`x [B, L, heads, D]` with its tokens at positions from `filled` on."""
        cos, sin = self.rest.get("rotary_cos"), self.rest.get("rotary_sin")
        if cos is None or sin is None:
            return x
        steps = torch.arange(x.shape[1]) * (1 if advance else 0)
        positions = torch.tensor(self.filled())[:, None] + steps
        c, s = (table.double()[positions][:, :, None] for table in (cos, sin))
        dim = 2 * cos.shape[1]
        first, second = slice(0, dim // 2), slice(dim // 2, dim)
        if self.rest.get("rotary_interleaved", True):
            first, second = slice(0, dim, 2), slice(1, dim, 2)
        result = x.double()
        a, b = result[..., first].clone(), result[..., second].clone()
        result[..., first], result[..., second] = a * c - b * s, a * s + b * c
        return result.to(x.dtype)

    def run(self) -> tuple[Tensor, Tensor]:
        """Calls the function: out and lse."""
        result: tuple[Tensor, Tensor] = flash_attn_with_kvcache(
            self.q, self.k_cache, self.v_cache, **self.rest, return_softmax_lse=True
        )
        return result

    def expect_caches(self) -> list[Tensor]:
        """The memory of the caches as it must be after the call."""
        memory = [part.clone() for part in self.memory]
        if self.rest.get("k") is None:
            return memory
        new = (self.rotated(self.rest["k"], advance=True), self.rest["v"])
        caches = [
            part.as_strided(cache.shape, cache.stride(), cache.storage_offset())
            for part, cache in zip(memory * 2, (self.k_cache, self.v_cache), strict=False)
        ]
        for sequence in range(self.q.shape[0]):
            count = new[0].shape[1]
            for token, (block, row) in enumerate(self.places(sequence)[-count:] if count else []):
                for cache, tokens in zip(caches, new, strict=True):
                    cache[block, row] = tokens[sequence, token]
        return memory

    def expect(self, arithmetic: Arithmetic) -> Reference:
        """The results, from caches that hold the new keys already."""
        q, slopes = self.rotated(self.q, self.advance()), self.rest.get("alibi_slopes")
        parts = []
        for sequence in range(q.shape[0]):
            places = self.places(sequence)
            blocks, rows = (torch.tensor([p[i] for p in places], dtype=torch.long) for i in (0, 1))
            own = slopes[sequence] if slopes is not None and slopes.dim() == 2 else slopes
            rules = Rules(
                causal=self.rest.get("causal", False),
                window=self.rest.get("window_size", (-1, -1)),
                scale=self.rest.get("softmax_scale"),
                softcap=self.rest.get("softcap", 0.0),
                alibi_slopes=own,
            )
            keys, values = self.k_cache[blocks, rows][None], self.v_cache[blocks, rows][None]
            parts.append(attention(q[sequence, None], keys, values, rules, arithmetic))
        names = ("out", "lse", "out_bound", "lse_bound")
        return Reference(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


FLOAT32 = Arithmetic()


def check(case: Case, arithmetic: Arithmetic = FLOAT32) -> None:
    """Runs a call; compares its results, and all memory of the caches."""
    expected, q = case.expect_caches(), case.q.clone()
    out, lse = case.run()
    for before, after in zip(expected, case.memory, strict=True):
        assert torch.equal(before.cpu(), after.cpu()), "the caches hold something else"
    assert torch.equal(q, case.q), "q was written"
    case.expect(arithmetic).check(out, lse)


def coarse(generator: torch.Generator, *shape: int) -> Tensor:
    """Quarters from -2 to 2."""
    return torch.randint(-8, 9, shape, generator=generator) / 4


@st.composite
def cases(draw: st.DrawFn, longest: int = 70) -> Case:
    """Any combination of all arguments."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, query_len = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    dim = draw(st.sampled_from([4, 8, 20, 64, 72]))
    value_dim = draw(st.sampled_from([dim, dim, 12]))
    paged = draw(st.booleans())
    rest: dict[str, Any] = {}
    if paged:
        size, per_sequence = draw(st.sampled_from([16, 32, 48])), draw(st.integers(1, 3))
        blocks = batch * per_sequence + draw(st.integers(0, 2))
        capacity = size * per_sequence
        pages = torch.randperm(blocks, generator=generator)[: batch * per_sequence]
        rest["block_table"] = pages.view(batch, per_sequence).int()
    else:
        size = capacity = draw(st.integers(1, longest))
        blocks = batch
        if draw(st.booleans()):
            blocks += draw(st.integers(0, 3))
            index = torch.randperm(blocks, generator=generator)[:batch]
            rest["cache_batch_idx"] = index.int()
    new_len = draw(st.integers(0, min(4, capacity))) if draw(st.booleans()) else None
    most = capacity - (new_len or 0)
    lengths = torch.randint(0, most + 1, (batch,), generator=generator).int()
    how = draw(st.sampled_from(["tensor", "tensor", "int", "none"]))
    if how == "int":
        rest["cache_seqlens"] = int(lengths[0])
    elif how == "tensor" or new_len:
        rest["cache_seqlens"] = lengths
    _spoil_unused_pages(rest, size, new_len or 0)
    case = _with_caches(draw, generator, dtype, (blocks, size, key_heads), (dim, value_dim))
    case.q = coarse(generator, batch, query_len, key_heads * group, dim).to(dtype)
    case.rest = rest
    if not paged and draw(st.booleans()):
        pads = [int(torch.randint(0, n + 1, (1,), generator=generator)) for n in case.filled()]
        rest["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32)
    if new_len is not None and rest.get("cache_seqlens") is not None:
        rest["k"] = coarse(generator, batch, new_len, key_heads, dim).to(dtype)
        rest["v"] = torch.randn(batch, new_len, key_heads, value_dim, generator=generator).to(dtype)
        if draw(st.booleans()):
            half = draw(st.integers(1, dim // 2))
            positions = capacity + query_len + draw(st.integers(0, 3))
            rest["rotary_cos"], rest["rotary_sin"] = (
                (torch.randint(-2, 3, (positions, half), generator=generator) / 2).to(dtype)
                for _ in range(2)
            )
            rest["rotary_interleaved"] = draw(st.booleans())
    _draw_rules(draw, generator, rest, (batch, key_heads * group))
    return case


def _draw_rules(
    draw: st.DrawFn, generator: torch.Generator, rest: dict[str, Any], heads: tuple[int, int]
) -> None:
    rest["causal"] = draw(st.booleans())
    if draw(st.booleans()):
        rest["window_size"] = (draw(st.integers(-1, 80)), draw(st.integers(-1, 20)))
    if draw(st.booleans()):
        rest["softmax_scale"] = draw(st.sampled_from([0.1, 1.0, -0.4]))
    if draw(st.booleans()):
        rest["softcap"] = draw(st.sampled_from([0.7, 20.0]))
    if draw(st.booleans()):
        shape = heads if draw(st.booleans()) else heads[1:]
        rest["alibi_slopes"] = torch.rand(shape, generator=generator)
    rest["num_splits"] = draw(st.sampled_from([0, 1, 3, 128]))


def _spoil_unused_pages(rest: dict[str, Any], size: int, new_len: int) -> None:
    table, lengths = rest.get("block_table"), rest.get("cache_seqlens")
    if table is None or lengths is None:
        return
    for sequence, row in enumerate(table):
        length = lengths if isinstance(lengths, int) else int(lengths[sequence])
        row[-(-(length + new_len) // size) :] = -(10**6)


def _with_caches(
    draw: st.DrawFn,
    generator: torch.Generator,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    dims: tuple[int, int],
) -> Case:
    """Caches that are tensors of their own, with heads first in memory, or halves of one tensor."""
    layouts = ["own", "heads first"] + (["halves"] if dims[0] == dims[1] else [])
    layout = draw(st.sampled_from(layouts))
    blocks, size, heads = shape

    def fill(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    if layout == "halves":
        both = fill(blocks, 2, size, heads, dims[0])
        return Case(both, both[:, 0], both[:, 1], [both])
    if layout == "own":
        k_cache, v_cache = (fill(blocks, size, heads, dim) for dim in dims)
        return Case(k_cache, k_cache, v_cache, [k_cache, v_cache])
    # A few positions more than are used, which must stay as they are.
    memory = [fill(blocks, heads, size + 3, dim) for dim in dims]
    k_cache, v_cache = (part.transpose(1, 2)[:, :size] for part in memory)
    return Case(k_cache, k_cache, v_cache, memory)
