"""`torch.ops.mtlflashattn.sdpa_training`: what compiled graphs hold of calls with gradients.

It is `mtlflashattn::forward` with top-left alignment, and never raises where stock torch would not:
whichever pass fails here is computed by torch's own function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metal_flash_attn import _ops

from ._operator import STOCK, warn_of_fallback

# Tokens come before heads, as in the functions of this package.
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale"
)
# A flag on the CPU says that stock torch computed the forward pass.
_SCHEMAS = (
    f"sdpa_training({_ARGUMENTS}) -> (Tensor out, Tensor lse, Tensor failed)",
    f"""sdpa_training_backward(
        Tensor grad_out, Tensor out, Tensor lse, Tensor failed, {_ARGUMENTS}, bool[3] wanted
    ) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)""",
)

_LIBRARY = torch.library.Library("mtlflashattn", "FRAGMENT")
for _schema in _SCHEMAS:
    _LIBRARY.define(" ".join(_schema.split()), tags=(torch.Tag.pt2_compliant_tag,))
TRAINING = torch.ops.mtlflashattn.sdpa_training.default
_BACKWARD = torch.ops.mtlflashattn.sdpa_training_backward.default
_OWN_FORWARD = torch.ops.mtlflashattn.forward.default
_OWN_BACKWARD = torch.ops.mtlflashattn.backward.default


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Any, ...]:
    """The arguments of `mtlflashattn::forward`."""
    right = 0 if is_causal else -1
    rest = (None, attn_mask, None, True, 0.0, None)
    return (query, key, value, None, None, 0, 0, scale, is_causal, -1, right, 0.0, *rest)


def _stock(*arguments: Any) -> Tensor:
    *inputs, attn_mask, is_causal, scale = arguments
    q, k, v = (tensor.transpose(1, 2) for tensor in inputs)
    out: Tensor = STOCK(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


@torch.compiler.disable
def _execute(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    try:
        out, lse = _OWN_FORWARD(*_call(*arguments))
        return out, lse, torch.zeros((), dtype=torch.bool)
    except Exception as error:  # Whatever it is, torch must serve.
        warn_of_fallback(error)
    out, lse, failed = _fake(*arguments)
    return out.copy_(_stock(*arguments)), lse.zero_(), failed.fill_(True)


@torch.compiler.disable
def _execute_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, failed: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *arguments, wanted = rest
    if not failed:
        call = (grad_out, None, out, lse, *_call(*arguments))
        try:
            return tuple(_OWN_BACKWARD(*call, [*wanted, False, False])[:3])
        except Exception as error:  # As above.
            warn_of_fallback(error)
    gradients = _fake_backward(grad_out, out, lse, failed, *rest)
    for gradient, stock in zip(gradients, _stock_gradients(grad_out, *arguments), strict=True):
        if gradient.shape == stock.shape:
            gradient.copy_(stock)
    return gradients


def _stock_gradients(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    excluded, keys = torch._C._SetExcludeDispatchKeyGuard, torch._C.DispatchKey
    # An operator runs below autograd, which is wanted here.
    with (
        torch.enable_grad(),
        excluded(keys.AutogradFunctionality, False),
        excluded(keys.ADInplaceOrView, False),
    ):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        return torch.autograd.grad(_stock(*leaves, *rest), leaves, grad_out)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    del rest
    return *_ops._fake(query, key, value), torch.empty((), dtype=torch.bool, device="cpu")


def _fake_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, failed: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    del grad_out, out, lse, failed
    query, key, value, *_, wanted = rest
    wanted = [*wanted, False, False]
    return _ops.allocate_gradients(query, key, value, None, None, wanted)[:3]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, is_causal, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.rest = (is_causal, scale)


def _backward(ctx: Any, grad_out: Tensor, *_others: Any) -> tuple[Any, ...]:
    query, key, value, attn_mask, *results = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    arguments = (query, key, value, attn_mask, *ctx.rest)
    gradients = _BACKWARD(grad_out, *results, *arguments, wanted)
    own = (g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True))
    return *own, None, None, None


_LIBRARY.impl("sdpa_training", _execute, "CompositeExplicitAutograd")
_LIBRARY.impl("sdpa_training_backward", _execute_backward, "CompositeExplicitAutograd")
torch.library.register_fake(TRAINING._name, _fake, lib=_LIBRARY)
torch.library.register_fake(_BACKWARD._name, _fake_backward, lib=_LIBRARY)
torch.library.register_autograd(TRAINING._name, _backward, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd(_BACKWARD._name, _ops._refuse_second_derivative, lib=_LIBRARY)
