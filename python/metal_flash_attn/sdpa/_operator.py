"""`torch.ops.mtlflashattn.sdpa`: what compiled graphs hold of a served call."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor

from metal_flash_attn import _native

_SCHEMA = (
    "sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float? scale, str out_layout) -> Tensor"
)

_LIBRARY = torch.library.Library("mtlflashattn", "FRAGMENT")
_LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
SDPA = torch.ops.mtlflashattn.sdpa.default

STOCK = torch._C._nn.scaled_dot_product_attention
"""torch's own, whatever `torch.nn.functional` holds."""


class _Warned:
    """Whether the one warning was given."""

    already = False


def warn_of_fallback(error: Exception) -> None:
    """Warns once in a process that stock torch had to serve a call."""
    if not _Warned.already:
        _Warned.already = True
        warnings.warn(
            "metal_flash_attn.sdpa: torch's own scaled_dot_product_attention serves a call that "
            f"failed here with {type(error).__name__}: {error}. It will do so whenever a call "
            "fails; this warning is not repeated.",
            RuntimeWarning,
            stacklevel=4,
        )


@torch.compiler.disable
def _execute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    out_layout: str,
) -> Tensor:
    """The operator on tensors with memory: never raises where stock torch would not."""
    try:
        return _native.sdpa(query, key, value, attn_mask, is_causal, scale, out_layout)
    except Exception as error:  # Whatever it is, torch must serve.
        warn_of_fallback(error)
    out: Tensor = STOCK(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=True)
    return _empty_out(query, value, out_layout).copy_(out)


def _empty_out(query: Tensor, value: Tensor, out_layout: str) -> Tensor:
    """What `heads_first_out` in crates/python/src/execute.rs allocates."""
    batch, heads, query_len, _ = query.shape
    value_dim = value.shape[-1]
    if out_layout == "like_query":
        out = torch.empty_like(query)
        if value_dim == 1 or out.stride(-1) == 1:
            return out
    if out_layout == "tokens_first":
        return query.new_empty((batch, query_len, heads, value_dim)).transpose(1, 2)
    return query.new_empty((batch, heads, query_len, value_dim))


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    out_layout: str,
) -> Tensor:
    del key, attn_mask, is_causal, scale
    return _empty_out(query, value, out_layout)


def _refuse_gradient(*_arguments: Any) -> NoReturn:
    """Results must not come detached; calls with gradients take `attention`, not this operator."""
    raise NotImplementedError(
        "query, key, value: a tensor that requires grad is not supported by "
        "torch.ops.mtlflashattn.sdpa; call torch.nn.functional.scaled_dot_product_attention"
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> NoReturn:
    _refuse_gradient(ctx, inputs, output)


_LIBRARY.impl("sdpa", _execute, "CompositeExplicitAutograd")
torch.library.register_fake(SDPA._name, _fake, lib=_LIBRARY)
torch.library.register_autograd(
    SDPA._name, _refuse_gradient, setup_context=_setup_context, lib=_LIBRARY
)
