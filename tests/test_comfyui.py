"""The ComfyUI adapter, called as ComfyUI calls.

`call` and `by_torch` behave like wrap_attn and attention_pytorch of its ldm/modules/attention.py.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from metal_flash_attn import trace
from metal_flash_attn.integrations import comfyui as adapter
from torch import Tensor

HEADS, LENGTH, DIM = 4, 9, 8


def by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """What ComfyUI's attention_pytorch computes."""
    del attn_precision
    if not skip_reshape:
        q, k, v = (t.view(t.shape[0], -1, heads, t.shape[-1] // heads) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        while mask.dim() < 4:
            mask = mask.unsqueeze(0 if mask.dim() == 2 else 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=kwargs.get("scale")
    )
    if skip_output_reshape:
        return out
    return out.transpose(1, 2).reshape(q.shape[0], -1, heads * v.shape[-1])


def call(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """How ComfyUI's wrapper calls: the override of the model first."""
    options = kwargs.get("transformer_options") or {}
    kwargs["_inside_attn_wrapper"] = True
    override = options.get("optimized_attention_override")
    if override is not None:
        return override(function, *args, **kwargs)  # type: ignore[no-any-return]
    return function(*args, **kwargs)


class Model:
    """The part of a ModelPatcher that counts."""

    def __init__(self) -> None:
        self.model_options: dict[str, Any] = {"transformer_options": {"other": 1}}


def flat() -> list[Tensor]:
    return [torch.randn(2, LENGTH, HEADS * DIM) for _ in range(3)]


def apart() -> list[Tensor]:
    return [torch.randn(2, HEADS, LENGTH, DIM) for _ in range(3)]


FORMS: dict[str, tuple[Callable[[], list[Tensor]], dict[str, Any]]] = {
    "flat": (flat, {}),
    "heads apart": (apart, {"skip_reshape": True}),
    "heads stay apart": (apart, {"skip_reshape": True, "skip_output_reshape": True}),
    "flat to heads apart": (flat, {"skip_output_reshape": True}),
    "mask 2-d": (flat, {"mask": torch.rand(LENGTH, LENGTH) < 0.7}),
    "mask 3-d": (flat, {"mask": torch.rand(2, 1, LENGTH) < 0.7}),
    "mask 4-d": (apart, {"mask": torch.rand(2, 1, 1, LENGTH) < 0.7, "skip_reshape": True}),
    "additive mask": (flat, {"mask": torch.randn(2, LENGTH, LENGTH)}),
    "precision": (flat, {"attn_precision": torch.float32, "low_precision_attention": False}),
    "scale": (flat, {"scale": 0.2}),
}


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_forms(name: str) -> None:
    make, options = FORMS[name]
    q, k, v = make()
    model = Model()
    shared = model.model_options["transformer_options"]
    adapter.override(model)
    assert "optimized_attention_override" not in shared, "clones share this dictionary"
    assert model.model_options["transformer_options"]["other"] == 1
    expected = by_torch(q, k, v, HEADS, **options)
    with trace() as calls:
        got = call(by_torch, q, k, v, HEADS, **options, **model.model_options)
    assert len(calls.calls) == 1
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected)
    if set(options) <= {"mask"}:
        positional = call(by_torch, q, k, v, HEADS, options.get("mask"), **model.model_options)
        assert torch.equal(positional, got)


def test_what_is_not_served_goes_to_comfyuis_function() -> None:
    options: dict[str, Any] = {}
    adapter.override(options)
    q, k, v = flat()
    with trace() as calls:
        call(by_torch, q.double(), k.double(), v.double(), HEADS, **options)
        call(by_torch, q, k, v, HEADS, unheard_of=1, **options)
        call(by_torch, q.requires_grad_(), k, v, HEADS, **options).sum().backward()
    assert not calls.calls
    assert q.grad is not None


def test_registration_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: dict[str, Any] = {}
    module = types.ModuleType("comfy.ldm.modules.attention")
    module.register_attention_function = functions.__setitem__  # type: ignore[attr-defined]
    parents = ["comfy", "comfy.ldm", "comfy.ldm.modules"]
    for name in parents:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["comfy.ldm.modules"].attention = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", module)
    assert adapter.register() == adapter.NAME
    q, k, v = flat()
    torch.testing.assert_close(functions[adapter.NAME](q, k, v, HEADS), by_torch(q, k, v, HEADS))


USE_FLASH_ATTENTION = """
import torch
from flash_attn import flash_attn_func
from metal_flash_attn import trace

@torch.library.custom_op("flash_attention::flash_attn", mutates_args=())
def wrapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0,
            causal: bool = False) -> torch.Tensor:
    return flash_attn_func(q, k, v, dropout_p=dropout_p, causal=causal)

@wrapped.register_fake
def fake(q, k, v, dropout_p=0.0, causal=False):
    return q.new_empty(q.shape)

q, k, v = (torch.randn(2, 4, 9, 8).transpose(1, 2) for _ in range(3))
with trace() as calls:
    out = wrapped(q, k, v)
expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
torch.testing.assert_close(out.transpose(1, 2), expected)
assert len(calls.calls) == 1
"""


def test_use_flash_attention_works_through_the_shim(child: Any) -> None:
    """The flag makes ComfyUI wrap flash_attn_func into an operator, as this does."""
    child(USE_FLASH_ATTENTION, MTLFLASHATTN_SHIM="on")
