"""The tensorops tiers from the public functions on: forced on the simulator, and on an M5.

What they compute under every lane layout is tested beside the simulator, in Rust.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from metal_flash_attn import (
    _native,
    attention,
    flash_attn_func,
    flash_attn_varlen_func,
    plan,
    trace,
)
from reference import Arithmetic, Rules
from reference import attention as exact_attention
from standin_mps import installed
from torch import Tensor

M5 = {"gpu": "Apple M5 Max", "macos": "26.2"}
TIERS = ("tensorops", "tensorops-staged")
DTYPES = {"v2": torch.float16, "v2_bf16": torch.bfloat16, "v2_fp32": torch.float32}


def problem(
    length: int = 37, dim: int = 16, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, length, heads, dim).to(dtype) for heads in (4, 2, 2))
    return q, k, v


def served(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of `call`, and the tiers that served."""
    with trace() as calls:
        result = call()
    return result, [entry.tier for entry in calls.calls]


def check(result: Tensor, q: Tensor, k: Tensor, v: Tensor, **rules: Any) -> None:
    arithmetic = Arithmetic(is_metal=True, weights=q.dtype)
    exact_attention(q, k, v, Rules(**rules), arithmetic).check(result)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("MTLFLASHATTN_DEVICE", "simulator")
    _native._forget_kernels()
    yield monkeypatch
    _native._forget_kernels()


@pytest.mark.parametrize("name", DTYPES)
def test_the_names_of_v2_ask_for_a_type(simulator: pytest.MonkeyPatch, name: str) -> None:
    simulator.setenv("MTLFLASHATTN_KERNEL", name)
    q, k, v = problem(dtype=DTYPES[name])
    out, tiers = served(lambda: flash_attn_func(q, k, v, causal=True))
    assert tiers == ["tensorops"]
    check(out, q, k, v, causal=True)
    other = torch.float32 if name == "v2" else torch.float16
    found = str(other).removeprefix("torch.")
    with pytest.raises(NotImplementedError, match=rf"{name} for this call .*these are {found}"):
        flash_attn_func(q.to(other), k.to(other), v.to(other))
    simulator.setenv("MTLFLASHATTN_KERNEL", "v2_dtype")
    assert plan(q, k, v).tier == "tensorops"


def test_without_preuse_weights_go_through_threadgroup_memory(
    simulator: pytest.MonkeyPatch,
) -> None:
    simulator.setenv("MTLFLASHATTN_KERNEL", "v2")
    simulator.setenv("MTLFLASHATTN_V2_PREUSE", "0")
    q, k, v = problem()
    out, tiers = served(lambda: flash_attn_func(q, k, v))
    assert tiers == ["tensorops-staged"]
    check(out, q, k, v)


@pytest.mark.parametrize("tier", TIERS)
def test_a_forced_tier_serves_what_lies_anywhere(simulator: pytest.MonkeyPatch, tier: str) -> None:
    simulator.setenv("MTLFLASHATTN_KERNEL", tier)
    # Rows of an odd width: what matmul2d itself would have to read unaligned.
    wide = torch.randn(1, 37, 4 * 16 + 3).half()
    q = wide[..., : 4 * 16].unflatten(-1, (4, 16))
    k = v = wide[..., : 2 * 16].unflatten(-1, (2, 16))
    bias = torch.randn(1, 4, 37, 37)
    out, tiers = served(lambda: attention(q, k, v, bias=bias))
    assert tiers == [tier]
    check(out, q, k, v, bias=bias)


def test_short_and_long_sequences_are_one_launch(simulator: pytest.MonkeyPatch) -> None:
    simulator.setenv("MTLFLASHATTN_KERNEL", "tensorops")
    q, k, v = (torch.randn(60, heads, 16).half() for heads in (4, 2, 2))
    # Less than a block of keys, none, a block, and more.
    cu = torch.tensor([0, 5, 5, 37, 60], dtype=torch.int32)
    out = flash_attn_varlen_func(q, k, v, cu, cu, 32, 32, causal=True)
    for start, end in ((0, 5), (5, 37), (37, 60)):
        rows = slice(start, end)
        check(out[None, rows], q[None, rows], k[None, rows], v[None, rows], causal=True)


def test_only_what_is_forced_makes_the_simulator_an_m5(simulator: pytest.MonkeyPatch) -> None:
    q, k, v = problem()
    assert plan(q, k, v).tier == "simdgroup"
    assert dict(plan(q, k, v).reasons)["tensorops"] == "needs an M5 or later; this is Apple M1"
    simulator.setenv("MTLFLASHATTN_KERNEL", "v2r")
    assert plan(q, k, v).tier == "tensorops"


# As torch's MPS half would serve them.


def test_an_m5_is_served_by_tensorops() -> None:
    q, k, v = problem()
    with installed(**M5) as device:
        out, tiers = served(lambda: flash_attn_func(q, k, v, causal=True))
        assert dict(plan(q, k, v).reasons)["simdgroup"].startswith("tensorops comes before it")
        # Short float32 calls are left to the next tier.
        single = [tensor.float() for tensor in (q, k, v)]
        reason = dict(plan(*single).reasons)["tensorops"]
    assert tiers == ["tensorops"]
    check(out, q, k, v, causal=True)
    launch = device.dispatches[-1]
    assert launch.group_size[0] == 32
    assert launch.group_size[1] > 1
    assert "MTLFLASHATTN_V2_FP32_MIN_SEQ keeps it for float32 calls from 2048 on" in reason


@pytest.mark.parametrize(
    "faults",
    [
        {"refuses_source": lambda text: "tensor_inline" in text},
        {"is_wrong": lambda text: "tensor_inline" in text},
    ],
    ids=["refused", "wrong"],
)
def test_a_broken_matmul2d_leaves_simdgroup(faults: dict[str, Callable[[str], bool]]) -> None:
    q, k, v = problem()
    with installed(**M5, **faults):
        with pytest.warns(RuntimeWarning, match="tier failed") as seen:
            out, tiers = served(lambda: flash_attn_func(q, k, v))
        assert [str(warning.message).split(" tier")[0] for warning in seen] == [
            "the tensorops",
            "the tensorops-staged",
        ]
        assert tiers == ["simdgroup"]
        check(out, q, k, v)
        assert plan(q, k, v).tier == "simdgroup"
        # Silent from now on.
        check(flash_attn_func(q, k, v), q, k, v)


def test_a_broken_direct_kernel_leaves_the_staged_one() -> None:
    def refuses(text: str) -> bool:
        return "#define STAGED 0" in text and "tensor_inline" in text

    q, k, v = problem()
    message = "the tensorops-staged tier serves instead"
    with (
        installed(**M5, refuses_source=refuses),
        pytest.warns(RuntimeWarning, match=message),
    ):
        out, tiers = served(lambda: flash_attn_func(q, k, v))
    assert tiers == ["tensorops-staged"]
    check(out, q, k, v)
