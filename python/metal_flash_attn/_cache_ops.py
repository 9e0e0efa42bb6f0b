"""`torch.ops.mtlflashattn.attend_cached` and `append_and_attend`: attention over a cache.

The first reads the cache, the second writes new keys into it before that. As with `_ops`, plain CPU
and MPS tensors in eager mode do not come this way. There are no gradients.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ._native import execute_cached_operator
from ._ops import _fake, _slice_by_slice

# The order and the names are those of crates/python/src/kvcache/operator.rs.
_REST = """
    Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table,
    Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks,
    SymInt? cache_len, SymInt max_seqlen_q, SymInt? max_seqlen_k, float? softmax_scale,
    bool causal, SymInt window_left, SymInt window_right, float softcap, bool top_left,
    bool rotary_interleaved, SymInt num_splits"""

_SCHEMAS = (
    f"attend_cached(Tensor q, Tensor k_cache, Tensor v_cache, {_REST}) -> (Tensor out, Tensor lse)",
    f"""append_and_attend(
        Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v,
        Tensor? rotary_cos, Tensor? rotary_sin, {_REST}
    ) -> (Tensor out, Tensor lse)""",
)

_LIBRARY = torch.library.Library("mtlflashattn", "FRAGMENT")
for _schema in _SCHEMAS:
    _LIBRARY.define(" ".join(_schema.split()), tags=(torch.Tag.pt2_compliant_tag,))
_ATTEND = torch.ops.mtlflashattn.attend_cached.default
_APPEND = torch.ops.mtlflashattn.append_and_attend.default

_NEW = slice(3, 7)
"""Places of what only the second operator has."""


def dispatch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Calls the operator that the call needs, with the arguments of the second."""
    new = arguments[_NEW]
    operator = _APPEND
    if new[0] is None:
        operator, arguments = _ATTEND, arguments[: _NEW.start] + arguments[_NEW.stop :]
    result: tuple[Tensor, Tensor] = operator(*arguments)
    return result


def traced(
    caches_named: bool,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    cache_seqlens: Any,
    cache_batch_idx: Any,
    cache_leftpad: Any,
    block_table: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    rotary_interleaved: Any,
    alibi_slopes: Any,
    sinks: Any,
    top_left: bool,
    num_splits: Any,
    return_lse: Any,
) -> Any:
    """`_native.attend_cached` in Python that torch.compile can follow."""
    del caches_named
    is_tensor = cache_seqlens is None or isinstance(cache_seqlens, Tensor)
    lengths, cache_len = (cache_seqlens, None) if is_tensor else (None, cache_seqlens)
    left, right = window_size
    # fmt: off
    rest = (
        lengths, cache_batch_idx, cache_leftpad, block_table, cu_seqlens_q, cu_seqlens_k,
        alibi_slopes, sinks, cache_len, max_seqlen_q, max_seqlen_k, softmax_scale, bool(causal),
        left, right, float(softcap), top_left, bool(rotary_interleaved), num_splits,
    )
    # fmt: on
    if k is None and v is None and rotary_cos is None and rotary_sin is None:
        result = _ATTEND(q, k_cache, v_cache, *rest)
    else:
        result = _APPEND(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, *rest)
    return result if return_lse else result[0]


def count_write(*caches: Tensor) -> None:
    """Raises the version of tensors that were written past torch, so that autograd notices."""
    for cache in caches:
        # Inference tensors have no version.
        if not cache.is_inference():
            torch.autograd.graph.increment_version(cache)


def _without_append(*arguments: Any) -> tuple[Tensor, Tensor]:
    nothing = (None,) * (_NEW.stop - _NEW.start)
    return execute_cached_operator(*arguments[: _NEW.start], *nothing, *arguments[_NEW.start :])


def _refuse_gradients(operator: Any) -> Any:
    """The operator below autograd, for inputs that require no gradient."""

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for argument, schema in zip(arguments, operator._schema.arguments, strict=True):
                if isinstance(argument, Tensor) and argument.requires_grad:
                    _refuse(schema.name)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return call


def _refuse(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name}: a tensor that requires grad, in attention over a cache, is not supported; call "
        "under torch.no_grad(), or pass tensor.detach()"
    )


_LIBRARY.impl("attend_cached", _without_append, "CompositeExplicitAutograd")
_LIBRARY.impl("append_and_attend", execute_cached_operator, "CompositeExplicitAutograd")
for _operator in (_ATTEND, _APPEND):
    _LIBRARY.impl(_operator._opname, _refuse_gradients(_operator), "Autograd")
    torch.library.register_fake(_operator._name, _fake, lib=_LIBRARY)
torch.library.register_vmap(_ATTEND._name, _slice_by_slice(_ATTEND), lib=_LIBRARY)
