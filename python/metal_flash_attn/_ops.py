"""`torch.ops.mtlflashattn.forward`: attention as an operator that torch can see.

Plain CPU tensors in eager mode do not come this way. Everything else does: torch.compile and
export, fake and meta tensors, functorch, subclasses, dispatch modes, other devices.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._native import execute_operator

# q, k and v apart, lengths and window as numbers; both the order and the names are those of
# crates/python/src/operator.rs.
_SCHEMA = """forward(
    Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,
    SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale,
    bool causal, SymInt window_left, SymInt window_right, float softcap,
    Tensor? alibi_slopes, Tensor? bias, Tensor? sinks, bool top_left
) -> (Tensor out, Tensor lse)"""

_MAX_DIMS = 5

_LIBRARY = torch.library.Library("mtlflashattn", "DEF")
_LIBRARY.define(" ".join(_SCHEMA.split()), tags=(torch.Tag.pt2_compliant_tag,))
_FORWARD = torch.ops.mtlflashattn.forward.default


def dispatch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Calls the operator."""
    result: tuple[Tensor, Tensor] = _FORWARD(*arguments)
    return result


def check_tensor(name: str, tensor: Any) -> None:
    """Raises if the operator would misread `tensor`, which the caller knows as `name`."""
    if not isinstance(tensor, Tensor):
        return  # It stands in for a tensor, and __torch_function__ says how.
    if tensor.is_nested or tensor.is_quantized or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        kind = "quantized" if tensor.is_quantized else kind
        raise TypeError(f"{name} is a {kind} tensor; allowed: dense (torch.strided) tensors")
    if tensor.dim() > _MAX_DIMS:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; allowed: at most {_MAX_DIMS} dimensions"
        )
    if _needs_gradient(tensor):
        raise NotImplementedError(_NO_GRADIENT.format(name))


def _needs_gradient(tensor: Tensor) -> bool:
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    # Forward mode: a level is open and the tensor carries a tangent.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def traced(
    packing: int,
    varlen: bool,
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    bias: Any,
    mask: Any,
    sinks: Any,
    top_left: bool,
    return_lse: Any,
) -> Any:
    """`_native.forward` in Python that torch.compile can follow."""
    del varlen
    if dropout_p != 0:
        raise NotImplementedError("dropout_p: dropout is not supported; pass 0.0")
    if packing == 3:
        q, k, v = q.unbind(-3)
    elif packing == 2:
        k, v = k.unbind(-3)
    left, right = window_size
    # fmt: off
    result = _FORWARD(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
        bool(causal), left, right, float(softcap), alibi_slopes, bias if mask is None else mask,
        sinks, top_left,
    )
    # fmt: on
    return result if return_lse else result[0]


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Shapes and strides of the results, as `allocate` in crates/python/src/execute.rs has them.

    Checks nothing: torch.compile would wrap the error, where the real call says it in plain words.
    """
    q, v = arguments[0], arguments[2]
    if q.shape[-1] > 1 and q.stride(-1) != 1:
        q = q.contiguous()
    shape = (*q.shape[:-1], v.shape[-1])
    out = torch.empty_like(q) if v.shape[-1] == q.shape[-1] else q.new_empty(shape)
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        out = q.new_empty(shape)
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return out, q.new_empty(lse_shape, dtype=torch.float32)


def _refuse_gradient(ctx: Any, inputs: Any, output: Any) -> NoReturn:
    """Called when an input requires grad and grad mode is on: results must not come detached."""
    del ctx, inputs, output
    raise NotImplementedError(_NO_GRADIENT.format("q, k, v"))


def _backward(ctx: Any, *gradients: Any) -> NoReturn:
    del gradients
    _refuse_gradient(ctx, None, None)


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[Any, tuple[int, int]]:
    """The rule of torch.vmap: one call for each slice."""
    results = []
    for index in range(info.batch_size):
        slices = [
            argument if dim is None else argument.select(dim, index)
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        results.append(_FORWARD(*slices))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0)


_NO_GRADIENT = (
    "{}: a tensor that requires grad is not supported; call under torch.no_grad(), or pass "
    "tensor.detach()"
)

_LIBRARY.impl("forward", execute_operator, "CompositeExplicitAutograd")
torch.library.register_fake(_FORWARD._name, _fake, lib=_LIBRARY)
torch.library.register_autograd(
    _FORWARD._name, _backward, setup_context=_refuse_gradient, lib=_LIBRARY
)
torch.library.register_vmap(_FORWARD._name, _vmap, lib=_LIBRARY)
