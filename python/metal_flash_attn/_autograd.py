"""Gradients in eager mode: `torch.autograd.Function` around the engines, without the dispatcher."""

from typing import Any

import torch
from torch import Tensor

from ._native import backward_into, execute_operator
from ._ops import dispatch_backward, like_rows

# Places among the arguments of `Attention` behind q, k, v.
_BIAS, _SINKS = 10, 11
# For each of q, k and v the input that holds it, by how many of them came as one tensor.
_SOURCES = {1: (0, 1, 2), 2: (0, 1, 1), 3: (0, 0, 0)}


def attend(*arguments: Any) -> Any:
    """(out, lse) with gradients; see `Attention` for the arguments."""
    return Attention.apply(*arguments)


class Attention(torch.autograd.Function):
    """Attention of tensors that may be packed.

    Arguments: how many of q, k, v came as one tensor, in which case those behind it are None; q, k
    and v; and what follows them in `torch.ops.mtlflashattn.forward`.
    """

    @staticmethod
    def forward(ctx: Any, packing: int, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        """Out and lse, computed without grad mode."""
        out, lse = execute_operator(*_unpack(packing, q, k, v), *rest)
        ctx.set_materialize_grads(False)
        tensors = [value if isinstance(value, Tensor) else None for value in rest]
        ctx.save_for_backward(out, lse, q, k, v, *tensors)
        ctx.packing = packing
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in rest]
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        """Gradients laid out as flash_attn lays them out: those of packed tensors are packed."""
        result: list[Tensor | None] = [None] * (4 + len(ctx.numbers))
        if grad_out is None and grad_lse is None:
            return tuple(result)
        out, lse, q, k, v, *tensors = ctx.saved_tensors
        pairs = zip(tensors, ctx.numbers, strict=True)
        rest = [value if tensor is None else tensor for tensor, value in pairs]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        call = (grad_out, grad_lse, out, lse, *_unpack(ctx.packing, q, k, v), *rest)
        needs = ctx.needs_input_grad[1:4]
        needs_rest = ctx.needs_input_grad[4:]
        parts = [needs[source] for source in _SOURCES[ctx.packing]]
        wanted = [*parts, needs_rest[_BIAS], needs_rest[_SINKS]]
        d_inputs: list[Tensor | None]
        d_bias: Tensor | None
        d_sinks: Tensor | None
        if torch.is_grad_enabled():
            # Somebody may differentiate the gradients, which the operator refuses then.
            *gradients, d_bias, d_sinks = dispatch_backward(*call, wanted)
            d_inputs = _pack(ctx.packing, gradients)
        else:
            d_inputs = [
                _empty(ctx.packing, place, tensor) if needed else None
                for place, (tensor, needed) in enumerate(zip((q, k, v), needs, strict=True))
            ]
            d_bias = like_rows(rest[_BIAS]) if wanted[3] else None
            d_sinks = like_rows(rest[_SINKS]) if wanted[4] else None
            backward_into(*_unpack(ctx.packing, *d_inputs), d_bias, d_sinks, *call)
        for place, (gradient, needed) in enumerate(zip(d_inputs, needs, strict=True)):
            result[1 + place] = gradient if needed else None
        result[4 + _BIAS] = d_bias if wanted[3] else None
        result[4 + _SINKS] = d_sinks if wanted[4] else None
        return tuple(result)


def _unpack(packing: int, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Views of q, k and v, None where the tensor that holds them is."""
    if packing == 3:
        return (None, None, None) if q is None else q.unbind(-3)
    if packing == 2:
        return (q, None, None) if k is None else (q, *k.unbind(-3))
    return q, k, v


def _pack(packing: int, parts: list[Tensor]) -> list[Tensor | None]:
    """The inverse of `_unpack`."""
    if packing == 3:
        return [torch.stack(parts, -3), None, None]
    if packing == 2:
        # Parts that are not wanted are empty and have no such dimension.
        return [parts[0], torch.stack(parts[1:], -3) if parts[1].dim() > 1 else None, None]
    return list(parts)


def _empty(packing: int, place: int, tensor: Tensor) -> Tensor:
    """An uninitialised gradient; that of a packed tensor is contiguous, as in flash_attn."""
    is_packed = packing == 3 or (packing == 2 and place == 1)
    return tensor.new_empty(tensor.shape) if is_packed else like_rows(tensor)
