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

from ._native import Plan, Trace, forward
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
        k: `[Tk, Hk, D]`.
        v: `[Tk, Hk, Dv]`.
        cu_seqlens_q: int32 `[B + 1]`, contiguous: sequence b has the rows `cu_seqlens_q[b]` to
            `cu_seqlens_q[b + 1]` of q. Offsets must not decrease, and may end before Tq.
        cu_seqlens_k: the same for k and v.
        max_seqlen_q: at least the length of the longest query sequence.
        max_seqlen_k: at least the length of the longest key sequence.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: see `flash_attn_func`.
        block_table: paged keys and values are not supported.

    Returns:
        out `[Tq, H, Dv]`; with `return_attn_probs` also lse, float32 `[H, Tq]`, and S_dmask with
        the longest sequences as lengths. Rows in no sequence get 0, and +inf.
    """
    if block_table is not None:
        raise NotImplementedError(
            "block_table: paged keys and values are not supported; gather the pages into packed "
            "k and v"
        )
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
    """Attention over a cache of keys and values: not supported.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "flash_attn_with_kvcache is not supported; write the new keys and values into the cache "
        "and call flash_attn_func on its filled part"
    )


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
