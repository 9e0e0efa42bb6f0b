"""`torch.ops.mtlflashattn.forward` and `backward`: attention as operators that torch can see.

Plain CPU and MPS tensors in eager mode do not come this way. Everything else does: torch.compile
and export, fake and meta tensors, functorch, subclasses, dispatch modes, other devices.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from ._dropout import draw as _draw
from ._dropout import drops
from ._native import execute_backward, execute_operator

# q, k and v apart, lengths and window as numbers; both the order and the names are those of
# crates/python/src/operator.rs.
_ARGUMENTS = """
    Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,
    SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale,
    bool causal, SymInt window_left, SymInt window_right, float softcap,
    Tensor? alibi_slopes, Tensor? bias, Tensor? sinks, bool top_left, float dropout_p,
    Tensor? rng_state"""

_FORWARD_SCHEMA = f"forward({_ARGUMENTS}) -> (Tensor out, Tensor lse)"

# Gradients that are not wanted come back empty.
_BACKWARD_SCHEMA = f"""backward(
    Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_ARGUMENTS}, bool[5] wanted
) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_sinks)"""

# int64 [2] on the CPU: seed and offset. Random, so that no compiler merges or drops calls.
_RNG_STATE_SCHEMA = "rng_state(Device device) -> Tensor"

_MAX_DIMS = 5

_LIBRARY = torch.library.Library("mtlflashattn", "DEF")
for _schema in (_FORWARD_SCHEMA, _BACKWARD_SCHEMA):
    _LIBRARY.define(" ".join(_schema.split()), tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    _RNG_STATE_SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded)
)
_FORWARD = torch.ops.mtlflashattn.forward.default
_BACKWARD = torch.ops.mtlflashattn.backward.default
draw = torch.ops.mtlflashattn.rng_state.default
"""Takes a random state from the generator of a device."""

# Places among the arguments of the forward operator.
_Q, _K, _V, _CU_SEQLENS_Q, _CU_SEQLENS_K, _ALIBI_SLOPES, _BIAS, _SINKS = 0, 1, 2, 3, 4, 12, 13, 14
_RNG_STATE = 17
_TENSORS = (_Q, _K, _V, _CU_SEQLENS_Q, _CU_SEQLENS_K, _ALIBI_SLOPES, _BIAS, _SINKS, _RNG_STATE)
_RESULTS = 4
"""What the backward operator takes before the arguments of the forward operator."""
DIFFERENTIABLE = (_Q, _K, _V, _BIAS, _SINKS)
"""Arguments of the forward operator that have gradients, in the order of the backward's results."""


def dispatch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Calls the forward operator."""
    call = _Forward.apply if _needs_function() else _FORWARD
    result: tuple[Tensor, Tensor] = call(*arguments)
    return result


def dispatch_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Calls the backward operator."""
    call = _Backward.apply if _needs_function() else _BACKWARD
    result: tuple[Tensor, ...] = call(*arguments)
    return result


def _needs_function() -> bool:
    """Whether a transform of torch.func is active that takes an autograd.Function."""
    if not torch._C._are_functorch_transforms_active():
        return False
    interpreter = torch._C._functorch.peek_interpreter_stack()
    # torch has no rule of functionalize for such a function, and needs none for an operator.
    functionalize = torch._C._functorch.TransformType.Functionalize
    return interpreter is not None and interpreter.key() != functionalize


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
    # Forward mode: a level is open and the tensor carries a tangent.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(_NO_TANGENT.format(name))


def check_operand(name: str, value: Any) -> None:
    """Raises if operations of torch would misread `value`, or end the process over it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: torch.Tensor")
    if is_dynamo_compiling():
        return  # Nothing is read, and it follows no look at layouts in an autograd.Function.
    check_tensor(name, value)
    if _is_freed(value):
        raise ValueError(
            f"{name} is a tensor without memory of its own; allowed: tensors whose memory torch "
            "can hand out"
        )


def _is_freed(tensor: Tensor) -> bool:
    """Whether the storage of a plain tensor was resized to nothing, as sharding libraries do."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.numel() == 0:
        return False
    try:
        return tensor.untyped_storage().nbytes() == 0
    except NotImplementedError:  # A wrapper of torch.func.
        return False


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
    if packing == 3:
        q, k, v = q.unbind(-3)
    elif packing == 2:
        k, v = k.unbind(-3)
    left, right = window_size
    if isinstance(left, float) or isinstance(right, float):
        # The operator would refuse it while it is compiled, in torch's words.
        raise TypeError("window_size: allowed: two integers (left, right), negative for no bound")
    rng_state = draw(q.device) if drops(dropout_p) else None
    # fmt: off
    result = _FORWARD(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
        bool(causal), left, right, float(softcap), alibi_slopes, bias if mask is None else mask,
        sinks, top_left, float(dropout_p), rng_state,
    )
    # fmt: on
    if not return_lse:
        return result[0]
    return result if rng_state is None else (*result, rng_state)


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


