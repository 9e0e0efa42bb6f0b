"""The decode tier: few queries on Metal devices, planned by itself, split and merged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import metal_flash_attn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_flash_attn import attention, flash_attn_func, flash_attn_varlen_func, trace
from standin_mps import installed
from torch import Tensor

DEVICES = ("simulator", "standin")


@contextlib.contextmanager
def decoding(device: str, kernel: str = "auto") -> Iterator[None]:
    """Requires that the decode tier serves every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTLFLASHATTN_KERNEL", kernel)
        if device == "simulator":
            patch.setenv("MTLFLASHATTN_DEVICE", "simulator")
        home = installed() if device == "standin" else contextlib.nullcontext()
        with home, trace() as calls:
            yield
    assert {entry.tier for entry in calls.calls} == {"decode"}


def close(got: Tensor, want: Tensor) -> None:
    """Equal but for the roundings of weights and results to the dtype of `got`."""
    tolerance = 4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@given(
    st.integers(1, 9),
    st.integers(128, 700),
    st.sampled_from([(8, 2), (4, 4), (6, 1)]),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=4, derandomize=True)
def test_few_queries(
    device: str, queries: int, keys: int, heads: tuple[int, int], causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    q = torch.randn(1, queries, heads[0], 32, dtype=torch.float16)
    k, v = torch.randn(2, 1, keys, heads[1], 32, dtype=torch.float16)
    want = attention(q.float(), k.float(), v.float(), causal=causal, return_lse=True)
    with decoding(device):
        out, lse = attention(q, k, v, causal=causal, return_lse=True)
    close(out, want[0])
    torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_packed_sequences_are_one_launch(device: str) -> None:
    q = torch.randn(7, 4, 32)
    k, v = torch.randn(2, 400, 2, 32)
    queries = torch.tensor([0, 1, 1, 4, 5], dtype=torch.int32)  # rows 5 and 6 are in none
    keys = torch.tensor([0, 300, 300, 303, 400], dtype=torch.int32)
    arguments = (q, k, v, queries, keys, 3, 300)
    want, want_lse, _ = flash_attn_varlen_func(*arguments, causal=True, return_attn_probs=True)
    with decoding(device):
        out, lse, _ = flash_attn_varlen_func(*arguments, causal=True, return_attn_probs=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    assert out[5:].eq(0).all()
    assert lse[:, 5:].eq(torch.inf).all()


@pytest.mark.parametrize("device", DEVICES)
def test_every_feature_at_once(device: str) -> None:
    q = torch.randn(2, 3, 6, 20)
    k, v = torch.randn(2, 600, 2, 20), torch.randn(2, 600, 2, 28)
    options: dict[str, Any] = {
        "window_size": (500, 7),
        "softcap": 3.0,
        "alibi_slopes": torch.rand(2, 6),
        "sinks": torch.randn(6),
        "mask": torch.rand(2, 1, 3, 600) > 0.3,
        "softmax_scale": -0.2,
        "top_left": True,
        "return_lse": True,
    }
    want = attention(q, k, v, **options)
    with decoding(device, "decode"):
        got = attention(q, k, v, **options)
    for result, expected in zip(got, want, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_the_planner_names_the_tier_and_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.zeros(1, 1, 32, 128), torch.zeros(1, 4096, 8, 128)
    monkeypatch.setenv("MTLFLASHATTN_DEVICE", "simulator")
    assert metal_flash_attn.plan(q, k, k).tier == "decode"
    long = metal_flash_attn.plan(q.expand(1, 33, 32, 128), k, k)
    assert dict(long.reasons)["decode"] == "serves up to 32 queries of a sequence"
    short = metal_flash_attn.plan(q, k[:, :127], k[:, :127])
    assert dict(short.reasons)["decode"] == "gains nothing with fewer than 128 keys"


def test_no_keys_and_no_queries() -> None:
    q = torch.randn(2, 3, 4, 16)
    with decoding("simulator", "decode"):
        nothing = flash_attn_func(q, q[:, :0], q[:, :0], return_attn_probs=True)
        assert nothing[0].eq(0).all()
        assert nothing[1].eq(torch.inf).all()
        assert flash_attn_func(q[:, :0], q, q).shape == (2, 0, 4, 16)


def test_gradients_follow_the_decode_tier() -> None:
    inputs = [torch.randn(1, 2, 4, 16), torch.randn(1, 300, 2, 16), torch.randn(1, 300, 2, 16)]

    def gradients() -> tuple[Tensor, ...]:
        q, k, v = (tensor.clone().requires_grad_() for tensor in inputs)
        return torch.autograd.grad(flash_attn_func(q, k, v).square().sum(), (q, k, v))

    want = gradients()
    with pytest.MonkeyPatch.context() as patch, trace() as calls:
        patch.setenv("MTLFLASHATTN_DEVICE", "simulator")
        got = gradients()
    assert [entry.tier for entry in calls.calls if not entry.backward] == ["decode"]
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
