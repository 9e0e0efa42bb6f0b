"""Attention in float64 from its definition, and how far a right float32 answer may lie from it.

For a query i and a key j of one head, with the diagonal at `i + Lk - Lq` (or at i: top left):

    x = scale * (q_i . k_j)
    s = softcap * tanh(x / softcap) - slope * |j - diagonal| + bias
    lse = log(exp(sink) + sum over visible j of exp(s))
    out = sum over visible j of kept_j * exp(s - lse) * v_j

Rows with neither a visible key nor a sink give 0, and an lse of +inf.

The bounds hold for every implementation that reads the given (already rounded) inputs, computes in
float32 in any order, and rounds once to the output's type. They are worst-case bounds after Higham,
"Accuracy and Stability of Numerical Algorithms", 2nd edition, section 3.1: a sum or product of n
roundings has a relative error of at most gamma(n) = n u / (1 - n u), with u = 2**-24. Elementary
functions (exp, tanh, log) may be off by 2**-21. What that means for the score of each key, with its
length D, moves the weights of n keys, whose sums add gamma(n); the output's type adds its own unit.

Metal kernels differ in three points, as crates/core/src/reference/bounds.rs derives: `exp2` is off
by up to 3 + 2 |x| units in the last place; the maximum that weights refer to lags behind by up to 8
in units of log2, so that the number of rescalings grows with the distance and not with the keys;
and the simdgroup kernel rounds weights to the type of v before it multiplies them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

FLOAT32 = 2.0**-24
ELEMENTARY = 2.0**-21
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


@dataclass(frozen=True)
class Arithmetic:
    """What may be rounded how; the default is float32 throughout."""

    is_metal: bool = False
    weights: torch.dtype = torch.float32

    def weight_error(self, below: Tensor, keys: int) -> Tensor:
        """Relative error of a weight whose score is `below` the maximum: exp2 and rescalings."""
        if not self.is_metal:
            # Subtracting the maximum and rescaling to later maxima: at most one for 16 keys.
            return 2 * FLOAT32 * below + ELEMENTARY * (3 + keys / 16)
        distance = below / math.log(2)
        return FLOAT32 * (6 * (2 + distance / 8) + 5 * (distance + 16))

    def single_weight_error(self, exponent: Tensor) -> Tensor | float:
        """Relative error of a weight that is one exponential of this number."""
        return FLOAT32 * (6 + 4 * exponent.abs() / math.log(2)) if self.is_metal else 2 * ELEMENTARY

    def rounded(self, value: Tensor, error: Tensor) -> Tensor:
        """The `error` of a weight that was rounded for a product."""
        if self.weights == torch.float32:
            return error
        lost = 0.5 * TINY[self.weights]
        return error + UNIT[self.weights] * (value.abs() + error) + lost * (value != 0)


@dataclass
class Rules:
    """Everything of a problem that is not q, k, v; the defaults are those of flash_attn."""

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    top_left: bool = False
    kept: Tensor | None = None
    """What dropout multiplies weights by, `[B, H, Lq, Lk]`."""


@dataclass
class Reference:
    """The exact results and the largest errors that they may have."""

    out: Tensor
    lse: Tensor
    out_bound: Tensor
    lse_bound: Tensor

    def check(self, out: Tensor, lse: Tensor | None = None) -> None:
        """Asserts that results, of any device, are as exact as the arithmetic allows."""
        assert_within("out", out, self.out, self.out_bound)
        if lse is not None:
            assert lse.dtype == torch.float32
            assert_within("lse", lse, self.lse, self.lse_bound)


def assert_within(name: str, got: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Asserts that `got` is within `bound` of `exact` everywhere, and infinite where that is."""
    assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, not {exact.shape}"
    if exact.numel() == 0:
        return
    got = got.cpu().double()
    error = torch.where(got == exact, 0.0, (got - exact).abs())
    worst = (error / bound.clamp_min(1e-300)).nan_to_num(nan=torch.inf).max().item()
    assert worst <= 1.0, f"{name} is off by {worst:.3g} times its bound"


