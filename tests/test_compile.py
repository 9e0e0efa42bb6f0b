"""What torch does to calls: compile, export, trace, fake tensors, transforms, subclasses, modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from metal_flash_attn import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    trace,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

OPERATOR = torch.ops.mtlflashattn.forward.default

CU = torch.tensor([0, 3, 3, 11], dtype=torch.int32)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(2, 9, 4, 16), torch.randn(2, 12, 2, 16), torch.randn(2, 12, 2, 16)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def packed() -> tuple[Tensor, ...]:
    return torch.randn(12, 4, 16), *torch.randn(2, 12, 2, 16), CU, CU


# Operator arguments from `max_seqlen_q` on.
PLAIN = (0, 0, None, False, -1, -1, 0.0, None, None, None, False)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def operator_cases() -> dict[str, tuple[Any, ...]]:
    torch.manual_seed(0)
    q, k, v = tensors()
    overlapping = torch.randn(200).as_strided((1, 9, 4, 16), (0, 4, 1, 1))
    column = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    alibi_bias_sinks = (torch.rand(2, 4), torch.randn(9, 12), torch.randn(4), True)
    return {
        "plain": (q, k, v, None, None, *PLAIN),
        "heads first": (*map(heads_first, tensors(torch.bfloat16)), None, None, *PLAIN),
        "copied": (*column, None, None, *PLAIN),
        "expanded": (q[:1].expand(2, 9, 4, 16), k, v, None, None, *PLAIN),
        "other value_dim": (q, k, torch.randn(2, 12, 2, 24), None, None, *PLAIN),
        "overlapping": (overlapping, *[torch.randn(1, 9, 4, 16)] * 2, None, None, *PLAIN),
        "varlen": (*packed(), 8, 9, 0.3, True, 5, -1, 2.0, torch.rand(4), None, None, False),
        "bias": (q, k, v, None, None, 0, 0, None, True, 3, 3, 0.0, *alibi_bias_sinks),
        "mask": (q, k, v, None, None, *PLAIN[:8], torch.rand(2, 1, 9, 12) < 0.5, None, False),
    }


@pytest.mark.parametrize("case", operator_cases())
def test_operator_keeps_torchs_rules(case: str) -> None:
    torch.library.opcheck(OPERATOR, (*operator_cases()[case], 0.0, None))


def every_function(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cu: Tensor) -> list[Tensor]:
    """Calls in all the ways there are, with all kinds of options."""
    kv = torch.stack([k, v], 2)
    mask = k[:, :, :1, 0].transpose(1, 2).unsqueeze(2) > 0
    rows = q[0], k[0], v[0]
    results = [
        flash_attn_func(q, k, v, causal=True, window_size=[4, 2]),
        *flash_attn_func(q, k, v, 0.0, 0.3, softcap=3, alibi_slopes=slopes, return_attn_probs=True),
        flash_attn_kvpacked_func(q, kv, causal=True),
        flash_attn_qkvpacked_func(torch.stack([q, q, q], 2), deterministic=True),
        flash_attn_varlen_func(*rows, cu, cu, 9, 12, causal=True),
        flash_attn_varlen_qkvpacked_func(torch.stack([q[0]] * 3, 1), cu, 9),
        *attention(q, k, v, mask=mask, sinks=slopes, return_lse=True),
    ]
    return [result for result in results if isinstance(result, Tensor)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_functions_give_the_same(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(every_function, fullgraph=True, backend=backend, dynamic=dynamic)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    for query_len, key_len in [(9, 12), (11, 13)] if dynamic else [(9, 12)]:
        q, k = torch.randn(2, query_len, 4, 16), torch.randn(2, key_len, 2, 16)
        arguments = (q, k, torch.randn_like(k), torch.rand(4), cu)
        for one, other in zip(every_function(*arguments), compiled(*arguments), strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


def test_dynamic_sizes_compile_once() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(flash_attn_func, fullgraph=True, dynamic=True, backend=counter)
    for length in (7, 8, 30, 64):
        q = torch.randn(2, length, 4, 16)
        assert torch.equal(compiled(q, q, q, causal=True), flash_attn_func(q, q, q, causal=True))
    assert counter.frame_count == 1


def test_strides_of_copied_and_strange_inputs_survive_compilation() -> None:
    q, k, v = tensors()
    compiled = torch.compile(flash_attn_func, fullgraph=True)
    for query in [heads_first(q), q.transpose(-1, -2).contiguous().transpose(-1, -2), q[:, :, ::2]]:
        expected = flash_attn_func(query, k, v)
        assert isinstance(expected, Tensor)
        assert compiled(query, k, v).stride() == expected.stride()


def test_compiled_functions_track_gradients_only_where_asked() -> None:
    q, k, v = tensors()
    compiled = torch.compile(flash_attn_func, fullgraph=True)
    assert compiled(q.requires_grad_(), k, v).requires_grad
    with torch.no_grad():
        assert not compiled(q, k, v).requires_grad


@pytest.mark.parametrize("tier", ["cpu", "torch"])
def test_graph_breaks(monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Any:
        q = flash_attn_func(q + 1, k, v)
        torch._dynamo.graph_break()
        return flash_attn_func(q, k, v, causal=True)

    monkeypatch.setenv("MTLFLASHATTN_KERNEL", tier)
    arguments = tensors()
    assert torch.equal(torch.compile(broken)(*arguments), broken(*arguments))


def test_compiled_errors_say_what_is_wrong() -> None:
    q, k, _ = tensors()
    compiled = torch.compile(flash_attn_func)
    with pytest.raises(ValueError, match=r"v has shape \(2, 9, 4, 16\); allowed: seqlen = 12"):
        compiled(q, k, q)
    with pytest.raises(TypeError, match="window_size"):
        compiled(q, k, k, window_size=(1.5, 2))  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="softcap together with dropout"):
        compiled(q, k, k, dropout_p=0.5, softcap=1.0)
    with pytest.raises(ValueError, match="dropout_p is 1; allowed"):
        compiled(q, k, k, dropout_p=1.0)


class Module(torch.nn.Module):
    """Attention of a tensor with itself."""

    def forward(self, q: Tensor) -> Any:
        return flash_attn_func(q, q, q, causal=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    q, _, _ = tensors()
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {"q": {1: length}}
    program = torch.export.export(Module(), (q,), dynamic_shapes=shapes, strict=strict)
    longer = torch.randn(2, 33, 4, 16)
    assert torch.equal(program.module()(longer), Module()(longer))


def test_tracers_see_the_operator() -> None:
    q, _, _ = tensors()
    other = torch.randn_like(q)
    for traced in [
        torch.jit.trace(Module(), q),
        torch.fx.symbolic_trace(Module()),
        make_fx(Module())(q),
        make_fx(Module(), tracing_mode="symbolic")(q),
    ]:
        assert torch.equal(traced(other), Module()(other))


def test_fake_and_meta_tensors() -> None:
    q, k, v = tensors()
    with FakeTensorMode() as mode:
        fake_q, fake_k, fake_v = (mode.from_tensor(t) for t in (q, k, v))
        out, lse, empty = flash_attn_func(
            heads_first(fake_q), fake_k, fake_v, return_attn_probs=True
        )
    assert (out.shape, out.stride(), out.device.type) == (q.shape, heads_first(q).stride(), "cpu")
    assert (lse.shape, lse.dtype, empty.numel()) == ((2, 4, 9), torch.float32, 0)
    q, k, v = (t.to("meta") for t in (q, k, v))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", q.shape, (2, 4, 9))
    with pytest.raises(ValueError, match="k has shape"):
        flash_attn_func(q, k[:1], v)


def test_vmap() -> None:
    q, k, v = (torch.stack([t] * 3) + torch.arange(3).view(3, 1, 1, 1, 1) for t in tensors())
    out = torch.vmap(flash_attn_func)(q, k, v)
    expected = [flash_attn_func(*three) for three in zip(q, k, v, strict=True)]
    assert torch.equal(out, torch.stack(expected))
    shared = torch.vmap(flash_attn_func, in_dims=(0, None, None))(q, k[0], v[0])
    assert torch.equal(shared[0], out[0])


def test_functionalize() -> None:
    q, k, v = tensors()
    out = torch.func.functionalize(flash_attn_func)(q, k, v)
    assert torch.equal(out, flash_attn_func(q, k, v))


class Logged(torch.Tensor):
    """A subclass that writes down what it is asked."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_see_the_operator() -> None:
    q, k, v = tensors()
    out = flash_attn_func(q.as_subclass(Logged), k, v)
    assert isinstance(out, Logged)
    assert "mtlflashattn.forward.default" in Logged.seen
    assert torch.equal(out.as_subclass(Tensor), flash_attn_func(q, k, v))


def test_modes_see_the_operator() -> None:
    class Log(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = tensors()
    seen: list[str] = []
    with Log():
        out = flash_attn_func(q, k, v)
    assert "mtlflashattn.forward.default" in seen
    assert torch.equal(out, flash_attn_func(q, k, v))
    with torch.device("cpu"):
        assert torch.equal(out, flash_attn_func(q, k, v))


def test_replayed_graphs_are_traced() -> None:
    q, k, v = tensors()
    compiled = torch.compile(flash_attn_func, fullgraph=True)
    compiled(q, k, v)
    with trace() as calls:
        compiled(q, k, v)
        compiled(q, k, v)
    assert [(entry.calls, entry.tier) for entry in calls.calls] == [(2, "cpu")]


def test_autocast_changes_nothing() -> None:
    q, k, v = tensors()
    expected = flash_attn_func(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flash_attn_func(q, k, v), expected)
