"""What is measured: one attention call, and how much work it is. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

DTYPES = ("f32", "f16", "bf16")
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
FORM = "BATCHxLENGTHxHEADSxHEAD_DIM, with QUERIES:KEYS, HEADS/KEY_HEADS, HEAD_DIM/VALUE_DIM"
_SHAPE = re.compile(r"(\d+)x(\d+)(?::(\d+))?x(\d+)(?:/(\d+))?x(\d+)(?:/(\d+))?")

_FEW_ROWS = 16
"""Queries of a key up to which reading it takes longer than computing with it."""


@cache
def _visible(query_len: int, key_len: int, left: int, right: int) -> int:
    """Pairs of a query and a key of its window; the diagonal ends at the last of both."""
    if left < 0 and right < 0:
        return query_len * key_len
    pairs = 0
    for diagonal in range(key_len - query_len, key_len):
        start = 0 if left < 0 else max(diagonal - left, 0)
        end = key_len if right < 0 else min(diagonal + right + 1, key_len)
        pairs += max(end - start, 0)
    return pairs


@dataclass(frozen=True)
class Problem:
    """Attention of sequences of equal length, or of `lengths` behind one another.

    Attributes:
        window: keys visible before and after the diagonal, -1 for all.
        lengths: of packed sequences; `batch` is 1 and both lengths are the longest of them then.
        layout: how our tensors lie in memory: "tokens" is `[B, L, H, D]`, the order of flash_attn,
            "heads" is `[B, H, L, D]`, that of torch and of the caches of transformers.
        name: of a preset's call; empty for others.
    """

    query_len: int
    key_len: int
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    batch: int = 1
    dtype: str = "f32"
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    lengths: tuple[int, ...] = ()
    backward: bool = False
    layout: Literal["tokens", "heads"] = "tokens"
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Problem:
        """A problem of the sizes that `shape` writes.

        Raises:
            ValueError: sizes that are missing, zero, or do not fit one another.
        """
        found = _SHAPE.fullmatch(text.strip().lower())
        if found is None:
            raise ValueError(f"--shape is {text!r}; allowed: {FORM}, such as 1x4096x32/8x128")
        batch, queries, keys, heads, key_heads, dim, value_dim = (
            None if number is None else int(number) for number in found.groups()
        )
        sizes = (batch, queries, keys, heads, key_heads, dim, value_dim)
        if 0 in sizes:
            raise ValueError(f"--shape is {text!r}; allowed: sizes of at least 1")
        assert batch and queries and heads and dim  # noqa: PT018, S101
        key_heads = key_heads or heads
        if heads % key_heads:
            raise ValueError(
                f"--shape is {text!r}; allowed: heads that are a multiple of key heads"
            )
        return cls(queries, keys or queries, heads, key_heads, dim, value_dim or dim, batch)

    @property
    def shape(self) -> str:
        """The sizes, as `parse` reads them."""

        def both(first: int, second: int, mark: str) -> str:
            return str(first) if first == second else f"{first}{mark}{second}"

        lengths = both(self.query_len, self.key_len, ":")
        heads = both(self.heads, self.key_heads, "/")
        return f"{self.batch}x{lengths}x{heads}x{both(self.head_dim, self.value_dim, '/')}"

    @property
    def mask(self) -> str:
        """What hides keys, in a word or two."""
        if self.window != (-1, -1):
            left, right = self.window
            size = str(left) if right in {0, left} else f"{left},{right}"
            return f"{'causal ' if self.causal else ''}window {size}"
        return "causal" if self.causal else "full"

    @property
    def title(self) -> str:
        """The name and everything that is not a matter of course."""
        packed = f"{len(self.lengths)} packed sequences" if self.lengths else ""
        backward = "fwd+bwd" if self.backward else ""
        parts = [self.name or self.shape, packed, self.dtype, self.mask, backward]
        return " ".join(part for part in parts if part)

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees, in one head of all sequences."""
        left, right = self.window
        right = 0 if self.causal else right
        if self.lengths:
            return sum(_visible(length, length, left, right) for length in self.lengths)
        return self.batch * _visible(self.query_len, self.key_len, left, right)

    @property
    def flops(self) -> float:
        """Multiplications and additions of the products, over visible keys only.

        Forward these are Q K^T and P V; backward Q K^T again, dO V^T, P^T dO, dS K and dS^T Q.
        """
        columns = self.head_dim + self.value_dim
        if self.backward:
            columns += 3 * self.head_dim + 2 * self.value_dim
        return 2.0 * columns * self.heads * self.visible

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows of q and of k in all sequences."""
        if self.lengths:
            return sum(self.lengths), sum(self.lengths)
        return self.batch * self.query_len, self.batch * self.key_len

    @property
    def minimal_bytes(self) -> int:
        """What any implementation has to move: each input read once, each output written once."""
        queries, keys = self.tokens
        of_queries = queries * self.heads * (self.head_dim + self.value_dim)
        of_keys = keys * self.key_heads * (self.head_dim + self.value_dim)
        # Backward reads the gradient as well, and writes those of q, k and v.
        times = 2 if self.backward else 1
        return times * (of_queries + of_keys) * _BYTES[self.dtype]

    @property
    def score_bytes(self) -> int:
        """Size of the matrix of scores in the dtype of the inputs, which no tier of ours holds."""
        queries = self.batch * self.heads * self.query_len * self.key_len
        if self.lengths:
            queries = self.heads * sum(length * length for length in self.lengths)
        return queries * _BYTES[self.dtype]

    @property
    def is_memory_bound(self) -> bool:
        """Whether GB/s say more than FLOP/s: few queries read each key, as in decoding."""
        rows_of_key = self.query_len * self.heads // self.key_heads
        return rows_of_key <= _FEW_ROWS < self.key_len

    def shortened(self, most_queries: int) -> Problem:
        """The same keys, with the last `most_queries` queries at most: a sample of the work."""
        if self.lengths:
            return self
        return replace(self, query_len=min(self.query_len, most_queries))

    def to_json(self) -> dict[str, Any]:
        """Fields and what follows from them, as plain data."""
        return {
            "title": self.title,
            "shape": self.shape,
            "mask": self.mask,
            **asdict(self),
            "flops": self.flops,
            "minimal_bytes": self.minimal_bytes,
            "score_bytes": self.score_bytes,
        }
