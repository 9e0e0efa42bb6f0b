"""Gradients against the float64 reference, on random problems, and what autograd does with them."""

# Calls with lists of tensors, whose length mypy does not know.
# mypy: disable-error-code="call-arg, misc, arg-type, type-var"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from metal_flash_attn import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    plan,
    trace,
)
from problems import (
    DTYPES,
    dense_problems,
    keywords,
    packed_problems,
    strided,
    strides_of_result,
)
from reference import Rules, gradients, packed_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from ways import Way, random_gradients, ways


def wants_gradients(*tensors: Tensor) -> Any:
    """The same tensors as leaves, each laid out as it is."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


def backward_tiers(run: Callable[[], object]) -> set[str]:
    """The tiers that computed gradients."""
    with trace() as calls:
        run()
    return {entry.tier for entry in calls.calls if entry.backward}


@random_gradients
def test_dense_gradients_are_exact(way: Way, data: st.DataObject) -> None:
    draw: Any = data.draw
    q, k, v, rules = draw(dense_problems(way))
    batch, query_len, heads, _ = q.shape
    d_out = strided(draw, way.put(torch.randn(*q.shape).to(q.dtype)))
    d_lse = draw(st.sampled_from([None, way.put(torch.randn(batch, heads, query_len))]))
    here: Any = [None if t is None else t.cpu() for t in (q, k, v, d_out, d_lse)]
    exact = gradients(*here, rules, way.arithmetic(q.dtype), way.backward_arithmetic(q.dtype))
    leaves = wants_gradients(q, k, v)
    with way.serves(draw(st.integers(1, 200))):
        options = keywords(way, rules)
        out, lse, _ = flash_attn_func(*leaves, return_attn_probs=True, **options)
    pairs = [(out, d_out)] if d_lse is None else [(out, d_out), (lse, d_lse)]
    with way.backward() as calls:
        d_q, d_k, d_v = torch.autograd.grad(
            [result for result, _ in pairs], leaves, [gradient for _, gradient in pairs]
        )
    assert {entry.tier for entry in calls.calls if entry.backward} == {way.backward_tier}
    exact.check(q=d_q, k=d_k, v=d_v)
    for gradient, tensor in zip((d_q, d_k, d_v), (q, k, v), strict=True):
        assert gradient.stride() == strides_of_result(tensor)
        assert gradient.dtype == q.dtype


@random_gradients
def test_packed_gradients_are_exact(way: Way, data: st.DataObject) -> None:
    draw: Any = data.draw
    q, k, v, cu_q, cu_k, longest, rules = draw(packed_problems(way))
    d_out = way.put(torch.randn(*q.shape).to(q.dtype))
    tensors: Any = [t.cpu() for t in (q, k, v, d_out)]
    exact = packed_gradients(
        *tensors, None, cu_q, cu_k, rules, way.arithmetic(q.dtype), way.backward_arithmetic(q.dtype)
    )
    where: Any = [way.put(torch.tensor(cu, dtype=torch.int32)) for cu in (cu_q, cu_k)]
    leaves = wants_gradients(q, k, v)
    with way.serves(draw(st.integers(1, 200))):
        out = flash_attn_varlen_func(*leaves, *where, *longest, **keywords(way, rules))
    with way.backward():
        d_q, d_k, d_v = torch.autograd.grad(out, leaves, d_out)
    exact.check(q=d_q, k=d_k, v=d_v)


@random_gradients
def test_extensions_have_exact_gradients(way: Way, data: st.DataObject) -> None:
    draw: Any = data.draw
    lengths = st.integers(1, way.at_most(90))
    batch, query_len, key_len = draw(st.tuples(st.integers(1, 2), lengths, lengths))
    key_heads, group = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    dim, value_dim = draw(st.sampled_from([(8, 8), (16, 40), (64, 8)]))
    dtype, heads = draw(st.sampled_from(DTYPES)), key_heads * group
    q = way.put(torch.randn(batch, query_len, heads, dim).to(dtype))
    k = way.put(torch.randn(batch, key_len, key_heads, dim).to(dtype))
    v = way.put(torch.randn(batch, key_len, key_heads, value_dim).to(dtype))
    full = (batch, heads, query_len, key_len)
    shape = draw(st.tuples(*(st.sampled_from([1, size]) for size in full)))
    bias = torch.randn(shape[draw(st.sampled_from([0, 0, 1, 2])) :])
    bias = bias.masked_fill(torch.rand(bias.shape) < 0.1, -torch.inf)
    bias = bias.to(draw(st.sampled_from([torch.float32, dtype])))
    sinks = torch.randn(heads).masked_fill(torch.rand(heads) < 0.2, -torch.inf)
    use_bias, use_sinks = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    rules = Rules(
        causal=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        bias=bias if use_bias else None,
        sinks=sinks if use_sinks else None,
        top_left=draw(st.booleans()),
    )
    d_out = way.put(torch.randn(batch, query_len, heads, value_dim).to(dtype))
    here: Any = [t.cpu() for t in (q, k, v, d_out)]
    exact = gradients(*here, None, rules, way.arithmetic(dtype), way.backward_arithmetic(dtype))
    used = {"bias": rules.bias, "sinks": rules.sinks}
    extras = {name: way.put(t) for name, t in used.items() if t is not None}
    tensors = {"q": q, "k": k, "v": v, **extras}
    leaves: Any = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    with way.serves(draw(st.integers(1, 200))):
        options: Any = {
            "causal": rules.causal,
            "softcap": rules.softcap,
            "top_left": rules.top_left,
        }
        out = attention(**leaves, **options)
    with way.backward():
        results = torch.autograd.grad(out, list(leaves.values()), d_out)
    exact.check(**dict(zip(leaves, results, strict=True)))


def test_the_reference_agrees_with_autograd() -> None:
    from reference import attention as exact_attention

    for rules in [
        Rules(causal=True, softcap=2.0, alibi_slopes=torch.rand(4)),
        Rules(bias=torch.randn(1, 4, 1, 12), sinks=torch.randn(4), window=(5, 3)),
    ]:
        q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 6)
        named = {"q": q, "k": k, "v": v, "bias": rules.bias, "sinks": rules.sinks}
        leaves = {n: t.double().requires_grad_() for n, t in named.items() if t is not None}
        d_out, d_lse = torch.randn(2, 9, 4, 6), torch.randn(2, 4, 9)
        extras: Any = {n: leaves[n] for n in ("bias", "sinks") if n in leaves}
        result = _differentiable(
            leaves["q"], leaves["k"], leaves["v"], Rules(**{**vars(rules), **extras})
        )
        assert torch.allclose(result[0], exact_attention(q, k, v, rules).out)
        expected = torch.autograd.grad(
            result, list(leaves.values()), [d_out.double(), d_lse.double()]
        )
        exact = gradients(q, k, v, d_out, d_lse, rules).exact
        for name, gradient in zip(leaves, expected, strict=True):
            assert torch.allclose(exact[name].reshape(gradient.shape), gradient, atol=1e-12), name


def _differentiable(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Attention in a few torch operations, for rows that all see a key."""
    heads, key_heads, key_len = q.shape[2], k.shape[2], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(heads // key_heads, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if rules.softcap:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    distance = torch.arange(key_len) - torch.arange(q.shape[2])[:, None] - key_len + q.shape[2]
    if rules.alibi_slopes is not None:
        scores = scores - rules.alibi_slopes.view(-1, 1, 1) * distance.abs()
    if rules.bias is not None:
        scores = scores + rules.bias
    left, right = rules.window
    right = 0 if rules.causal else right
    if left >= 0:
        scores = scores.masked_fill(distance < -left, -torch.inf)
    if right >= 0:
        scores = scores.masked_fill(distance > right, -torch.inf)
    if rules.sinks is not None:
        sinks = rules.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    out = torch.softmax(scores, -1)[..., :key_len] @ v
    return out.transpose(1, 2), torch.logsumexp(scores, -1)


Q, K, V = torch.randn(2, 9, 4, 16), torch.randn(2, 12, 2, 16), torch.randn(2, 12, 2, 16)
CU = torch.tensor([0, 3, 3, 9], dtype=torch.int32)


def test_packed_functions_give_packed_gradients() -> None:
    q, kv, qkv = torch.randn(2, 9, 4, 16), torch.randn(2, 12, 2, 2, 16), torch.randn(2, 9, 3, 4, 16)
    rows = 3 * 4 * 16
    # A slice of wider rows and a transposed batch: gradients of packed tensors are contiguous.
    wide = torch.randn(2, 9, 5, 4, 16)[:, :, 1:4]
    swapped = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    for packed in (qkv, wide, swapped):
        (leaf,) = wants_gradients(packed)
        flash_attn_qkvpacked_func(leaf, causal=True).square().sum().backward()
        parts = wants_gradients(*packed.unbind(2))
        flash_attn_func(*parts, causal=True).square().sum().backward()
        (gradient,) = torch.autograd.grad(
            flash_attn_qkvpacked_func(leaf, causal=True).square().sum(), leaf
        )
        assert gradient.stride() == (9 * rows, rows, 64, 16, 1)
        for one, other in zip(gradient.unbind(2), parts, strict=True):
            assert torch.equal(one, other.grad)
    leaves = wants_gradients(q, kv)
    d_q, d_kv = torch.autograd.grad(flash_attn_kvpacked_func(*leaves).square().sum(), leaves)
    parts = wants_gradients(q, *kv.unbind(2))
    expected = torch.autograd.grad(flash_attn_func(*parts).square().sum(), parts)
    assert d_kv.is_contiguous()
    for one, other in zip((d_q, *d_kv.unbind(2)), expected, strict=True):
        assert torch.equal(one, other)
    (leaf,) = wants_gradients(qkv[0])
    flash_attn_varlen_qkvpacked_func(leaf, CU, 6).square().sum().backward()
    leaves = wants_gradients(qkv[0, :, 0], qkv[0, :, 1:])
    flash_attn_varlen_kvpacked_func(*leaves, CU, CU, 6, 6).square().sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[:, 0], leaves[0].grad)
    assert torch.equal(leaf.grad[:, 1:], leaves[1].grad)


