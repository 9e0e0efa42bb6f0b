"""Gradients by Metal kernels: the ways to them, first uses, kernels that fail.

On the simulator, and through a stand-in for torch's MPS half (test_probes.py). All problems are
served by the same few kernels, which are compiled once. What they compute is held against float64
here and, on random problems, in test_backward.py.
"""

# Calls with lists of tensors, whose length mypy does not know.
# mypy: disable-error-code="call-arg, misc, arg-type, type-var"

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from metal_flash_attn import (
    _native,
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    plan,
    trace,
)
from metal_flash_attn.shim.flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
)
from reference import Arithmetic, Rules, gradients, packed_gradients
from standin_mps import faults_of, installed
from test_backward import wants_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HALF = Arithmetic(is_metal=True, weights=torch.float16)
# Launches of one probe, and kernels of a backward pass.
PROBE, KERNELS = 3, 3
Q, K, V = (torch.randn(2, 21, heads, 16).half() for heads in (4, 2, 2))
D_OUT = torch.randn(2, 21, 4, 16).half()
CU = torch.tensor([0, 3, 3, 19], dtype=torch.int32)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MTLFLASHATTN_DEVICE", "simulator")
    yield
    _native._forget_kernels()


def differentiate(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients that Metal kernels must compute."""
    leaves = wants_gradients(*inputs)
    with trace() as calls:
        results: tuple[Tensor, ...] = torch.autograd.grad(function(*leaves), leaves, D_OUT)
    assert {entry.tier for entry in calls.calls if entry.backward} == {"simdgroup"}
    return results


def causal(*tensors: Any) -> Tensor:
    result: Tensor = flash_attn_func(*tensors, causal=True)
    return result


def checked(*results: Tensor) -> None:
    """Requires the gradients of `causal(Q, K, V)`."""
    exact = gradients(Q, K, V, D_OUT, None, Rules(causal=True), HALF)
    exact.check(**dict(zip("qkv", results, strict=True)))


# Ways.


@pytest.mark.usefixtures("simulator")
def test_every_way_leads_to_the_same_gradients() -> None:
    expected = differentiate(causal, Q, K, V)
    checked(*expected)

    def same(results: tuple[Tensor, ...]) -> bool:
        return all(torch.equal(one, two) for one, two in zip(expected, results, strict=True))

    compiled = torch.compile(causal, fullgraph=True, backend="aot_eager")
    assert same(differentiate(compiled, Q, K, V))
    assert same(differentiate(lambda *t: checkpoint(causal, *t, use_reentrant=False), Q, K, V))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(differentiate(causal, Q, K, V))
    d_q, d_kv = differentiate(
        lambda q, kv: flash_attn_kvpacked_func(q, kv, causal=True), Q, torch.stack([K, V], 2)
    )
    assert same((d_q, *d_kv.unbind(2)))
    # Strides that no kernel is compiled for: the same values in wider rows and other orders.
    wide = [torch.nn.functional.pad(t, (0, 8))[..., :16] for t in (Q, K, V)]
    assert same(differentiate(causal, *wide))
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (Q, K, V)]
    assert same(differentiate(causal, *heads_first))


@pytest.mark.usefixtures("simulator")
def test_packed_forms_share_the_kernels() -> None:
    qkv = torch.stack([Q[:, :, :2], K, V], 2)

    def loss(result: Tensor) -> Tensor:
        return result.square().sum()

    (leaf,) = wants_gradients(qkv)
    (packed,) = torch.autograd.grad(loss(flash_attn_qkvpacked_func(leaf, causal=True)), leaf)
    leaves = wants_gradients(*qkv.unbind(2))
    apart = torch.autograd.grad(loss(flash_attn_func(*leaves, causal=True)), leaves)
    assert packed.is_contiguous()
    assert all(torch.equal(one, two) for one, two in zip(packed.unbind(2), apart, strict=True))


@pytest.mark.usefixtures("simulator")
def test_gradients_in_place() -> None:
    out, lse, *_ = _flash_attn_forward(Q, K, V, 0.0, 0.25, True, -1, -1, 0.0, None, False)
    # Views of wider rows: what lies beside them stays.
    wholes = [torch.full((*t.shape[:-1], 24), 7.0, dtype=t.dtype) for t in (Q, K, V)]
    d_q, d_k, d_v = (whole[..., :16] for whole in wholes)
    rules = (0.0, 0.25, True, -1, -1, 0.0, None, False)
    with trace() as calls:
        _flash_attn_backward(D_OUT, Q, K, V, out, lse, d_q, d_k, d_v, *rules)
    assert [entry.tier for entry in calls.calls] == ["simdgroup"]
    checked(d_q, d_k, d_v)
    assert all(bool((whole[..., 16:] == 7).all()) for whole in wholes)
    # Rows whose LSE is infinite, of either sign, have no gradient.
    lse[:, :, 4], lse[:, :, 5] = torch.inf, -torch.inf
    _flash_attn_backward(D_OUT, Q, K, V, out, lse, d_q, d_k, d_v, *rules)
    assert not d_q[:, 4:6].any()
    assert all(bool(t.isfinite().all()) for t in (d_q, d_k, d_v))


@pytest.mark.usefixtures("simulator")
def test_rows_of_no_sequence_have_no_gradient() -> None:
    d_q, d_k, d_v = differentiate(
        lambda q, k, v: flash_attn_varlen_func(q, k, v, CU, CU, 16, 16, causal=True).expand(
            2, -1, -1, -1
        ),
        Q[0],
        K[0],
        V[0],
    )
    d_out = D_OUT.sum(0)
    cu = CU.tolist()
    exact = packed_gradients(Q[0], K[0], V[0], d_out, None, cu, cu, Rules(causal=True), HALF)
    exact.check(q=d_q, k=d_k, v=d_v)
    assert not any(bool(t[19:].any()) for t in (d_q, d_k, d_v))
    (leaf,) = wants_gradients(torch.stack([Q[0, :, :2], K[0], V[0]], 1))
    flash_attn_varlen_qkvpacked_func(leaf, CU, 16, causal=True).sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad[19:].any()


def test_only_wanted_gradients_are_computed() -> None:
    names = {"q": "attention_backward_query", "v": "attention_backward_keys"}
    with installed() as device:
        for wanted, kernel in names.items():
            leaves = [
                t.clone().requires_grad_(name == wanted)
                for name, t in zip("qkv", (Q, K, V), strict=True)
            ]
            out = causal(*leaves)
            del device.dispatches[:]
            out.backward(D_OUT)
            kernels = {dispatch.kernel for dispatch in device.dispatches}
            assert kernels == {"attention_backward_delta", kernel}
            exact = gradients(Q, K, V, D_OUT, None, Rules(causal=True), HALF)
            exact.check(**{wanted: leaves["qkv".index(wanted)].grad})


@pytest.mark.usefixtures("simulator")
def test_what_no_kernel_computes() -> None:
    sinks = torch.tensor([-torch.inf, 0.5, 1.0, -1.0])
    rules = Rules(causal=True, sinks=sinks)
    exact = gradients(Q, K, V, D_OUT, None, rules, HALF)
    d_q, d_k, d_v, d_sinks = differentiate(
        lambda q, k, v, sinks: attention(q, k, v, causal=True, sinks=sinks), Q, K, V, sinks
    )
    exact.check(q=d_q, k=d_k, v=d_v, sinks=d_sinks)
    bias = torch.zeros(21, 21, requires_grad=True)
    chosen = plan(Q, K, V, bias=bias, backward=True)
    assert (chosen.tile, chosen.tile_source) == (None, None)
    assert chosen.tier == "torch"
    assert dict(chosen.reasons)["simdgroup"] == "computes no gradient of a bias"
    served = plan(Q, K, V, bias=bias.detach(), backward=True)
    assert (served.tier, served.tile_source) == ("simdgroup", "default")
    kernels = [tile.partition(": ")[0] for tile in str(served.tile).split("; ")]
    assert kernels == ["dq", "dk and dv"]


# First uses.


def is_query(text: str) -> bool:
    return "attention_backward_query" in text


def attend(tier: str) -> None:
    """A call whose gradients come from `tier` and are right."""
    leaves = wants_gradients(Q, K, V)
    with trace() as calls:
        results = torch.autograd.grad(causal(*leaves), leaves, D_OUT)
    assert [(entry.tier, entry.backward) for entry in calls.calls] == [
        ("simdgroup", False),
        (tier, True),
    ]
    checked(*results)


def test_each_kernel_proves_itself_once_on_a_machine() -> None:
    with installed() as device:
        attend("simdgroup")
        # The forward kernel and those of the backward pass.
        every = 1 + KERNELS
        assert [len(device.compiled), len(device.dispatches)] == [every, every * (PROBE + 1)]
        attend("simdgroup")
        assert [len(device.compiled), len(device.dispatches)] == [every, every * (PROBE + 2)]
        _native._forget_kernels()
        attend("simdgroup")
        assert [len(device.compiled), len(device.dispatches)] == [2 * every, every * (PROBE + 3)]
        known = _native._probes()
        assert known is not None
        tiles = [verdict["tile"] for verdict in known["verdicts"] if verdict["proved"]]
        words = ("backward, delta: ", "backward, dq: ", "backward, dk and dv: ")
        assert all(any(tile.startswith(word) for tile in tiles) for word in words)
        assert len(tiles) == every


FAULTS = faults_of(is_query, "query")


@pytest.mark.parametrize("message", FAULTS)
def test_a_kernel_that_failed_leaves_gradients_to_torch(message: str) -> None:
    with installed(**FAULTS[message]):
        words = f"simdgroup tier failed for gradients of float16.*torch tier serves.*{message}"
        with pytest.warns(RuntimeWarning, match=words) as seen:
            attend("torch")
        assert len(seen) == 1
        attend("torch")
        chosen = plan(Q, K, V, causal=True, backward=True)
        assert chosen.tier == "torch"
        assert "MTLFLASHATTN_PROBE=force" in dict(chosen.reasons)["simdgroup"]
        # The forward pass has its own verdict.
        assert plan(Q, K, V, causal=True).tier == "simdgroup"
    # Later processes know it, and say nothing.
    with installed() as device:
        assert plan(Q, K, V, causal=True, backward=True).tier == "torch"
        attend("torch")
        assert not any(is_query(text) for text in device.compiled)


def test_a_forced_probe_gives_another_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(is_wrong=is_query) as device:
        with pytest.warns(RuntimeWarning, match="results are off"):
            attend("torch")
        device.is_wrong = lambda _: False
        monkeypatch.setenv("MTLFLASHATTN_PROBE", "force")
        attend("simdgroup")
        monkeypatch.setenv("MTLFLASHATTN_PROBE", "on")
        attend("simdgroup")


def test_short_memory_concerns_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLFLASHATTN_PROBE", "off")
    with installed(is_short_of_memory=is_query) as device:
        with pytest.warns(RuntimeWarning, match="out of memory"):
            attend("torch")
        device.is_short_of_memory = lambda _: False
        attend("simdgroup")


def test_control_c_during_a_probe_is_no_verdict() -> None:
    def interrupt(text: str) -> bool:
        if is_query(text):
            raise KeyboardInterrupt
        return False

    with installed(is_wrong=interrupt) as device:
        with pytest.raises(KeyboardInterrupt):
            attend("simdgroup")
        device.is_wrong = lambda _: False
        attend("simdgroup")
