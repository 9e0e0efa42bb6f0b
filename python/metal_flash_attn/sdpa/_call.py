"""One call of scaled_dot_product_attention: may it be served, and how."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from metal_flash_attn import _native
from metal_flash_attn.interface import attention

from ._gates import Decision, Gates
from ._operator import SDPA
from ._stock import Call
from ._training import TRAINING

_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)

_SUBCLASS: Final = Decision(
    False,
    "type",
    "q, k, v or the mask is no plain torch.Tensor: subclasses (fake, functional, quantised, "
    "distributed, jagged tensors), parameters and proxies are for torch to dispatch",
)
_DEVICE: Final = Decision(
    False, "device", "only MPS tensors are served, and CPU tensors after install(cpu=True)"
)
_NESTED: Final = Decision(False, "type", "nested tensors are not served")
_GRADIENT: Final = Decision(
    False, "gradient", "the mask requires grad while grad mode is on: its gradient is torch's"
)
_SHAPE: Final = Decision(
    False,
    "shape",
    "shapes that torch refuses or that are rare: other than three to five dimensions, empty ones, "
    "leading dimensions that are broadcast in more than one, heads that neither match nor group",
)
_DROPOUT: Final = Decision(False, "dropout", "dropout_p is not 0")
_ARGUMENT: Final = Decision(
    False, "argument", "is_causal or enable_gqa is no bool, or scale no finite number"
)
_MASKED_CAUSAL: Final = Decision(
    False, "argument", "is_causal together with a mask is an error of torch"
)
_DTYPE: Final = Decision(
    False, "dtype", "q, k and v must be all float32, all float16 or all bfloat16"
)
_MASK: Final = Decision(
    False,
    "mask",
    "a mask must be on q's device, bool, float32 or of q's dtype, and broadcastable to the scores",
)
_BACKEND: Final = Decision(
    False, "backend", "torch.nn.attention.sdpa_kernel, or a switch like it, picks a stock backend"
)
_WATCHED: Final = Decision(
    False,
    "watched",
    "a function or dispatch mode, functorch, forward-mode differentiation, tracing or export "
    "wants to see torch's own operation",
)
_COMPLEX_VIEW: Final = Decision(False, "type", "memory holds the negative of the values")


def examine(
    gates: Gates | None,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
) -> tuple[Decision, Call | None]:
    """The decision, and the call where it is to be served. torch.compile follows it, too.

    Args:
        gates: those of q's device.
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: of the call, with
            whatever somebody may have passed.
    """
    refusal = _refuse_early(gates, query, key, value, attn_mask, is_causal)
    refusal = refusal or _refuse_arguments(dropout_p, is_causal, scale, enable_gqa)
    if refusal is not None or gates is None:
        return refusal or _DEVICE, None
    call = _describe(query, key, value, attn_mask, is_causal, enable_gqa)
    if call is None:
        return _SHAPE, None
    decision = gates.decide(call)
    if not decision.serves:
        return decision, None
    refusal = _refuse_tensors(query, key, value, attn_mask, call) or _refuse_surroundings()
    return (decision, call) if refusal is None else (refusal, None)


def raise_masked_causal(gates: Gates, attn_mask: object, is_causal: object) -> None:
    """Raises torch's error where stock torch would end the process instead."""
    if gates.masked_causal_aborts and attn_mask is not None and is_causal is True:
        raise RuntimeError(
            "_scaled_dot_product_attention: Explicit attn_mask should not be set when "
            "is_causal=True"
        )


def _refuse_early(
    gates: Gates | None, query: Any, key: Any, value: Any, attn_mask: Any, is_causal: Any
) -> Decision | None:
    """The cheap reasons not to serve."""
    if type(query) is not Tensor or type(key) is not Tensor or type(value) is not Tensor:
        return _SUBCLASS
    if gates is None:
        return _DEVICE
    if attn_mask is not None and is_causal is True:
        return _MASKED_CAUSAL
    return _NESTED if query.is_nested or key.is_nested or value.is_nested else None


def _describe(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, is_causal: Any, enable_gqa: Any
) -> Call | None:
    """The call as gates see it; None for shapes that are not served."""
    q, k, v = query.shape, key.shape, value.shape
    dims = len(q)
    if not 3 <= dims <= 5 or len(k) != dims or len(v) != dims:
        return None
    heads, query_len, head_dim = q[-3], q[-2], q[-1]
    key_heads, key_len, value_dim = k[-3], k[-2], v[-1]
    if k[-1] != head_dim or v[-2] != key_len or v[-3] != key_heads or key_heads == 0:
        return None
    if heads != key_heads and (heads % key_heads or not (enable_gqa or key_heads == 1)):
        return None
    batch, same_batch = 1, True
    for axis in range(dims - 3):
        size = max(q[axis], k[axis], v[axis])
        same = q[axis] == k[axis] == v[axis]
        if not same and (dims > 4 or any(other[axis] not in {1, size} for other in (q, k, v))):
            return None
        batch, same_batch = batch * size, same_batch and same
    if batch * heads * query_len * key_len * head_dim * value_dim == 0:
        return None
    return Call(
        autocast_dtype(query) or query.dtype,
        batch,
        heads,
        query_len,
        key_len,
        head_dim,
        value_dim,
        None if attn_mask is None else getattr(attn_mask, "dtype", None),
        is_causal is True,
        query.is_contiguous(),
        same_batch and dims < 5,
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad),
    )