def attention(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules, arithmetic: Arithmetic = Arithmetic()
) -> Reference:
    """Dense attention: q `[B, Lq, H, D]`, k `[B, Lk, Hk, D]`, v `[B, Lk, Hk, Dv]`."""
    dtype = q.dtype
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores, score_error = _scores(q, k, rules)
    sinks = torch.full((heads,), -torch.inf).double() if rules.sinks is None else rules.sinks
    sinks = sinks.double().view(1, heads, 1, 1)
    largest = torch.maximum(_largest(scores), sinks).clamp_min(-1e300)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True) + torch.exp(sinks - largest)
    empty = total == 0
    probabilities = torch.where(empty, 0.0, weights / total)
    kept = torch.ones(()).double() if rules.kept is None else rules.kept
    out = (probabilities * kept) @ v
    lse = torch.where(empty, torch.inf, largest + torch.log(total))

    keys = scores.shape[-1]
    summing = _gamma(2 * keys + 15)
    below = torch.where(scores == -torch.inf, 0.0, largest - scores)
    weight_error = torch.expm1(score_error + arithmetic.weight_error(below, keys))
    # A sink at -inf has no weight, whatever its error.
    sink_below = (largest - sinks).clamp_max(1e6)
    sink_error = torch.expm1(arithmetic.weight_error(sink_below, keys).clamp_max(1.0))
    sink_weight = torch.where(empty, 0.0, torch.exp(sinks - largest) / total)
    mean_error = (probabilities * weight_error).sum(-1, keepdim=True) + sink_weight * sink_error
    size = (probabilities * kept) @ v.abs()
    out_error = (probabilities * weight_error * kept) @ v.abs() + mean_error * out.abs()
    # Weights below the smallest normal float32 may become 0.
    out_error = out_error / (1 - mean_error) + summing * (size + out.abs()) + keys * 2.0**-120
    if arithmetic.weights != torch.float32:
        lost = 0.5 * TINY[arithmetic.weights] * v.abs().sum(-2, keepdim=True) * kept.max()
        out_error = out_error + UNIT[arithmetic.weights] * size + lost
    out_bound = 1.02 * out_error + UNIT[dtype] * (out.abs() + out_error) + TINY[dtype]
    lse_bound = 1.02 * (mean_error / (1 - mean_error) + summing + ELEMENTARY)
    lse_bound = lse_bound + 4 * FLOAT32 * (largest.abs() + torch.where(empty, 0.0, lse).abs() + 1)
    return Reference(
        out.transpose(1, 2),
        lse.squeeze(-1),
        out_bound.transpose(1, 2),
        torch.where(empty, 0.0, lse_bound).squeeze(-1),
    )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: list[int],
    cu_k: list[int],
    rules: Rules,
    arithmetic: Arithmetic = Arithmetic(),
) -> Reference:
    """Ragged attention: q `[Tq, H, D]`, k `[Tk, Hk, D]`, v `[Tk, Hk, Dv]`; see `attention`."""
    shape = (*q.shape[:2], v.shape[-1])
    out, out_bound = torch.zeros(2, *shape, dtype=torch.float64)
    lse, lse_bound = torch.zeros(2, q.shape[1], q.shape[0], dtype=torch.float64)
    lse[:] = torch.inf
    for rows, keys, own in _sequences(cu_q, cu_k, rules):
        part = attention(q[None, rows], k[None, keys], v[None, keys], own, arithmetic)
        out[rows], out_bound[rows] = part.out[0], part.out_bound[0]
        lse[:, rows], lse_bound[:, rows] = part.lse[0], part.lse_bound[0]
    return Reference(out, lse, out_bound, lse_bound)


def _sequences(
    cu_q: list[int], cu_k: list[int], rules: Rules
) -> Iterator[tuple[slice, slice, Rules]]:
    """Rows of q and of k of each ragged sequence, with its rules."""
    slopes = rules.alibi_slopes
    for index, ends in enumerate(zip(pairwise(cu_q), pairwise(cu_k), strict=True)):
        own = slopes[index] if slopes is not None and slopes.dim() == 2 else slopes
        rows, keys = (slice(*pair) for pair in ends)
        yield rows, keys, replace(rules, alibi_slopes=own)


