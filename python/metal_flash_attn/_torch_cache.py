"""The torch tier over a cache, on any device.

New keys are written, then the keys of each sequence gathered for attention by `_torch_tier`.
"""

import math

import torch
from torch import Tensor

from ._torch_tier import RuleValues, attend_sequence, rules_of
from .shim.flash_attn.ops.triton.rotary import apply_rotary

Rows = tuple[Tensor, Tensor]
"""int64 vectors: the slot or page of each key, and its row there."""


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    keys: list[Rows],
    filled: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    interleaved: bool,
    queries_advance: bool,
    query_offsets: list[int] | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    rules: RuleValues,
) -> None:
    """Writes new keys and values into the caches, and attention into `out` and `lse`.

    Args:
        q: `[B, Lq, H, D]`, or `[Tq, H, D]` with `query_offsets`.
        k_cache: `[slots or pages, rows, Hk, D]`.
        v_cache: `[slots or pages, rows, Hk, Dv]`.
        keys: where the keys of each sequence lie, the new ones last.
        filled: int64 `[B]`, the position of the first new key.
        new_keys: `[B, new, Hk, D]`.
        new_values: `[B, new, Hk, Dv]`.
        rotary_cos, rotary_sin: `[positions, rotary_dim / 2]`.
        interleaved: which values of a head are a pair, see `apply_rotary`.
        queries_advance: whether query i stands at position `filled + i`; else all at `filled`.
        query_offsets: where the sequences start and end in q.
        alibi_slopes, out, lse, rules: see `_torch_tier.forward`.
    """
    parsed = rules_of(rules)
    if lse is None:
        shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
        lse = q.new_empty(shape, dtype=torch.float32)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if rotary_cos is not None and rotary_sin is not None and new_keys is not None:
            tables = (rotary_cos, rotary_sin, interleaved)
            new_keys = _rotate(new_keys, filled, tables, advance=True)
            q = _rotate(q, filled, tables, advance=queries_advance)
        if new_keys is not None and new_values is not None:
            _append(k_cache, v_cache, new_keys, new_values, keys)
        if query_offsets is not None:
            out.zero_()
            lse.fill_(math.inf)
        for sequence, rows in enumerate(keys):
            if query_offsets is None:
                own = (q[sequence, None], out[sequence, None], lse[sequence, None])
            else:
                queries = slice(query_offsets[sequence], query_offsets[sequence + 1])
                own = (q[None, queries], out[None, queries], lse[None, :, queries])
            attend_sequence(
                own, k_cache[rows][None], v_cache[rows][None], sequence, alibi_slopes, parsed
            )


def _append(
    k_cache: Tensor, v_cache: Tensor, new_keys: Tensor, new_values: Tensor, keys: list[Rows]
) -> None:
    new_len = new_keys.shape[1]
    if new_keys.numel() == 0 or new_values.numel() == 0:
        return
    blocks, rows = (torch.cat([own[part][-new_len:] for own in keys]) for part in (0, 1))
    k_cache[blocks, rows] = new_keys.flatten(0, 1)
    v_cache[blocks, rows] = new_values.flatten(0, 1)


def _rotate(
    x: Tensor, filled: Tensor, tables: tuple[Tensor, Tensor, bool], *, advance: bool
) -> Tensor:
    """`x [B, L, heads, D]` with its tokens at positions from `filled` on, or all at `filled`."""
    cos, sin, interleaved = tables
    if x.numel() == 0:
        return x
    if advance:
        return apply_rotary(x, cos, sin, seqlen_offsets=filled, interleaved=interleaved)
    together = x.flatten(1, 2).unsqueeze(1)
    rotated = apply_rotary(together, cos, sin, seqlen_offsets=filled, interleaved=interleaved)
    return rotated.view(x.shape)
