"""The torch tier: attention in chunks of query rows, in float32 torch operations, on any device.

Scores of a chunk are held as `[B, Hk, G, rows, keys]` with G = H / Hk query heads to a key head:
a group shares its keys and values without repeating them. Keys that no row sees stay untouched.
The backward pass computes the same scores again and takes the probabilities from the log-sum-exp.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ._dropout import Dropout, factors

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
    dropout: Dropout | None


RuleValues: TypeAlias = tuple[Any, ...]
"""`Rules` as the extension module hands them over."""


def rules_of(values: RuleValues) -> Rules:
    """The rules as the functions of this tier take them."""
    rules = Rules(*values)
    return rules if rules.dropout is None else rules._replace(dropout=Dropout(*rules.dropout))


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
    rules: RuleValues,
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
            _attend(q, k, v, 0, alibi_slopes, bias, out, lse, rules_of(rules))
        else:
            _attend_packed(q, k, v, offsets, alibi_slopes, out, lse, rules_of(rules))


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
        own = (q[None, queries], out[None, queries], lse[None, :, queries])
        attend_sequence(own, k[None, keys], v[None, keys], sequence, alibi_slopes, rules)


def attend_sequence(
    own: tuple[Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    sequence: int,
    alibi_slopes: Tensor | None,
    rules: Rules,
) -> None:
    """Writes attention of one sequence.

    Args:
        own: its q `[1, Lq, H, D]`, out `[1, Lq, H, Dv]` and lse `[1, H, Lq]`.
        k: `[1, Lk, Hk, D]`.
        v: `[1, Lk, Hk, Dv]`.
        sequence: its number in the batch.
        alibi_slopes: of the batch, see `forward`.
        rules: see `Rules`.
    """
    q, out, lse = own
    _attend(q, k, v, sequence, _own_slopes(alibi_slopes, sequence), None, out, lse, rules)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_sequence: int,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rules: Rules,
) -> None:
    """Sequences of equal length, `[B, L, heads, dim]`."""
    for chunk in _chunks(q, k, first_sequence, bias, rules):
        rows, keys = chunk.rows, chunk.keys
        scores, _ = _scores(q[:, rows], k[:, keys], alibi_slopes, chunk, rules)
        out[:, rows], lse[:, :, rows] = _weigh(scores, v[:, keys], chunk.kept, rules.sinks)


class Chunk(NamedTuple):
    """Query rows that are computed together, and the keys that some of them see."""

    rows: slice
    keys: slice
    distance: Tensor
    """Of each key from the diagonal of each row."""
    bias: Tensor | None
    kept: Tensor | None
    """What dropout multiplies weights by, `[B, Hk, G, rows, keys]`."""


def _chunks(
    q: Tensor, k: Tensor, first_sequence: int, bias: Tensor | None, rules: Rules
) -> Iterator[Chunk]:
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
        kept = None
        if rules.dropout is not None:
            every = range(first_sequence * heads, (first_sequence + batch) * heads)
            kept = factors(rules.dropout, every, rows, keys, q.device)
            group = (k.shape[2], heads // k.shape[2])
            kept = kept.view(batch, *group, *kept.shape[1:])
        bias_part = None if bias is None else bias[:, :, rows, keys]
        yield Chunk(rows, keys, distance, bias_part, kept)


def _scores(
    q: Tensor, k: Tensor, alibi_slopes: Tensor | None, chunk: Chunk, rules: Rules
) -> tuple[Tensor, Tensor | None]:
    """Final scores `[B, Hk, G, rows, keys]`, -inf where a key is hidden, and the softcap's tanh."""
    batch, rows, heads, dim = q.shape
    keys, key_heads = k.shape[1:3]
    group = (key_heads, heads // key_heads)
    distance, bias = chunk.distance, chunk.bias
    queries = q.float().transpose(1, 2).reshape(batch, key_heads, group[1] * rows, dim)
    scores = (queries @ k.float().permute(0, 2, 3, 1)).view(batch, *group, rows, keys)
    scores = scores * rules.scale
    tanh = None
    if rules.softcap > 0:
        tanh = torch.tanh(scores / rules.softcap)
        scores = tanh * rules.softcap
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
    return scores, tanh


def _weigh(
    scores: Tensor, v: Tensor, kept: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
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
    if kept is not None and keys > 0:
        probabilities = probabilities * kept
    values = probabilities.flatten(2, 3) @ v.float().transpose(1, 2)
    values = values.unflatten(2, (group, rows))
    out = torch.where(total == 0, 0.0, values / total)
    lse = torch.where(total == 0, math.inf, largest + torch.log(total))
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.squeeze(-1).flatten(1, 2)


class Gradients(NamedTuple):
    """Where gradients go; None for those that are not wanted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    offsets: tuple[list[int], list[int]] | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    results: tuple[Tensor, Tensor],
    result_gradients: tuple[Tensor, Tensor | None],
    gradients: tuple[Tensor | None, ...],
    rules: RuleValues,
) -> None:
    """Writes the gradients of a checked problem.

    With `p = exp(score - lse)`, `delta = sum(out * d_out) - d_lse` of a row, and `z` what dropout
    multiplies a weight by: `dv += z p d_out`, `d_score = p (z d_out . v - delta)`, which is also
    the gradient of the bias, and the gradient of a sink is `-p delta` (Dao, "FlashAttention-2",
    2023, algorithm 2).

    Args:
        q, k, v, offsets, alibi_slopes, bias, rules: see `forward`.
        results: out and lse of the forward pass. Rows with an infinite lse have no gradient.
        result_gradients: the gradients of out and, where there is one, of lse.
        gradients: see `Gradients`; shaped like what they are gradients of.
    """
    to, parsed = Gradients(*gradients), rules_of(rules)
    out, lse = results
    d_out, d_lse = result_gradients
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if to.sinks is not None and parsed.sinks is not None:
            differentiate_sinks(to.sinks, parsed.sinks, out, lse, d_out, d_lse)
        delta = _delta(out, d_out, d_lse)
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        if offsets is None:
            _differentiate(q, k, v, 0, alibi_slopes, bias, lse, delta, d_out, to, parsed)
            return
        for gradient in to[:3]:
            if gradient is not None:
                gradient.zero_()
        query_offsets, key_offsets = offsets
        for sequence in range(len(query_offsets) - 1):
            queries = slice(query_offsets[sequence], query_offsets[sequence + 1])
            keys = slice(key_offsets[sequence], key_offsets[sequence + 1])
            _differentiate(
                q[None, queries],
                k[None, keys],
                v[None, keys],
                sequence,
                _own_slopes(alibi_slopes, sequence),
                None,
                lse[None, :, queries],
                delta[None, :, queries],
                d_out[None, queries],
                Gradients(
                    None if to.q is None else to.q[None, queries],
                    None if to.k is None else to.k[None, keys],
                    None if to.v is None else to.v[None, keys],
                    None,
                    None,
                ),
                parsed,
            )


def differentiate_sinks(
    to: Tensor, sinks: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> None:
    """Writes the gradient of the sinks `[H]`; the arguments are those of `backward`."""
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        weighted = torch.exp(sinks[:, None] - lse) * _delta(out, d_out, d_lse)
        to.copy_(-weighted.sum([0, 2] if weighted.dim() == 3 else 1))


def _delta(out: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """`sum(out * d_out) - d_lse`, with heads before rows in `[B, H, Lq]` and `[H, Tq]` alike."""
    delta = (out.float() * d_out.float()).sum(-1).transpose(-1, -2)
    return delta if d_lse is None else delta - d_lse


def _differentiate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_sequence: int,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    d_out: Tensor,
    to: Gradients,
    rules: Rules,
) -> None:
    """Sequences of equal length: lse and delta `[B, H, Lq]`, the others `[B, L, heads, dim]`."""
    key_heads = k.shape[2]
    group = (key_heads, q.shape[2] // key_heads)
    # `[B, Hk, Lk, dim]`, the order of the products.
    d_k, d_v = (
        None if to_one is None else one.new_zeros(one.transpose(1, 2).shape, dtype=torch.float32)
        for to_one, one in ((to.k, k), (to.v, v))
    )
    d_bias = None if to.bias is None else to.bias.new_zeros(to.bias.shape, dtype=torch.float32)
    for chunk in _chunks(q, k, first_sequence, bias, rules):
        rows, keys = chunk.rows, chunk.keys
        scores, tanh = _scores(q[:, rows], k[:, keys], alibi_slopes, chunk, rules)
        probabilities = torch.exp(scores - lse[:, :, rows].unflatten(1, group)[..., None])
        above = _grouped(d_out[:, rows], key_heads)
        if d_v is not None:
            weights = probabilities if chunk.kept is None else probabilities * chunk.kept
            d_v[:, :, keys] += weights.flatten(2, 3).transpose(-1, -2) @ above
        d_scores = (above @ v[:, keys].float().permute(0, 2, 3, 1)).view_as(scores)
        d_scores = d_scores if chunk.kept is None else d_scores * chunk.kept
        d_scores = (d_scores - delta[:, :, rows].unflatten(1, group)[..., None]) * probabilities
        if d_bias is not None:
            _add_bias_gradient(d_bias, d_scores.flatten(1, 2), chunk)
        if tanh is not None:
            d_scores = d_scores * (1 - tanh * tanh)
        d_scores = (d_scores * rules.scale).flatten(2, 3)
        if to.q is not None:
            d_q = d_scores @ k[:, keys].float().transpose(1, 2)
            to.q[:, rows] = d_q.unflatten(2, (group[1], -1)).flatten(1, 2).transpose(1, 2)
        if d_k is not None:
            d_k[:, :, keys] += d_scores.transpose(-1, -2) @ _grouped(q[:, rows], key_heads)
    for gradient, sums in ((to.k, d_k), (to.v, d_v)):
        if gradient is not None and sums is not None:
            gradient.copy_(sums.transpose(1, 2))
    if to.bias is not None and d_bias is not None:
        to.bias.copy_(d_bias)


def _grouped(rows: Tensor, key_heads: int) -> Tensor:
    """`[B, rows, H, dim]` as float32 `[B, Hk, G * rows, dim]`."""
    heads_first: Tensor = rows.float().transpose(1, 2).unflatten(1, (key_heads, -1))
    return heads_first.flatten(2, 3)


def _add_bias_gradient(total: Tensor, d_scores: Tensor, chunk: Chunk) -> None:
    """Adds `[B, H, rows, keys]`, summed over the dimensions that the bias is broadcast along."""
    total = total[(None,) * (4 - total.dim())]
    sums = [axis for axis, size in enumerate(total.shape) if size == 1]
    rows = slice(None) if 2 in sums else chunk.rows
    keys = slice(None) if 3 in sums else chunk.keys
    total[:, :, rows, keys] += d_scores.sum(sums, keepdim=True) if sums else d_scores


def _own_slopes(alibi_slopes: Tensor | None, sequence: int) -> Tensor | None:
    """The ALiBi slopes of one sequence of a packed batch."""
    if alibi_slopes is None or alibi_slopes.dim() == 1:
        return alibi_slopes
    return alibi_slopes[sequence]


def signed_probabilities(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    rules: Rules,
    size: tuple[int, int],
) -> Tensor:
    """Softmax probabilities before dropout, negative where dropout drops them.

    Args:
        q, k, alibi_slopes, bias: see `forward`.
        lse: what the forward pass returned.
        cu_seqlens: offsets of packed queries and keys.
        rules: with a dropout.
        size: queries and keys of the result.

    Returns:
        `[B, H, *size]` in the dtype of q; 0 for hidden keys and behind the end of a sequence.
    """
    heads = q.shape[-2]
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens[0].shape[0] - 1
    result = q.new_zeros((batch, heads, *size))
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is None:
            _fill_probabilities(q, k, 0, alibi_slopes, bias, lse, result, rules)
            return result
        query_offsets, key_offsets = (offsets.tolist() for offsets in cu_seqlens)
        for sequence in range(batch):
            queries = slice(query_offsets[sequence], query_offsets[sequence + 1])
            keys = slice(key_offsets[sequence], key_offsets[sequence + 1])
            own_slopes = _own_slopes(alibi_slopes, sequence)
            own, own_lse = result[sequence, None], lse[None, :, queries]
            _fill_probabilities(
                q[None, queries], k[None, keys], sequence, own_slopes, None, own_lse, own, rules
            )
    return result


def _fill_probabilities(
    q: Tensor,
    k: Tensor,
    first_sequence: int,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    lse: Tensor,
    to: Tensor,
    rules: Rules,
) -> None:
    for chunk in _chunks(q, k, first_sequence, bias, rules):
        rows, keys = chunk.rows, chunk.keys
        scores, _ = _scores(q[:, rows], k[:, keys], alibi_slopes, chunk, rules)
        probabilities = torch.exp(scores.flatten(1, 2) - lse[:, :, rows, None])
        if chunk.kept is not None:
            dropped = chunk.kept.flatten(1, 2) == 0
            probabilities = torch.where(dropped, -probabilities, probabilities)
        to[:, :, rows, keys] = probabilities.to(to.dtype)
