"""Dropout: the same weights by every way, right results and gradients, random states."""

# Calls with lists of tensors, whose length mypy does not know.
# mypy: disable-error-code="call-arg, misc, arg-type"

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_flash_attn import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from metal_flash_attn._dropout import Dropout, draw, factors
from metal_flash_attn.shim.flash_attn import flash_attn_interface as interface
from reference import Rules, gradients
from reference import attention as exact_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from ways import Way, ways

P = 0.3
STEPS = round(P * 65536)
KEPT = 65536 / (65536 - STEPS)
Q, K, V = torch.randn(2, 9, 4, 16), torch.randn(2, 21, 2, 16), torch.randn(2, 21, 2, 16)
CU = torch.tensor([0, 3, 3, 9], dtype=torch.int32)


def seeded(seed: int, function: Any, *arguments: Any, **options: Any) -> Any:
    """What a function gives after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    return function(*arguments, **options)


def kept_weights(probabilities: Tensor, query_len: int, key_len: int) -> Tensor:
    """The factors that S_dmask tells, float64."""
    signs = torch.signbit(probabilities[..., :query_len, :key_len])
    return torch.where(signs, 0.0, KEPT).double()


def leaves_of(*tensors: Tensor) -> Any:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def test_the_published_answers_of_philox() -> None:
    # `kat_vectors` of the Random123 distribution, 10 rounds; no threshold tells the words apart, so
    # that each bit is asked for by its own.
    counter, key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    want = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    seed = key[0] | key[1] << 32
    halves = [half for word in want for half in (word & 0xFFFF, word >> 16)]
    row = slice(counter[1], counter[1] + 1)
    group = slice(8 * counter[0], 8 * counter[0] + 8)
    heads = range(counter[2], counter[2] + 1)
    for threshold in (1, 0x1234, 0x5001, 0x8000, *sorted(halves), *(h + 1 for h in halves)):
        dropout = Dropout(threshold, 1.0, seed, counter[3])
        got = factors(dropout, heads, row, group, torch.device("cpu")).flatten().tolist()
        assert got == [float(half >= threshold) for half in halves]


def seen_weights(way: Way, length: int, **options: Any) -> Tensor:
    """What dropout multiplied weights by, `[B, H, Lq, Lk]`.

    Scores are equal, and values a unit matrix, so that outputs are the weights.
    """
    q, k = torch.zeros(2, 9, 4, 16), torch.zeros(2, length, 2, 16)
    v = torch.eye(length)[None, :, None].expand(2, length, 2, length).contiguous()
    with way.serves(chunk=4):
        out, lse = seeded(
            5, attention, *map(way.put, (q, k, v)), dropout_p=P, return_lse=True, **options
        )
    weights: Tensor = out.cpu().transpose(1, 2) * torch.exp(lse.cpu())[..., None]
    return weights


@ways
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (7, 2)}])
def test_every_way_drops_the_same(way: Way, options: dict[str, Any]) -> None:
    length = 44
    seed, offset = seeded(
        5, draw, torch.device(way.device if way.device == "mps" else "cpu")
    ).tolist()
    dropout = Dropout(STEPS, KEPT, seed, offset)
    want = factors(dropout, range(8), slice(0, 9), slice(0, length), torch.device("cpu"))
    got = seen_weights(way, length, **options)
    distance = torch.arange(length) - torch.arange(9)[:, None] - (length - 9)
    left, right = options.get("window_size", (-1, 0 if options else -1))
    visible = (distance >= -left) if left >= 0 else torch.ones_like(distance).bool()
    visible = visible & (distance <= right) if right >= 0 else visible
    assert torch.allclose(got, want.view(2, 4, 9, length) * visible, atol=1e-4)


def test_threads_change_no_bit() -> None:
    tensors = [torch.randn(2, 700, 4, 64) for _ in range(3)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(seeded(1, flash_attn_func, *tensors, dropout_p=P, causal=True))
    assert torch.equal(*results)


@settings(max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("tier", ["cpu", "torch"])
def test_results_and_gradients_are_exact(tier: str, data: st.DataObject) -> None:
    draw_value: Any = data.draw
    query_len, key_len = draw_value(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    dtype = draw_value(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    q, k, v = (
        torch.randn(2, length, heads, 16).to(dtype)
        for length, heads in [(query_len, 4), (key_len, 2), (key_len, 2)]
    )
    options: Any = {
        "causal": draw_value(st.booleans()),
        "window_size": draw_value(st.sampled_from([(-1, -1), (9, 4)])),
        "alibi_slopes": draw_value(st.sampled_from([None, torch.rand(4)])),
    }
    leaves = leaves_of(q, k, v)
    with Way("cpu", tier).serves(chunk=16):
        out, lse, probabilities = seeded(
            3, flash_attn_func, *leaves, dropout_p=P, return_attn_probs=True, **options
        )
    window = options.pop("window_size")
    kept = kept_weights(probabilities, query_len, key_len)
    rules = Rules(window=window, kept=kept, **options)
    exact = exact_attention(q, k, v, rules)
    exact.check(out.detach(), lse.detach())
    d_out, d_lse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)
    with Way("cpu", tier).backward():
        results = torch.autograd.grad([out, lse], leaves, [d_out, d_lse])
    gradients(q, k, v, d_out, d_lse, rules).check(**dict(zip("qkv", results, strict=True)))


def test_probabilities_are_the_softmax_with_signs() -> None:
    out, lse, probabilities = seeded(
        2, flash_attn_func, Q, K, V, dropout_p=P, causal=True, return_attn_probs=True
    )
    assert probabilities.shape == (2, 4, 128, 128)
    assert probabilities.dtype == Q.dtype
    scores = torch.einsum("bqhd,bkhd->bhqk", Q, K.repeat_interleave(2, 2)) / 4
    hidden = torch.arange(21) > torch.arange(9)[:, None] + 12
    softmax = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
    assert torch.allclose(probabilities[:, :, :9, :21].abs(), softmax, atol=1e-6)
    assert not probabilities[:, :, 9:].any()
    assert not probabilities[..., 21:].any()
    weights = probabilities.clamp(min=0)[:, :, :9, :21] * KEPT
    want = torch.einsum("bhqk,bkhd->bqhd", weights, V.repeat_interleave(2, 2))
    assert torch.allclose(out, want, atol=1e-5)
    plain = flash_attn_func(Q, K, V, causal=True, return_attn_probs=True)
    assert torch.equal(lse, plain[1])
    assert plain[2].shape == (0,)


def test_every_function_drops() -> None:
    qkv, kv = torch.randn(2, 9, 3, 4, 16), torch.stack([K, V], 2)
    q, k, v = (Q[0], K[0, :9], V[0, :9])
    dense = seeded(4, flash_attn_func, *qkv.unbind(2), P)
    assert torch.equal(dense, seeded(4, flash_attn_qkvpacked_func, qkv, P))
    assert torch.equal(dense, seeded(4, attention, *qkv.unbind(2), dropout_p=P))
    assert torch.equal(
        seeded(4, flash_attn_func, Q, K, V, P), seeded(4, flash_attn_kvpacked_func, Q, kv, P)
    )
    packed = seeded(4, flash_attn_varlen_func, q, k, v, CU, CU, 6, 6, P, return_attn_probs=True)
    assert packed[2].shape == (3, 4, 128, 128)
    pair = torch.stack([k, v], 1)
    same = seeded(4, flash_attn_varlen_kvpacked_func, q, pair, CU, CU, 6, 6, P)
    assert torch.equal(packed[0], same)
    all_three = qkv[0, :, :, :2].contiguous()
    apart = seeded(4, flash_attn_varlen_func, *all_three.unbind(1), CU, CU, 6, 6, P)
    assert torch.equal(apart, seeded(4, flash_attn_varlen_qkvpacked_func, all_three, CU, 6, P))
    # A packed batch is a batch: sequence, head and positions decide.
    cu = torch.tensor([0, 9, 18], dtype=torch.int32)
    flat = [t.flatten(0, 1) for t in qkv.unbind(2)]
    assert torch.equal(
        dense.flatten(0, 1), seeded(4, flash_attn_varlen_func, *flat, cu, cu, 9, 9, P)
    )


def test_compiled_calls_return_the_probabilities_too() -> None:
    """Also those of ragged sequences, whose lengths no compiler knows."""
    sequences = (Q[0], K[0, :9], V[0, :9], CU, CU, 6, 6, P)
    for function, arguments in (
        (flash_attn_func, (Q, K, V, P)),
        (flash_attn_varlen_func, sequences),
    ):
        options = {"window_size": (3, -1), "return_attn_probs": True}
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        expected = seeded(5, function, *arguments, **options)
        torch.testing.assert_close(seeded(5, compiled, *arguments, **options), expected)
        assert expected[2].signbit().any()


def test_random_states() -> None:
    first, second = seeded(1, flash_attn_func, Q, K, V, P), flash_attn_func(Q, K, V, P)
    assert not torch.equal(first, second)
    assert torch.equal(first, seeded(1, flash_attn_func, Q, K, V, P))
    assert torch.equal(second, flash_attn_func(Q, K, V, P))
    assert not torch.equal(first, seeded(2, flash_attn_func, Q, K, V, P))
    # Calls that drop nothing leave the generator alone.
    for p in (0.0, 0, 1e-30):
        torch.manual_seed(1)
        assert torch.equal(flash_attn_func(Q, K, V, p), flash_attn_func(Q, K, V))
        assert torch.equal(first, flash_attn_func(Q, K, V, P))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_drop_the_same_again(use_reentrant: bool) -> None:
    leaves = leaves_of(Q, K, V)
    loss = seeded(1, flash_attn_func, *leaves, P).square().sum()
    want = torch.autograd.grad(loss, leaves)
    torch.manual_seed(1)
    out = checkpoint(flash_attn_func, *leaves, P, use_reentrant=use_reentrant)
    torch.manual_seed(7)
    out.square().sum().backward()
    assert all(torch.equal(one, leaf.grad) for one, leaf in zip(want, leaves, strict=True))


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two equal calls, which no compiler may merge."""
    difference: Tensor = flash_attn_func(q, k, v, P) - flash_attn_func(q, k, v, P)
    return difference


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_calls_draw_each_time(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    leaves = leaves_of(Q, K, V)
    want = seeded(1, twice, *leaves)
    assert want.abs().max() > 0.01
    got = seeded(1, compiled, *leaves)
    assert torch.allclose(want, got, atol=1e-6)
    assert not torch.allclose(got, compiled(*leaves), atol=1e-3)
    for one, two in zip(
        torch.autograd.grad(want.square().sum(), leaves),
        torch.autograd.grad(got.square().sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(one, two, atol=1e-4)


def test_compiled_checkpoints_drop_the_same_again() -> None:
    torch._dynamo.reset()

    def saved(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return checkpoint(flash_attn_func, q, k, v, P, use_reentrant=False)

    leaves = leaves_of(Q, K, V)
    want = torch.autograd.grad(seeded(1, flash_attn_func, *leaves, P).square().sum(), leaves)
    out = seeded(1, torch.compile(saved, fullgraph=True, backend="aot_eager"), *leaves)
    got = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(want, got, strict=True))


def test_vmap_wants_to_know_how_random_numbers_are_meant() -> None:
    many = torch.stack([Q] * 3)

    def call(q: Tensor) -> Any:
        return flash_attn_func(q, K, V, P)

    with pytest.raises(RuntimeError, match="randomness='different'"):
        torch.vmap(call)(many)
    same = torch.vmap(call, randomness="same")(many)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(call, randomness="different")(many)
    assert not torch.equal(different[0], different[1])


def test_single_steps_hand_the_state_on() -> None:
    rules: Any = (P, None, True, -1, -1, 0.0, None)
    leaves = leaves_of(Q, K, V)
    whole = seeded(1, flash_attn_func, *leaves, P, causal=True)
    out, lse, mask, state = seeded(1, interface._flash_attn_forward, Q, K, V, *rules, True)
    assert torch.equal(out, whole)
    assert mask.shape == (2, 4, 128, 128)
    assert (state.dtype, state.shape) == (torch.int64, (2,))
    assert interface._flash_attn_forward(Q, K, V, *rules, False)[2].shape == (0,)
    want = torch.autograd.grad(whole, leaves, Q)
    got = [torch.empty_like(t) for t in (Q, K, V)]
    step = (Q, Q, K, V, out, lse, *got, *rules, False)
    interface._flash_attn_backward(*step, state)
    assert all(torch.equal(one, two) for one, two in zip(want, got, strict=True))
    with pytest.raises(ValueError, match="rng_state is None"):
        interface._flash_attn_backward(*step)
    packed = (Q[0], K[0, :9], V[0, :9], CU, CU, 6, 6)
    own = torch.zeros(2, dtype=torch.int64)
    out, lse, _, state = interface._flash_attn_varlen_forward(*packed, *rules[:3])
    assert not torch.equal(state, own)
    got = [torch.empty_like(t) for t in packed[:3]]
    interface._flash_attn_varlen_backward(
        out, *packed[:3], out, lse, *got, *packed[3:], *rules, False, state
    )
    assert all(gradient.isfinite().all() for gradient in got)


def test_wrong_probabilities() -> None:
    for wrong in (-0.1, 1.0, 1.5, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=r"dropout_p is .*; allowed: a probability in \[0, 1\)"
        ):
            flash_attn_func(Q, K, V, wrong)
    with pytest.raises(NotImplementedError, match="softcap together with dropout"):
        flash_attn_func(Q, K, V, P, softcap=2.0)
    # What is kept is finite however near 1 the probability is.
    assert flash_attn_func(Q, K, V, 1 - 2**-30).isfinite().all()


def test_the_mean_over_many_masks_is_the_result_without() -> None:
    torch.manual_seed(3)
    count = 400
    results = torch.stack([flash_attn_func(Q, K, V, P) for _ in range(count)])
    plain = flash_attn_func(Q, K, V)
    # Five standard deviations of each mean, from the samples' own spread.
    spread = results.std(0) / count**0.5
    assert ((results.mean(0) - plain).abs() <= 5 * spread + 1e-6).all()
