"""What torch does to calls over a cache: compile, fake tensors, operator checks, inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from metal_flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor
from torch._subclasses import FakeTensorMode

ATTEND = torch.ops.mtlflashattn.attend_cached.default
APPEND = torch.ops.mtlflashattn.append_and_attend.default

# From `cache_len` on.
NUMBERS = (None, 0, None, None, True, -1, -1, 0.0, False, True, 3)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(2, 2, 4, 16),
        "k_cache": torch.randn(4, 16, 2, 16),
        "v_cache": torch.randn(4, 16, 2, 16),
        "k": torch.randn(2, 2, 2, 16),
        "v": torch.randn(2, 2, 2, 16),
        "rotary_cos": torch.randn(32, 8),
        "rotary_sin": torch.randn(32, 8),
        "cache_seqlens": torch.tensor([20, 3], dtype=torch.int32),
        "block_table": torch.tensor([[3, 1], [0, 2]], dtype=torch.int32),
    }


def operator_arguments(append: bool) -> tuple[Any, ...]:
    t = tensors()
    new = (t["k"], t["v"], t["rotary_cos"], t["rotary_sin"]) if append else ()
    rest = (t["cache_seqlens"], None, None, t["block_table"], None, None, None, None)
    return (t["q"], t["k_cache"], t["v_cache"], *new, *rest, *NUMBERS)


@pytest.mark.parametrize("append", [False, True])
def test_operators_keep_torchs_rules(append: bool) -> None:
    torch.library.opcheck(APPEND if append else ATTEND, operator_arguments(append))


def step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor,
) -> tuple[Tensor, ...]:
    """Appends to pages, reads them again, and reads them as the keys of packed queries."""
    out, lse = flash_attn_with_kvcache(
        q + 1,
        k_cache,
        v_cache,
        k * 2,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        block_table=block_table,
        causal=True,
        return_softmax_lse=True,
    )
    again = flash_attn_with_kvcache(
        out, k_cache, v_cache, cache_seqlens=cache_seqlens + 2, block_table=block_table
    )
    whole = flash_attn_with_kvcache(q, k_cache[:2], v_cache[:2], cache_seqlens=7)
    cu = torch.arange(0, 5, 2, dtype=torch.int32, device=q.device)
    packed = flash_attn_varlen_func(
        again.flatten(0, 1), k_cache, v_cache, cu, cu, 2, 2, block_table=block_table
    )
    return out, lse, again, whole, packed


@pytest.mark.parametrize(("backend", "dynamic"), [("inductor", False), ("aot_eager", True)])
def test_compiled_calls_write_and_give_the_same(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    expected, given = tensors(), tensors()
    with torch.no_grad():
        want, got = step(**expected), compiled(**given)
    for one, other in zip(want, got, strict=True):
        torch.testing.assert_close(one, other)
        assert one.stride() == other.stride()
    for name, tensor in expected.items():
        assert torch.equal(tensor, given[name]), name
    assert not torch.equal(given["k_cache"], tensors()["k_cache"])


def test_fake_tensors_get_the_shapes_of_real_ones() -> None:
    real = step(**tensors())
    with FakeTensorMode() as mode:
        fake = step(**{name: mode.from_tensor(tensor) for name, tensor in tensors().items()})
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_meta_tensors() -> None:
    meta = step(**{name: tensor.to("meta") for name, tensor in tensors().items()})[0]
    assert meta.device.type == "meta"
    assert meta.shape == (2, 2, 4, 16)


def test_gradients_are_refused_while_compiling() -> None:
    arguments = {**tensors(), "q": tensors()["q"].requires_grad_()}
    with pytest.raises(
        Exception, match="q: a tensor that requires grad, in attention over a cache"
    ):
        torch.compile(step, fullgraph=True, backend="aot_eager")(**arguments)
    with torch.no_grad():
        torch.compile(step, fullgraph=True, backend="aot_eager")(**arguments)


def test_a_graph_that_reads_the_cache_after_the_call_reads_what_was_written() -> None:
    def write_and_read(t: dict[str, Tensor]) -> Tensor:
        flash_attn_with_kvcache(
            t["q"],
            t["k_cache"],
            t["v_cache"],
            t["k"],
            t["v"],
            cache_seqlens=t["cache_seqlens"],
            block_table=t["block_table"],
        )
        return t["v_cache"].sum() * 2

    expected = write_and_read(tensors())
    compiled = torch.compile(write_and_read, fullgraph=True)(tensors())
    torch.testing.assert_close(compiled, expected)
