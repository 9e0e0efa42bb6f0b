"""Diffusion transformers of diffusers through the adapter, and through the flash_attn shim."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from metal_flash_attn import trace
from metal_flash_attn.integrations import diffusers as adapter
from torch import Tensor


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    yield
    adapter.unregister()


def flux() -> tuple[Any, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 32),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(6, 3),
        "timestep": torch.tensor([1.0, 2.0]),
    }


def wan() -> tuple[Any, dict[str, Any]]:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
    }


def outputs(build: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    model, inputs = build()
    model = model.eval().to(dtype)
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        return model(**cast, return_dict=False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [flux, wan])
def test_diffusion_transformers_give_the_same(build: Any) -> None:
    expected = outputs(build)
    assert adapter.register()
    assert not adapter.register()
    with trace() as calls:
        got = outputs(build)
    assert sum(entry.calls for entry in calls.calls) >= 2
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert adapter.unregister()
    assert not adapter.unregister()
    with trace() as calls:
        outputs(build)
    assert not calls.calls


def test_on_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs(flux)
    adapter.register()
    monkeypatch.setenv("MTLFLASHATTN_DEVICE", "simulator")
    with trace() as calls:
        got = outputs(flux)
    assert {entry.tier for entry in calls.calls} == {"simdgroup"}
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


MASKS = {
    "none": None,
    "keys": torch.rand(2, 7) < 0.7,
    "4-d": torch.rand(2, 1, 5, 7) < 0.7,
    "additive": torch.randn(2, 4, 5, 7),
    "additive over keys": torch.randn(2, 7),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    mask = MASKS[name]
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    options: dict[str, Any] = {"attn_mask": mask, "scale": 0.4, "enable_gqa": True}
    expected = dispatch_attention_fn(q, k, v, **options)
    adapter.register()
    with trace() as calls:
        got = dispatch_attention_fn(q, k, v, **options)
    assert calls.calls
    torch.testing.assert_close(got, expected)


def test_what_is_not_served_is_handed_on() -> None:
    adapter.register()
    q = torch.randn(1, 5, 2, 8)
    mask = torch.ones(5, 5).bool()
    with trace() as calls:
        dispatch_attention_fn(q.double(), q.double(), q.double())
        dispatch_attention_fn(q, q, q, dropout_p=0.5)
        dispatch_attention_fn(q.clone().requires_grad_(), q, q).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            assert dispatch_attention_fn(q, q, q).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="attn_mask should not be set"):
            dispatch_attention_fn(q, q, q, attn_mask=mask, is_causal=True)
        with pytest.raises(ValueError, match="return_lse"):
            dispatch_attention_fn(q, q, q, attention_kwargs={"return_lse": True})
    assert not calls.calls


FLASH = """
import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from metal_flash_attn import trace

q, k, v = torch.randn(3, 2, 6, 4, 8)
keep = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
native = dispatch_attention_fn(q, k, v, scale=0.3), dispatch_attention_fn(q, k, v, attn_mask=keep)
with trace() as calls:
    with attention_backend("flash"):
        flash = dispatch_attention_fn(q, k, v, scale=0.3)
    with attention_backend("flash_varlen"):
        varlen = dispatch_attention_fn(q, k, v, attn_mask=keep)
assert sum(entry.calls for entry in calls.calls) == 2, calls.summary()
torch.testing.assert_close(flash, native[0])
torch.testing.assert_close(varlen, native[1])
"""


def test_the_flash_backends_work_through_the_shim(child: Any) -> None:
    child(FLASH, MTLFLASHATTN_SHIM="on")