def test_only_wanted_gradients_are_computed() -> None:
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        tensors: Any = [
            t.clone().requires_grad_(flag) for t, flag in zip((Q, K, V), wanted, strict=True)
        ]
        flash_attn_func(*tensors).sum().backward()
        assert tuple(t.grad is not None for t in tensors) == wanted
    qkv = torch.randn(2, 9, 3, 4, 16)
    q, kv = qkv[:, :, 0].clone(), qkv[:, :, 1:].clone().requires_grad_()
    flash_attn_kvpacked_func(q, kv).sum().backward()
    assert q.grad is None
    assert kv.grad is not None


@ways
def test_gradients_are_reproducible(way: Way) -> None:
    leaves = wants_gradients(*(way.put(t) for t in (Q, K, V)))
    with way.serves():
        results = [flash_attn_func(*leaves, causal=True, deterministic=True) for _ in range(3)]
    with way.backward():
        first, *others = (torch.autograd.grad(r.square().sum(), leaves) for r in results)
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_the_log_sum_exp_alone_has_gradients() -> None:
    leaves = wants_gradients(Q, K)
    _, lse, _ = flash_attn_func(*leaves, V, return_attn_probs=True)
    results = torch.autograd.grad(lse.sum(), leaves)
    exact = gradients(Q, K, V, torch.zeros(2, 9, 4, 16), torch.ones(2, 4, 9), Rules())
    exact.check(q=results[0], k=results[1])


