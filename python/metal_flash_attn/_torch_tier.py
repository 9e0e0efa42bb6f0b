"""The torch tier: attention in chunks of query rows, in float32 torch operations, on any device.

Scores of a chunk are held as `[B, Hk, G, rows, keys]` with G = H / Hk query heads to a key head:
a group shares its keys and values without repeating them. Keys that no row sees stay untouched.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Matrix products with more elements are wrong on MPS (pytorch/pytorch#197636).
_MAX_SCORES = 2**31


class Rules(NamedTuple):
    """How scores are formed, the same for all sequences of a call."""

    scale: float
    softcap: float
    left: int | None
    right: int | None
    top_left: bool
    sinks: Tensor | None
    chunk: int


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    offsets: tuple[list[int], list[int]] | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    rules: tuple[float, float, int | None, int | None, bool, Tensor | None, int],
) -> None:
    """Writes attention of a checked problem into `out` and, where it is wanted, `lse`.

    Args:
        q: `[B, Lq, H, D]`, or `[Tq, H, D]` with `offsets`.
        k: `[B, Lk, Hk, D]`, or `[Tk, Hk, D]`.
        v: `[B, Lk, Hk, Dv]`, or `[Tk, Hk, Dv]`.
        offsets: where the sequences start and end in q, and in k and v.
        alibi_slopes: float32 `[H]` or `[B, H]`.
        bias: additive, or bool with True for visible; broadcastable to `[B, H, Lq, Lk]`.
        out: like q, with the last dimension of v.
        lse: float32 `[B, H, Lq]` or `[H, Tq]`.
        rules: see `Rules`.
    """
    if lse is None:
        shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
        lse = q.new_empty(shape, dtype=torch.float32)
    # Autocast would round the products, which the caller has a right to in float32.
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if offsets is None:
            _attend(q, k, v, alibi_slopes, bias, out, lse, Rules(*rules))
        else:
            _attend_packed(q, k, v, offsets, alibi_slopes, out, lse, Rules(*rules))


def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: tuple[list[int], list[int]],
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rules: Rules,
) -> None:
    out.zero_()
    lse.fill_(math.inf)
    query_offsets, key_offsets = offsets
    for sequence in range(len(query_offsets) - 1):
        queries = slice(query_offsets[sequence], query_offsets[sequence + 1])
        keys = slice(key_offsets[sequence], key_offsets[sequence + 1])
        own_slopes = alibi_slopes is not None and alibi_slopes.dim() == 2
        _attend(
            q[None, queries],
            k[None, keys],
            v[None, keys],
            alibi_slopes[sequence] if alibi_slopes is not None and own_slopes else alibi_slopes,
            None,
            out[None, queries],
            lse[None, :, queries],
            rules,
        )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rules: Rules,
) -> None:
    """Sequences of equal length, `[B, L, heads, dim]`."""
    batch, query_len, heads, _ = q.shape
    key_len = k.shape[1]
    shift = 0 if rules.top_left else key_len - query_len
    if bias is not None:
        bias = bias.expand(batch, heads, query_len, key_len)
    step = max(1, min(rules.chunk, _MAX_SCORES // max(1, batch * heads * key_len)))
    for start in range(0, query_len, step):
        stop = min(start + step, query_len)
        low = 0 if rules.left is None else max(0, start + shift - rules.left)
        high = key_len if rules.right is None else min(key_len, stop + shift + rules.right)
        rows, keys = slice(start, stop), slice(low, max(low, high))
        diagonal = torch.arange(start, stop, device=q.device)[:, None] + shift
        distance = torch.arange(low, keys.stop, device=q.device) - diagonal
        scores = _scores(
            q[:, rows],
            k[:, keys],
            distance,
            alibi_slopes,
            None if bias is None else bias[:, :, rows, keys],
            rules,
        )
        out[:, rows], lse[:, :, rows] = _weigh(scores, v[:, keys], rules.sinks)


def _scores(
    q: Tensor,
    k: Tensor,
    distance: Tensor,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    rules: Rules,
) -> Tensor:
    """Final scores `[B, Hk, G, rows, keys]`; -inf where a key is hidden."""
    batch, rows, heads, dim = q.shape
    keys, key_heads = k.shape[1:3]
    group = (key_heads, heads // key_heads)
    queries = q.float().transpose(1, 2).reshape(batch, key_heads, group[1] * rows, dim)
    scores = (queries @ k.float().permute(0, 2, 3, 1)).view(batch, *group, rows, keys)
    scores = scores * rules.scale
    if rules.softcap > 0:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    if alibi_slopes is not None:
        slopes = alibi_slopes.reshape(-1, *group, 1, 1)
        scores = scores - slopes * distance.abs().float()
    if bias is not None:
        bias = bias.unflatten(1, group)
        hidden = torch.tensor(-math.inf, device=scores.device)
        scores = torch.where(bias, scores, hidden) if bias.dtype == torch.bool else scores + bias
    if rules.left is not None:
        scores = scores.masked_fill(distance < -rules.left, -math.inf)
    if rules.right is not None:
        scores = scores.masked_fill(distance > rules.right, -math.inf)
    return scores


def _weigh(scores: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax of the scores times values: out `[B, rows, H, Dv]` and lse `[B, H, rows]`."""
    batch, key_heads, group, rows, keys = scores.shape
    if keys == 0:
        # The largest of no scores is undefined: one hidden key stands in.
        scores = scores.new_full((*scores.shape[:-1], 1), -math.inf)
        v = v.new_zeros((batch, 1, *v.shape[2:]))
    largest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.view(key_heads, group, 1, 1)
        largest = torch.maximum(largest, sinks)
    # Rows without keys have nothing to subtract; -inf - -inf would be NaN.
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    probabilities = torch.exp(scores - largest)
    total = probabilities.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    values = probabilities.flatten(2, 3) @ v.float().transpose(1, 2)
    values = values.unflatten(2, (group, rows))
    out = torch.where(total == 0, 0.0, values / total)
    lse = torch.where(total == 0, math.inf, largest + torch.log(total))
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.squeeze(-1).flatten(1, 2)
