"""What flash_attn calls S_dmask: probabilities whose sign says which ones dropout drops."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ._dropout import Dropout, threshold
from ._torch_tier import Rules, signed_probabilities

# Both sizes of the result are rounded up to it, as in flash_attn.
_MULTIPLE = 128
# Query rows that are computed together.
_CHUNK = 1024


def s_dmask(
    result: tuple[Tensor, ...],
    packing: int,
    q: Any,
    k: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Any,
    alibi_slopes: Tensor | None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The softmax before dropout, negative where a probability is dropped.

    Args:
        result: (out, lse) of the call, and the random state if something was dropped.
        packing: how many of q, k and v came as one tensor.
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
            causal, window_size, alibi_slopes, bias, sinks: of the call.

    Returns:
        `[B, H, Lq, Lk]` in the dtype of q, both lengths rounded up to multiples of 128, with 0 for
        what is hidden and behind the end of a sequence; empty where nothing is dropped. It takes
        memory for every pair of query and key, and is meant for tests.
    """
    _, lse, *rng_state = result
    if not rng_state:
        empty: Tensor = q.new_empty((0,))
        return empty
    if packing == 3:
        q, k, _ = q.unbind(-3)
    elif packing == 2:
        k, _ = k.unbind(-3)
    left, right = (int(bound) for bound in window_size)
    packed = cu_seqlens_q is not None
    lengths = (max_seqlen_q, max_seqlen_k) if packed else (q.shape[1], k.shape[1])
    query_len, key_len = (-(-length // _MULTIPLE) * _MULTIPLE for length in lengths)
    # fmt: off
    call = (
        q.detach(), k.detach(), lse.detach(), cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, sinks,
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, left,
        0 if causal else right, dropout_p, rng_state[0], query_len, key_len,
    )
    # fmt: on
    # Sequences of lengths that only a run knows are more than torch.compile can follow.
    probabilities: Tensor = (_OPERATOR if packed and is_dynamo_compiling() else _compute)(*call)
    return probabilities


def _compute(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    left: int,
    right: int,
    dropout_p: float,
    rng_state: Tensor,
    query_len: int,
    key_len: int,
) -> Tensor:
    steps = threshold(dropout_p)
    rules = Rules(
        scale,
        0.0,
        left if left >= 0 else None,
        right if right >= 0 else None,
        False,
        sinks,
        _CHUNK,
        Dropout(steps, 1.0 / (1.0 - steps / 65536), *rng_state),
    )
    packed = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        packed = (cu_seqlens_q, cu_seqlens_k)
    return signed_probabilities(q, k, lse, packed, alibi_slopes, bias, rules, (query_len, key_len))


def _fake(q: Tensor, k: Tensor, lse: Tensor, cu_seqlens_q: Tensor, *rest: Any) -> Tensor:
    del k, lse
    return q.new_empty((cu_seqlens_q.shape[0] - 1, q.shape[1], *rest[-2:]))


_LIBRARY = torch.library.Library("mtlflashattn", "FRAGMENT")
_LIBRARY.define(
    "s_dmask(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor? alibi_slopes, Tensor? bias, Tensor? sinks, float scale, SymInt left, SymInt right, "
    "float dropout_p, Tensor rng_state, SymInt query_len, SymInt key_len) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_OPERATOR = torch.ops.mtlflashattn.s_dmask.default
"""`_compute` for packed sequences."""
_LIBRARY.impl("s_dmask", _compute, "CompositeExplicitAutograd")
torch.library.register_fake(_OPERATOR._name, _fake, lib=_LIBRARY)