def test_second_derivatives_are_refused() -> None:
    message = "no second derivatives"
    leaves = wants_gradients(Q, K, V)
    for function in (flash_attn_func, torch.compile(flash_attn_func, backend="eager")):
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        assert all(gradient.requires_grad for gradient in first)
        with pytest.raises(NotImplementedError, match=message):
            first[0].sum().backward()
    (qkv,) = wants_gradients(torch.randn(1, 5, 3, 2, 8))
    (first_qkv,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv).sum(), qkv, create_graph=True)
    (plain,) = torch.autograd.grad(flash_attn_qkvpacked_func(qkv).sum(), qkv)
    assert torch.equal(first_qkv, plain)
    with pytest.raises(NotImplementedError, match=message):
        first_qkv.sum().backward()


def test_slopes_have_no_gradient() -> None:
    slopes = torch.rand(4, requires_grad=True)
    for function in (flash_attn_func, torch.compile(flash_attn_func, backend="eager")):
        with pytest.raises(NotImplementedError, match=r"alibi_slopes.*detach"):
            function(Q, K, V, alibi_slopes=slopes)
    with torch.no_grad():
        flash_attn_func(Q, K, V, alibi_slopes=slopes)


def test_changed_inputs_are_noticed() -> None:
    (q,) = wants_gradients(Q.clone())
    moved = q * 1.0
    out = flash_attn_func(moved, K, V)
    moved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_checkpointing() -> None:
    leaves = wants_gradients(Q, K, V)
    expected = torch.autograd.grad(flash_attn_func(*leaves, causal=True).square().sum(), leaves)

    def block(*tensors: Any) -> Tensor:
        result: Tensor = flash_attn_func(*tensors, causal=True)
        return result

    out = checkpoint(block, *leaves, use_reentrant=False)
    assert isinstance(out, Tensor)
    got = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.equal(one, two) for one, two in zip(expected, got, strict=True))