def allocate_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """Uninitialised gradients as `torch.empty_like` lays them out, with contiguous rows."""
    return tuple(
        like_rows(tensor) if tensor is not None and is_wanted else q.new_empty((0,))
        for tensor, is_wanted in zip((q, k, v, bias, sinks), wanted, strict=True)
    )


def like_rows(tensor: Tensor) -> Tensor:
    """`torch.empty_like(tensor)`, or contiguous where that would leave rows with gaps."""
    if tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        like = torch.empty_like(tensor)
        if tensor.dim() == 0 or like.shape[-1] <= 1 or like.stride(-1) == 1:
            return like
    return tensor.new_empty(tensor.shape)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call, wanted = arguments[_RESULTS:-1], arguments[-1]
    q, k, v, bias, sinks = (call[place] for place in DIFFERENTIABLE)
    return allocate_gradients(q, k, v, bias, sinks, wanted)


def _fake_draw(device: torch.device) -> Tensor:
    del device
    return torch.empty(2, dtype=torch.int64, device="cpu")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    if ctx.needs_input_grad[_ALIBI_SLOPES]:
        raise NotImplementedError(_NO_SLOPE_GRADIENT)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(inputs[place] for place in _TENSORS), *output)
    ctx.inputs = [None if place in _TENSORS else value for place, value in enumerate(inputs)]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    gradients: list[Tensor | None] = [None] * len(ctx.inputs)
    if grad_out is None and grad_lse is None:
        return tuple(gradients)
    *tensors, out, lse = ctx.saved_tensors
    call = list(ctx.inputs)
    for place, tensor in zip(_TENSORS, tensors, strict=True):
        call[place] = tensor
    wanted = [ctx.needs_input_grad[place] for place in DIFFERENTIABLE]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    results = dispatch_backward(grad_out, grad_lse, out, lse, *call, wanted)
    for place, is_wanted, result in zip(DIFFERENTIABLE, wanted, results, strict=True):
        gradients[place] = result if is_wanted else None
    return tuple(gradients)


def _ignore(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del ctx, inputs, output


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> NoReturn:
    del ctx, gradients
    raise NotImplementedError(
        "attention has no second derivatives here; use torch's scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


def _slice_by_slice(operator: Any) -> Callable[..., tuple[Any, tuple[int, ...]]]:
    """A rule for torch.vmap: one call for each slice, with random numbers as vmap wants them."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        results = []
        state_place = _RNG_STATE + (0 if operator is _FORWARD else _RESULTS)
        state = arguments[state_place]
        if state is not None and info.randomness == "error":
            raise RuntimeError(
                "vmap: attention with dropout draws random numbers; pass randomness='different' or "
                "randomness='same' to vmap"
            )
        for index in range(info.batch_size):
            slices = [
                argument.select(dim, index) if isinstance(dim, int) else argument
                for argument, dim in zip(arguments, in_dims, strict=True)
            ]
            if state is not None and info.randomness == "different":
                # The high half of the offset: a generator's own offsets do not get there.
                slices[state_place] = slices[state_place] + torch.tensor([0, (index + 1) << 32])
            results.append(operator(*slices))
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _refuse_tangent(ctx: Any, *tangents: Any) -> NoReturn:
    del ctx, tangents
    raise NotImplementedError(_NO_TANGENT.format("q, k, v"))


_vmap_forward, _vmap_backward = _slice_by_slice(_FORWARD), _slice_by_slice(_BACKWARD)


class _Forward(torch.autograd.Function):
    """The forward operator for torch.func, which cannot differentiate what a library registers."""

    forward = staticmethod(_FORWARD.__call__)
    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)
    jvp = staticmethod(_refuse_tangent)
    vmap = staticmethod(_vmap_forward)


class _Backward(torch.autograd.Function):
    """The backward operator for torch.func."""

    forward = staticmethod(_BACKWARD.__call__)
    setup_context = staticmethod(_ignore)
    backward = staticmethod(_refuse_second_derivative)
    jvp = staticmethod(_refuse_tangent)
    vmap = staticmethod(_vmap_backward)


_NO_TANGENT = "{}: forward-mode derivatives are not supported; use reverse mode (backward)"
_NO_SLOPE_GRADIENT = (
    "alibi_slopes: a tensor that requires grad is not supported; pass alibi_slopes.detach()"
)

_LIBRARY.impl("forward", execute_operator, "CompositeExplicitAutograd")
_LIBRARY.impl("backward", execute_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("rng_state", _draw, "CompositeExplicitAutograd")
torch.library.register_fake(draw._name, _fake_draw, lib=_LIBRARY)
torch.library.register_fake(_FORWARD._name, _fake, lib=_LIBRARY)
torch.library.register_fake(_BACKWARD._name, _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(_FORWARD._name, _backward, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd(_BACKWARD._name, _refuse_second_derivative, lib=_LIBRARY)
torch.library.register_vmap(_FORWARD._name, _vmap_forward, lib=_LIBRARY)
torch.library.register_vmap(_BACKWARD._name, _vmap_backward, lib=_LIBRARY)
