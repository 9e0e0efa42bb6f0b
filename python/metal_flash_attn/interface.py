"""The public functions: names, defaults and results of flash_attn 2.8.

Shapes: B sequences of Lq queries and Lk keys; H query heads and Hk key heads, where Hk divides H
and query head h reads key head `h // (H / Hk)`; head dimension D, of v and the output Dv (equal in
flash_attn). Packed ("varlen") tensors hold the sequences behind one another: Tq rows of q, Tk rows
of k and v.

What all functions share (Dao, "FlashAttention-2", 2023, and the documentation of flash_attn 2.8):

* dtypes float32 (an extension), float16 and bfloat16; q, k and v have the same one, and so has out.
  Sums, softmax and log-sum-exp are float32.
* any strides whose last one is 1 are read in place; other tensors are copied.
* key j is visible to query i if `i + Lk - Lq - left <= j <= i + Lk - Lq + right`; a negative bound
  is open, and `causal` sets right to 0. A query that sees no key gets 0, and log-sum-exp +inf.
* scores are `q . k * softmax_scale`, then `softcap * tanh(score / softcap)` if softcap is not 0,
  then minus `slope * |i + Lk - Lq - j|` with ALiBi slopes.
* out is laid out as `torch.empty_like(q)`, or contiguous where Dv != D.
* meta and fake tensors give results of the same kind, with the shapes and strides of real ones.
* gradients of q, k and v, and as an extension of the log-sum-exp, a bias and sinks; always
  deterministic. They are laid out as `torch.empty_like`; those of packed tensors are contiguous.

* dropout takes its random numbers from the default generator of the device of q, so that
  `torch.manual_seed` makes calls repeatable. Which weights it drops depends on them and on the
  place of a weight alone, not on the tier, and is the same for the gradients.

Errors: ValueError for shapes and values, TypeError for dtypes and types, NotImplementedError for
dropout with softcap, ALiBi slopes that require grad, second and forward-mode derivatives.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ._cache_ops import traced as traced_cached
from ._native import Plan, Trace, attend_cached, forward
from ._native import plan as _plan
from ._ops import traced
from ._probabilities import s_dmask

Window: TypeAlias = Sequence[int] | Tensor
"""`(left, right)`: keys visible before and after the diagonal; negative for all."""

Result: TypeAlias = Any
"""out, or a tuple where a flag asks for more: a union would make every caller narrow it."""


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of sequences of equal length.

    Args:
        q: `[B, Lq, H, D]`.
        k: `[B, Lk, Hk, D]`.
        v: `[B, Lk, Hk, Dv]`.
        dropout_p: probability with which each weight is dropped, at least 0 and below 1; in steps
            of 2^-16. Kept weights are multiplied by `1 / (1 - dropout_p)`. Not with softcap.
        softmax_scale: factor on the scores; `D ** -0.5` if None.
        causal: hide the keys after the diagonal, which ends at the last query and the last key.
        window_size: keys visible before and after the diagonal, negative for all.
        softcap: bound on the scores; 0 for none.
        alibi_slopes: float32 `[H]` or `[B, H]`.
        deterministic: accepted; results and gradients are always reproducible.
        return_attn_probs: also return the log-sum-exp and, for tests, the probabilities.

    Returns:
        out `[B, Lq, H, Dv]`; with `return_attn_probs` also lse, float32 `[B, H, Lq]` (natural
        logarithm, of the final scores), and S_dmask: without dropout empty, with dropout the
        softmax before it, negative where a weight was dropped, `[B, H, Lq, Lk]` in the dtype of q
        with both lengths rounded up to multiples of 128.
    """
    attend = traced if is_dynamo_compiling() else forward
    # fmt: off
    result = attend(
        1, False, q, k, v, None, None, 0, 0, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, None, None, None, False, return_attn_probs,
    )
    # fmt: on
    if not return_attn_probs:
        return result
    # fmt: off
    mask = s_dmask(
        result, 1, q, k, None, None, 0, 0, dropout_p, softmax_scale, causal, window_size,
        alibi_slopes,
    )
    # fmt: on
    return (*result[:2], mask)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with k and v in one tensor.

    Args:
        q: `[B, Lq, H, D]`.
        kv: `[B, Lk, 2, Hk, D]`: k, then v.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: see `flash_attn_func`.

    Returns:
        See `flash_attn_func`.
    """
    attend = traced if is_dynamo_compiling() else forward
    # fmt: off
    result = attend(
        2, False, q, kv, None, None, None, 0, 0, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, None, None, None, False, return_attn_probs,
    )
    # fmt: on
    if not return_attn_probs:
        return result
    # fmt: off
    mask = s_dmask(
        result, 2, q, kv, None, None, 0, 0, dropout_p, softmax_scale, causal, window_size,
        alibi_slopes,
    )
    # fmt: on
    return (*result[:2], mask)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with q, k and v in one tensor.

    Args:
        qkv: `[B, L, 3, H, D]`: q, k, then v.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: see `flash_attn_func`.

    Returns:
        See `flash_attn_func`.
    """
    attend = traced if is_dynamo_compiling() else forward
    # fmt: off
    result = attend(
        3, False, qkv, None, None, None, None, 0, 0, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, None, None, None, False, return_attn_probs,
    )
    # fmt: on
    if not return_attn_probs:
        return result
    # fmt: off
    mask = s_dmask(
        result, 3, qkv, None, None, None, 0, 0, dropout_p, softmax_scale, causal, window_size,
        alibi_slopes,
    )
    # fmt: on
    return (*result[:2], mask)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention of sequences of different lengths, packed behind one another.

    Args:
        q: `[Tq, H, D]`.
        k: `[Tk, Hk, D]`, or `[pages, page_size, Hk, D]` with `block_table`.
        v: the same with Dv.
        cu_seqlens_q: int32 `[B + 1]`, contiguous: sequence b has the rows `cu_seqlens_q[b]` to
            `cu_seqlens_q[b + 1]` of q. Offsets must not decrease, and may end before Tq.
        cu_seqlens_k: the same for k and v; with `block_table` sequence b has
            `cu_seqlens_k[b + 1] - cu_seqlens_k[b]` keys in its pages.
        max_seqlen_q: at least the length of the longest query sequence.
        max_seqlen_k: at least the length of the longest key sequence.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: see `flash_attn_func`.
        block_table: int32 `[B, max_pages]`, the pages of each sequence, see
            `flash_attn_with_kvcache`. Without dropout and gradients.

    Returns:
        out `[Tq, H, Dv]`; with `return_attn_probs` also lse, float32 `[H, Tq]`, and S_dmask with
        the longest sequences as lengths. Rows in no sequence get 0, and +inf.
    """
    if block_table is not None:
        result = _attend_pages(
            (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            (softmax_scale, causal, window_size, softcap),
            (alibi_slopes, block_table, dropout_p, return_attn_probs),
        )
        return (*result, q.new_empty((0,))) if return_attn_probs else result
    attend = traced if is_dynamo_compiling() else forward
    # fmt: off
    result = attend(
        1, True, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, None, None, None, False,
        return_attn_probs,
    )
    # fmt: on
    if not return_attn_probs:
        return result
    # fmt: off
    mask = s_dmask(
        result, 1, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, alibi_slopes,
    )
    # fmt: on
    return (*result[:2], mask)


def _attend_pages(
    tensors: tuple[Any, ...], scores: tuple[Any, ...], rest: tuple[Any, ...]
) -> Result:
    """`flash_attn_varlen_func` with a block table."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = tensors
    softmax_scale, causal, window_size, softcap = scores
    alibi_slopes, block_table, dropout_p, return_lse = rest
    if dropout_p != 0:
        raise NotImplementedError(
            f"dropout_p: dropout with probability {dropout_p} together with block_table is not "
            "supported; pass 0.0"
        )
    attend = traced_cached if is_dynamo_compiling() else attend_cached
    # fmt: off
    return attend(
        False, q, k, v, None, None, None, None, None, None, None, block_table, cu_seqlens_q,
        cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap,
        True, alibi_slopes, None, False, 0, return_lse,
    )
    # fmt: on


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with k and v in one tensor.

    Args:
        q: `[Tq, H, D]`.
        kv: `[Tk, 2, Hk, D]`: k, then v.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: see `flash_attn_varlen_func`.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: see `flash_attn_func`.

    Returns:
        See `flash_attn_varlen_func`.
    """
    attend = traced if is_dynamo_compiling() else forward
    # fmt: off
    result = attend(
        2, True, q, kv, None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, None, None, None, False,
        return_attn_probs,
    )
    # fmt: on
    if not return_attn_probs:
        return result
    # fmt: off
    mask = s_dmask(
        result, 2, q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, alibi_slopes,
    )
    # fmt: on
    return (*result[:2], mask)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with q, k and v in one tensor.

    Args:
        qkv: `[T, 3, H, D]`: q, k, then v.
        cu_seqlens: int32 `[B + 1]`, contiguous: where each sequence starts, and the last one ends.
        max_seqlen: at least the length of the longest sequence.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: see `flash_attn_func`.

    Returns:
        See `flash_attn_varlen_func`.
    """
    attend = traced if is_dynamo_compiling() else forward
    # fmt: off
    result = attend(
        3, True, qkv, None, None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, None, None, None, False,
        return_attn_probs,
    )
    # fmt: on
    if not return_attn_probs:
        return result
    # fmt: off
    mask = s_dmask(
        result, 3, qkv, None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p,
        softmax_scale, causal, window_size, alibi_slopes,
    )
    # fmt: on
    return (*result[:2], mask)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Result:
    """Attention over a cache of keys and values, into which new ones are written first.

    A sequence has a slot of a dense cache, or pages. Positions count the rows of its slot or its
    pages, from 0. `cache_seqlens` of them are filled; new keys go behind them, and belong to the
    keys that queries see. Lk, from which the diagonal starts, counts all keys of the sequence.

    Nothing is written before every argument is checked; lengths, indices and pages are checked on
    the CPU, and cut off at the cache on MPS, where reading them would wait for the GPU. There are
    no gradients.

    Args:
        q: `[B, Lq, H, D]`.
        k_cache: `[slots, positions, Hk, D]`, where B slots are those of the B sequences; or
            `[pages, page_size, Hk, D]` with `block_table`. Last stride 1.
        v_cache: the same with Dv.
        k: `[B, new, Hk, D]`, written into the cache in place, or None. Wants `v` and
            `cache_seqlens`, which is not changed.
        v: `[B, new, Hk, Dv]`.
        rotary_cos: `[positions, rotary_dim / 2]`, in the dtype of q, with a row for each position
            of the cache: rotate `k` and q by their positions. New key t stands at position
            `cache_seqlens + t`; query i at `cache_seqlens + i` with `causal` or a window, else all
            of them at `cache_seqlens`. q itself stays as it is.
        rotary_sin: the same.
        cache_seqlens: filled positions of each sequence, int32 `[B]`, or one number for all;
            None for the whole cache.
        cache_batch_idx: int32 `[B]`, the slot of each sequence. Distinct ones if `k` is given.
        cache_leftpad: int32 `[B]`, the position of the first key of each sequence.
        block_table: int32 `[B, max_pages]`, the pages of each sequence in order; entries behind
            the last key mean nothing. Page sizes are multiples of 256 in flash_attn, of 16 here.
            Pages that get new keys belong to one sequence alone.
        softmax_scale, causal, window_size, softcap, alibi_slopes: see `flash_attn_func`.
        rotary_interleaved: values 0 and 1 of a head are a pair; else 0 and `rotary_dim / 2`.
        num_splits: into how many parts the keys of a sequence are split, as far as they suffice, by
            engines that split keys: 1 to 128, or 0 for the planner's choice.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        out `[B, Lq, H, Dv]`; with `return_softmax_lse` also lse, float32 `[B, H, Lq]`.
    """
    attend = traced_cached if is_dynamo_compiling() else attend_cached
    # fmt: off
    return attend(
        True, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        cache_leftpad, block_table, None, None, 0, None, softmax_scale, causal, window_size,
        softcap, rotary_interleaved, alibi_slopes, None, False, num_splits, return_softmax_lse,
    )
    # fmt: on


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    top_left: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Result:
    """Attention with everything that the engines can do beyond flash_attn.

    Args:
        q: `[B, Lq, H, D]`; `[Tq, H, D]` with `cu_seqlens_q`.
        k: `[B, Lk, Hk, D]`; `[Tk, Hk, D]` with `cu_seqlens_q`.
        v: `[B, Lk, Hk, Dv]`; `[Tk, Hk, Dv]` with `cu_seqlens_q`.
        causal, window_size, softmax_scale, softcap, alibi_slopes: see `flash_attn_func`.
        bias: float32, float16 or bfloat16, broadcastable to `[B, H, Lq, Lk]`: added to the scores
            last. Not with packed sequences.
        mask: bool, broadcastable to `[B, H, Lq, Lk]`: True shows a key, False hides it. Not
            together with `bias`, nor with packed sequences.
        sinks: float32 `[H]`: one more logit per head that takes probability and has no value
            (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023).
        top_left: the diagonal starts at the first query and the first key, as in torch's
            `scaled_dot_product_attention`.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: see `flash_attn_varlen_func`.
        dropout_p: see `flash_attn_func`.
        return_lse: also return the log-sum-exp, which includes the sinks.

    Returns:
        out like q, with the last dimension of v; with `return_lse` also lse, float32 `[B, H, Lq]`
        or `[H, Tq]`.
    """
    _check_bias_and_mask(bias, mask)
    attend = traced if is_dynamo_compiling() else forward
    # fmt: off
    result = attend(
        1, cu_seqlens_q is not None, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, bias,
        mask, sinks, bool(top_left), bool(return_lse),
    )
    # fmt: on
    return result[:2] if return_lse else result


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    top_left: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    backward: bool = False,
) -> Plan:
    """Which tier would serve `attention` with these arguments, and why not the others.

    Nothing is computed, and the contents of tensors are not read. The arguments are those of
    `attention`, and bad ones raise what it raises. `backward` asks for the tier of the gradients
    instead: of q, k, v and the sinks, and of a bias that requires grad.
    """
    _check_bias_and_mask(bias, mask)
    # fmt: off
    return _plan(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_size, softcap, alibi_slopes, bias, mask, sinks, bool(top_left),
        bool(backward),
    )
    # fmt: on


def trace() -> Trace:
    """Counts attention calls, and calls for gradients, by shape and tier.

    Use it as a context manager: `calls` of what it yields lists a `TraceEntry` for each distinct
    shape and tier, most frequent first. Calls of all threads count. Replaying a compiled graph
    counts, tracing one does not.
    """
    return Trace()


def _check_bias_and_mask(bias: Tensor | None, mask: Tensor | None) -> None:
    if bias is not None and mask is not None:
        raise ValueError(
            "bias and mask are both given; allowed: one of them, for example "
            "bias.masked_fill(~mask, float('-inf'))"
        )