def test_autocast_changes_no_gradient() -> None:
    leaves = wants_gradients(Q, K, V)
    expected = torch.autograd.grad(flash_attn_func(*leaves).square().sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(flash_attn_func(*leaves).square().sum(), leaves)
    assert all(torch.equal(one, two) for one, two in zip(expected, got, strict=True))


def every_function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    """One number from calls in all the ways there are."""
    kv = torch.stack([k, v], 2)
    results = [
        *flash_attn_func(q, k, v, causal=True, softcap=3.0, return_attn_probs=True)[:2],
        flash_attn_kvpacked_func(q, kv, window_size=(4, 2)),
        flash_attn_qkvpacked_func(torch.stack([q, q, q], 2)),
        flash_attn_varlen_func(q[0], k[0, :9], v[0, :9], CU, CU, 6, 6, causal=True),
        flash_attn_varlen_qkvpacked_func(torch.stack([q[0]] * 3, 1), CU, 6),
        *attention(q, k, v, bias=bias, sinks=sinks, return_lse=True),
    ]
    return torch.stack([result.square().sum() for result in results]).sum()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_are_the_same(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(every_function, fullgraph=True, backend=backend, dynamic=dynamic)
    leaves = wants_gradients(Q, K, V, torch.randn(9, 12), torch.randn(4))
    expected = torch.autograd.grad(every_function(*leaves), leaves)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for one, two in zip(expected, got, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def operator_cases() -> dict[str, tuple[Any, ...]]:
    leaves = wants_gradients(Q, K, V)
    plain = (0, 0, None, True, -1, -1, 0.0, None, None, None, False, 0.0, None)
    state = torch.tensor([1, -2])
    extras = wants_gradients(torch.randn(4, 9, 12), torch.randn(4))
    packed = wants_gradients(Q[0], K[0, :9], V[0, :9])
    return {
        "plain": (*leaves, None, None, *plain),
        "bias": (*leaves, None, None, 0, 0, None, False, 3, 3, 2.0, None, *extras, True, 0.0, None),
        "dropout": (*leaves, None, None, *plain[:-2], 0.2, state),
        "varlen": (*packed, CU, CU, 6, 6, *plain[2:]),
    }


# Torch looks at what is no leaf, and complains.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("case", operator_cases())
def test_operators_keep_torchs_rules(case: str) -> None:
    arguments = operator_cases()[case]
    torch.library.opcheck(torch.ops.mtlflashattn.forward.default, arguments)
    detached = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    out, lse = torch.ops.mtlflashattn.forward(*detached)
    has_bias = case == "bias"
    call = (torch.randn_like(out), None, out, lse, *detached, [True] * 3 + [has_bias] * 2)
    torch.library.opcheck(torch.ops.mtlflashattn.backward.default, call)


def test_functional_transforms() -> None:
    def loss(q: Tensor, k: Tensor) -> Tensor:
        result: Tensor = flash_attn_func(q, k, V, causal=True).square().sum()
        return result

    leaves = wants_gradients(Q, K)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=(0, 1))(Q, K)
    assert all(torch.equal(one, two) for one, two in zip(expected, got, strict=True))
    many = torch.stack([Q, Q + 1])
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(many, K)
    assert torch.equal(per_sample[0], expected[0])
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, K).sum())(Q)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: loss(q, K), (Q,), (Q,))