def _refuse_arguments(
    dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any
) -> Decision | None:
    if type(dropout_p) not in {float, int} or dropout_p != 0:
        return _DROPOUT
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        return _ARGUMENT
    if scale is not None and (type(scale) not in {float, int} or not abs(scale) <= _LARGEST_SCALE):
        return _ARGUMENT
    return None


# Beyond it factors that are folded into the scale would overflow.
_LARGEST_SCALE: Final = 8e37


def _refuse_tensors(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, call: Call
) -> Decision | None:
    if key.device != query.device or value.device != query.device:
        return _DEVICE
    dtype = autocast_dtype(query)
    dtypes = (query.dtype, key.dtype, value.dtype)
    if dtype is None and dtypes != (query.dtype,) * 3:
        return _DTYPE
    if any(own not in _DTYPES for own in dtypes):
        return _DTYPE
    if attn_mask is None:
        return None
    if type(attn_mask) is not Tensor or attn_mask.is_nested:
        return _SUBCLASS
    if attn_mask.requires_grad and torch.is_grad_enabled():
        return _GRADIENT
    right_dtype = attn_mask.dtype in {torch.bool, torch.float32, query.dtype}
    if dtype is not None:
        right_dtype = attn_mask.dtype in {torch.bool, *_DTYPES}
    if not right_dtype or attn_mask.device != query.device:
        return _MASK
    full = (*query.shape[:-3], call.heads, call.query_len, call.key_len)
    if query.dim() == 4:
        full = (call.batch, *full[1:])
    shape = attn_mask.shape
    if not 2 <= len(shape) <= len(full):
        return _MASK
    if any(
        size not in {1, whole} for size, whole in zip(reversed(shape), reversed(full), strict=False)
    ):
        return _MASK
    return None


def _refuse_surroundings() -> Decision | None:
    if not (torch._C._get_flash_sdp_enabled() and torch._C._get_math_sdp_enabled()):
        return _BACKEND
    if is_dynamo_compiling():
        return _WATCHED if torch.compiler.is_exporting() else None
    is_watched = (
        torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
    return _WATCHED if is_watched else None


def autocast_dtype(query: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives the inputs of attention, where it is on."""
    kind = "mps" if query.is_mps else "cpu"
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def is_plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> bool:
    """What `Gates.out_layout` asks."""
    if attn_mask is not None and (attn_mask.dim() not in {2, 4} or attn_mask.requires_grad):
        return False
    return query.stride(-1) == key.stride(-1) == value.stride(-1) == 1


def attend(
    gates: Gates,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    call: Call,
) -> Tensor:
    """Computes a call that `examine` lets pass."""
    out_layout = gates.out_layout(call, is_plain(query, key, value, attn_mask))
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(dtype)
    shape = query.shape
    if len(shape) == 3:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    elif len(shape) == 5:
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*shape[:2], *attn_mask.shape[-3:]).flatten(0, 1)
        query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    else:
        query, key, value = (
            tensor if tensor.shape[0] == call.batch else tensor.expand(call.batch, -1, -1, -1)
            for tensor in (query, key, value)
        )
    out: Tensor
    if call.gradient:
        out = _differentiable(query, key, value, attn_mask, is_causal, scale, out_layout)
    else:
        run = SDPA if is_dynamo_compiling() else _native.sdpa
        out = run(query, key, value, attn_mask, is_causal, scale, out_layout)
    if len(shape) == 3:
        return out.squeeze(0)
    return out.unflatten(0, shape[:2]) if len(shape) == 5 else out


def _differentiable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    out_layout: str,
) -> Tensor:
    """`_native.sdpa` with gradients of query, key and value."""
    inputs = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    is_boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    tokens_first: Any
    if is_dynamo_compiling():
        tokens_first = TRAINING(*inputs, attn_mask, is_causal, scale)[0]
    else:
        tokens_first = attention(
            *inputs,
            causal=is_causal,
            softmax_scale=scale,
            bias=None if is_boolean else attn_mask,
            mask=attn_mask if is_boolean else None,
            top_left=True,
        )
    # Laid out as q is, or by tokens: neither is copied where stock torch has the same.
    if out_layout == "tokens_first":
        tokens_first = tokens_first.contiguous()
    out: Tensor = tokens_first.transpose(1, 2)
    return out.contiguous() if out_layout == "contiguous" else out