def _scores(q: Tensor, k: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Scores `[B, H, Lq, Lk]`, -inf where hidden, and how far off float32 may be."""
    batch, heads, query_len, head_dim = q.shape
    key_len = k.shape[2]
    scale = head_dim**-0.5 if rules.scale is None else rules.scale
    scores = scale * (q @ k.transpose(-1, -2))
    error = _gamma(head_dim + 6) * abs(scale) * (q.abs() @ k.abs().transpose(-1, -2))
    if rules.softcap > 0:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
        error = error + ELEMENTARY * rules.softcap + 4 * FLOAT32 * scores.abs()
    shift = 0 if rules.top_left else key_len - query_len
    distance = torch.arange(key_len) - torch.arange(query_len)[:, None] - shift
    if rules.alibi_slopes is not None:
        slopes = rules.alibi_slopes.double().reshape(-1, heads, 1, 1)
        added = slopes * distance.abs()
        scores = scores - added
        error = error + 4 * FLOAT32 * added.abs() + FLOAT32 * scores.abs()
    if rules.bias is not None:
        bias = rules.bias.double().expand(batch, heads, query_len, key_len)
        scores = scores + bias
        finite = torch.where(bias == -torch.inf, 0.0, bias.abs())
        error = error + 3 * FLOAT32 * (finite + scores.abs().clamp_max(1e30))
    left, right = rules.window
    right = 0 if rules.causal else right
    hidden = torch.zeros(query_len, key_len, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    if rules.mask is not None:
        hidden = hidden | ~rules.mask.expand(batch, heads, query_len, key_len)
    return scores.masked_fill(hidden, -torch.inf), error.masked_fill(scores == -torch.inf, 0.0)


def _largest(scores: Tensor) -> Tensor:
    if scores.shape[-1] == 0:
        return scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    return scores.amax(-1, keepdim=True)


def _gamma(roundings: float) -> float:
    return roundings * FLOAT32 / (1 - roundings * FLOAT32)


@dataclass
class Gradients:
    """The exact gradients by name, and the largest errors that they may have."""

    exact: dict[str, Tensor]
    bounds: dict[str, Tensor]

    def check(self, **gradients: Tensor | None) -> None:
        """Asserts that gradients, of any device, are as exact as the arithmetic allows."""
        for name, gradient in gradients.items():
            assert gradient is not None, f"d{name} is missing"
            exact, bound = self.exact[name], self.bounds[name]
            assert_within(f"d{name}", gradient.reshape(exact.shape), exact, bound)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    rules: Rules,
    arithmetic: Arithmetic = Arithmetic(),
    own: Arithmetic | None = None,
) -> Gradients:
    """Gradients of `sum(out * d_out) + sum(lse * d_lse)`; shapes as in `attention`.

    With `p = exp(s - lse)` and `delta = out . d_out - d_lse`: `dv = p^T d_out`,
    `ds = p (d_out . v - delta)`, which the softcap's slope and the scale turn into dq and dk.

    The bounds assume that an implementation has out and lse from a forward pass, as exact as
    `attention` (with `arithmetic`) bounds them, and computes the rest in float32. The error of the
    score and of lse make a relative error of p. Those of out, weighted with `|d_out|`, and of the
    two dot products make the error of `d_out . v - delta`. Sums over n rows or keys add gamma(n).
    Metal kernels round p and ds to the type of q for the products that sum them: `own` says so,
    where the backward pass is another tier's than the forward pass.
    """
    own = arithmetic if own is None else own
    forward = attention(q, k, v, rules, arithmetic)
    dtype, key_heads = q.dtype, k.shape[2]
    heads, head_dim = q.shape[2], q.shape[3]
    q, k, v, d_out = (t.double().transpose(1, 2) for t in (q, k, v, d_out))
    k, v = (t.repeat_interleave(heads // key_heads, dim=1) for t in (k, v))
    step = _ScoreGradients(q, k, v, d_out, d_lse, rules, forward, own)
    exact, bounds = {}, {}

    def put(name: str, value: Tensor, bound: Tensor, kind: torch.dtype) -> None:
        bound = 1.02 * bound
        exact[name] = value
        bounds[name] = bound + UNIT[kind] * (value.abs() + bound) + TINY[kind]

    d_scores, error = step.d_scores, step.error
    if rules.bias is not None:
        shape = rules.bias.shape
        count = d_scores.numel() / max(1, math.prod(shape))
        total = error + _gamma(count + 2) * (d_scores.abs() + error)
        put("bias", d_scores.sum_to_size(shape), total.sum_to_size(shape), rules.bias.dtype)
    if rules.sinks is not None:
        put("sinks", *step.sinks(rules.sinks), torch.float32)

    scale = head_dim**-0.5 if rules.scale is None else rules.scale
    slope, slope_error = torch.ones(()).double(), torch.zeros(()).double()
    if rules.softcap > 0:
        product = q @ k.transpose(-1, -2) * scale
        product_error = _gamma(head_dim + 6) * abs(scale) * (q.abs() @ k.abs().transpose(-1, -2))
        slope = 1 - torch.tanh(product / rules.softcap) ** 2
        slope_error = 2 * (ELEMENTARY + product_error / rules.softcap) + 8 * FLOAT32
    error = error * (slope + slope_error) + d_scores.abs() * slope_error
    d_scores = d_scores * slope
    error = own.rounded(d_scores, error)
    error = abs(scale) * (error + 2 * FLOAT32 * d_scores.abs())
    d_scores = scale * d_scores
    sizes = d_scores.abs() + error
    keys, rows = d_scores.shape[-1], d_scores.shape[-2] * heads // key_heads

    def per_key(x: Tensor) -> Tensor:
        """`[B, H, Lk, D]`, summed over the query heads of each key head, as `[B, Lk, Hk, D]`."""
        total: Tensor = x.unflatten(1, (key_heads, -1)).sum(2)
        return total.transpose(1, 2)

    d_q_error = (error + _gamma(keys + 6) * sizes) @ k.abs()
    put("q", (d_scores @ k).transpose(1, 2), d_q_error.transpose(1, 2), dtype)
    d_k_error = (error + _gamma(rows + 6) * sizes).transpose(-1, -2) @ q.abs()
    put("k", per_key(d_scores.transpose(-1, -2) @ q), per_key(d_k_error), dtype)
    weights, weight_error = step.weights, step.weight_error
    v_error = weights * (weight_error + _gamma(rows + 7) * (1 + weight_error)) + 2.0**-120
    d_v_error = (step.kept * own.rounded(weights, v_error)).transpose(-1, -2) @ d_out.abs()
    weights = step.kept * weights
    put("v", per_key(weights.transpose(-1, -2) @ d_out), per_key(d_v_error), dtype)
    return Gradients(exact, bounds)


class _ScoreGradients:
    """Gradients of the scores `[B, H, Lq, Lk]`, before the softcap's slope, and their error."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        d_out: Tensor,
        d_lse: Tensor | None,
        rules: Rules,
        forward: Reference,
        arithmetic: Arithmetic,
    ) -> None:
        self.arithmetic = arithmetic
        out, out_bound = forward.out.transpose(1, 2), forward.out_bound.transpose(1, 2)
        self.lse, self.lse_bound = forward.lse[..., None], forward.lse_bound[..., None]
        d_lse = torch.zeros_like(self.lse) if d_lse is None else d_lse.double()[..., None]
        d_lse = torch.where(self.lse == torch.inf, 0.0, d_lse)
        scores, score_error = _scores(q, k, rules)
        self.weights, self.weight_error = self._weight(scores, score_error)
        self.delta = (out * d_out).sum(-1, keepdim=True) - d_lse
        size = (d_out.abs() * (out.abs() + out_bound)).sum(-1, keepdim=True) + d_lse.abs()
        moved = (d_out.abs() * out_bound).sum(-1, keepdim=True)
        self.delta_error = moved + _gamma(v.shape[-1] + 3) * size
        self.kept = torch.ones(()).double() if rules.kept is None else rules.kept
        difference = self.kept * (d_out @ v.transpose(-1, -2)) - self.delta
        sizes = self.kept * (d_out.abs() @ v.abs().transpose(-1, -2))
        off = _gamma(v.shape[-1] + 5) * sizes + self.delta_error + 2 * FLOAT32 * difference.abs()
        self.d_scores = self.weights * difference
        error = self.weight_error * difference.abs() + (1 + self.weight_error) * off
        error = self.weights * error + 4 * FLOAT32 * self.d_scores.abs()
        # Weights below the smallest normal float32 may become 0; hidden ones are 0.
        lost = 2.0**-120 * (difference.abs() + 1)
        self.error = torch.where(scores == -torch.inf, 0.0, error + lost)

    def _weight(self, logit: Tensor, error: Tensor | float) -> tuple[Tensor, Tensor]:
        """A probability and its relative error."""
        sizes = logit.abs().clamp_max(1e30) + self.lse.abs().clamp_max(1e30) + 1
        visible = (logit > -torch.inf) & (self.lse < torch.inf)
        exponent = torch.where(visible, logit - self.lse, 0.0)
        error = error + self.arithmetic.single_weight_error(exponent)
        relative = torch.expm1(error + self.lse_bound + 4 * FLOAT32 * sizes)
        return torch.exp(logit - self.lse), torch.where(visible, relative, 0.0)

    def sinks(self, sinks: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the sinks `[H]` and its error."""
        sink, sink_error = self._weight(sinks.double().view(1, -1, 1, 1), 0.0)
        delta = self.delta.abs()
        total = sink * (sink_error * delta + (1 + sink_error) * self.delta_error)
        rows = delta.shape[0] * delta.shape[2]
        total = total + _gamma(rows + 4) * sink * delta + 2.0**-120
        return -(sink * self.delta).sum([0, 2, 3]), total.sum([0, 2, 3])


def packed_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    cu_q: list[int],
    cu_k: list[int],
    rules: Rules,
    arithmetic: Arithmetic = Arithmetic(),
    own: Arithmetic | None = None,
) -> Gradients:
    """The same for ragged sequences; see `packed_attention`. Rows of none have gradients of 0."""
    names = {"q": q, "k": k, "v": v}
    exact, bounds = (
        {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in names.items()}
        for _ in range(2)
    )
    for rows, keys, per_sequence in _sequences(cu_q, cu_k, rules):
        part = gradients(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            d_out[None, rows],
            None if d_lse is None else d_lse[None, :, rows],
            per_sequence,
            arithmetic,
            own,
        )
        for name, where in (("q", rows), ("k", keys), ("v", keys)):
            exact[name][where] = part.exact[name][0]
            bounds[name][where] = part.bounds[name][0]
    return Gradients(exact, bounds)