def test_modules_learn() -> None:
    torch.manual_seed(0)
    layer, target = torch.nn.Linear(8, 24), torch.randn(2, 10, 8)
    x = torch.randn(2, 10, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        qkv = layer(x).view(2, 10, 3, 2, 4)
        loss = (flash_attn_qkvpacked_func(qkv).flatten(2) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_plan_and_trace_tell_the_tier_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = wants_gradients(Q, K, V)
    run = lambda: flash_attn_func(*leaves).sum().backward()  # noqa: E731
    assert backward_tiers(run) == {plan(*leaves, backward=True).tier}
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "torch")
    assert backward_tiers(run) == {"torch"} == {plan(*leaves, backward=True).tier}
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "simdgroup")
    monkeypatch.setenv("MTLFLASHATTN_DEVICE", "simulator")
    chosen = plan(*leaves, backward=True)
    assert chosen.tier == "simdgroup"
    assert dict(chosen.reasons)["scalar"] == "has no backward pass"
    assert backward_tiers(run) == {"simdgroup"}


def test_empty_problems_have_gradients() -> None:
    for query_len, key_len in [(0, 5), (5, 0), (0, 0)]:
        leaves = wants_gradients(*(torch.randn(2, n, 2, 8) for n in (query_len, key_len, key_len)))
        flash_attn_func(*leaves).sum().backward()
        for leaf in leaves:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_gradients_of_sums_and_slices() -> None:
    leaves = wants_gradients(Q, K, V)
    expanded = torch.autograd.grad(flash_attn_func(*leaves).sum(), leaves)
    ones = torch.autograd.grad(flash_attn_func(*leaves), leaves, torch.ones_like(Q))
    assert all(torch.equal(one, two) for one, two in zip(expanded, ones, strict=True))
    out, lse, _ = flash_attn_func(*leaves, return_attn_probs=True)
    mixed = torch.autograd.grad(out[:, 2:5].sum() + 0 * lse.sum(), leaves)
    mask = torch.zeros_like(Q)
    mask[:, 2:5] = 1
    masked = torch.autograd.grad(flash_attn_func(*leaves), leaves, mask)
    assert all(torch.allclose(one, two) for one, two in zip(mixed, masked, strict=True))


def test_the_report_at_exit_tells_gradients(child: Any) -> None:
    code = (
        "import torch, metal_flash_attn as m\n"
        "q = torch.randn(1, 8, 2, 8, requires_grad=True)\n"
        "m.flash_attn_func(q, q, q).sum().backward()\n"
        "print(q.grad.isfinite().all().item())"
    )
    process = child(code, MTLFLASHATTN_TRACE="1", MTLFLASHATTN_KERNEL="torch")
    assert process.stdout.strip() == "True"
    assert "-> torch (backward)" in process.stderr
