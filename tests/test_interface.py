"""The public functions against the float64 reference, on random problems, by the tiers they have.

Tolerances are the bounds of `reference`, derived from dtype, head dimension and the number of keys.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import metal_flash_attn
import pytest
import torch
from hypothesis import given
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
    all_rules,
    dense_problems,
    heads_and_dims,
    keywords,
    offsets,
    packed_problems,
    strided,
    strides_of_result,
)
from reference import Rules, packed_attention
from reference import attention as exact_attention
from torch import Tensor
from ways import Way, random_problems, ways


@random_problems
def test_dense_functions_are_exact(way: Way, data: st.DataObject) -> None:
    draw: Any = data.draw
    q, k, v, rules = draw(dense_problems(way))
    exact = exact_attention(q.cpu(), k.cpu(), v.cpu(), rules, way.arithmetic(q.dtype))
    options = keywords(way, rules)
    with way.serves(draw(st.integers(1, 200))):
        out, lse, empty = flash_attn_func(q, k, v, return_attn_probs=True, **options)
        exact.check(out, lse)
        assert out.stride() == strides_of_result(q)
        assert (empty.numel(), out.dtype, out.device) == (0, q.dtype, q.device)
        kv = torch.stack([k, v], dim=2)
        packed = flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **options)
        exact.check(*checked(packed))
        exact.check(flash_attn_func(q, k, v, **options))
    if way.tier != "torch":
        # Sums of an engine do not depend on strides.
        assert_same((out, lse), packed)


@random_problems
def test_qkvpacked_is_exact(way: Way, data: st.DataObject) -> None:
    draw: Any = data.draw
    length = st.integers(1, way.at_most(150))
    batch, length, heads = draw(st.tuples(st.integers(1, 3), length, st.integers(1, 4)))
    _, _, dim = draw(heads_and_dims(way))
    qkv = way.put(torch.randn(batch, length, 3, heads, dim).to(draw(st.sampled_from(DTYPES))))
    qkv = draw(st.sampled_from([qkv, qkv.transpose(0, 1).contiguous().transpose(0, 1)]))
    rules = draw(all_rules(batch, heads))
    q, k, v = qkv.cpu().unbind(2)
    exact = exact_attention(q, k, v, rules, way.arithmetic(qkv.dtype))
    with way.serves():
        options = keywords(way, rules)
        out, lse, _ = flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **options)
        exact.check(out, lse)
        assert out.stride() == torch.empty_like(qkv[:, :, 0]).stride()


@random_problems
def test_varlen_functions_are_exact(way: Way, data: st.DataObject) -> None:
    draw: Any = data.draw
    q, k, v, cu_q, cu_k, longest, rules = draw(packed_problems(way, least_batch=0))
    exact = packed_attention(q.cpu(), k.cpu(), v.cpu(), cu_q, cu_k, rules, way.arithmetic(q.dtype))
    lengths = (*(way.put(torch.tensor(cu, dtype=torch.int32)) for cu in (cu_q, cu_k)), *longest)
    options = {"return_attn_probs": True, **keywords(way, rules)}
    with way.serves(draw(st.integers(1, 90))):
        out, lse, empty = flash_attn_varlen_func(q, k, v, *lengths, **options)
        exact.check(out, lse)
        assert (empty.numel(), out.dtype, out.device) == (0, q.dtype, q.device)
        kv = torch.stack([k, v], dim=1)
        packed = flash_attn_varlen_kvpacked_func(q, kv, *lengths, **options)
        exact.check(*checked(packed))


@random_problems
def test_varlen_qkvpacked_is_exact(way: Way, data: st.DataObject) -> None:
    draw: Any = data.draw
    cu, total, longest = draw(offsets(way, 3))
    heads, _, dim = draw(heads_and_dims(way))
    qkv = way.put(torch.randn(total, 3, heads, dim).to(draw(st.sampled_from(DTYPES))))
    rules = draw(all_rules(3, heads))
    q, k, v = qkv.cpu().unbind(1)
    exact = packed_attention(q, k, v, cu, cu, rules, way.arithmetic(qkv.dtype))
    with way.serves():
        out, lse, _ = flash_attn_varlen_qkvpacked_func(
            qkv,
            way.put(torch.tensor(cu, dtype=torch.int32)),
            longest,
            return_attn_probs=True,
            **keywords(way, rules),
        )
        exact.check(out, lse)


@random_problems
def test_attention_is_exact(way: Way, data: st.DataObject) -> None:
    draw: Any = data.draw
    lengths = st.integers(0, way.at_most(90))
    batch, query_len, key_len = draw(st.tuples(st.integers(1, 3), lengths, lengths))
    key_heads, group, dim = draw(heads_and_dims(way))
    value_dim = draw(st.sampled_from([dim, 24]) if way.is_simulated else st.integers(1, 70))
    dtype, heads = draw(st.sampled_from(DTYPES)), key_heads * group
    q = strided(draw, way.put(torch.randn(batch, query_len, heads, dim).to(dtype)))
    k = strided(draw, way.put(torch.randn(batch, key_len, key_heads, dim).to(dtype)))
    v = strided(draw, way.put(torch.randn(batch, key_len, key_heads, value_dim).to(dtype)))
    rules = draw(all_rules(batch, heads))
    rules.top_left = draw(st.booleans())
    sizes = (batch, heads, query_len, key_len)
    shape = [draw(st.sampled_from([1, size])) for size in sizes][draw(st.integers(0, 3)) :]
    kind = draw(st.sampled_from(["none", "bias", "mask"]))
    if kind == "bias":
        rules.bias = torch.randn(shape).to(draw(st.sampled_from(DTYPES)))
        rules.bias = rules.bias.masked_fill(torch.rand(shape) < 0.2, -torch.inf)
    elif kind == "mask":
        rules.mask = torch.rand(shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    rules.sinks = draw(
        st.sampled_from([None, torch.randn(heads), torch.full((heads,), -torch.inf)])
    )
    exact = exact_attention(q.cpu(), k.cpu(), v.cpu(), rules, way.arithmetic(dtype))
    extras: dict[str, Any] = {"bias": rules.bias, "mask": rules.mask, "sinks": rules.sinks}
    extras = {name: extra if extra is None else way.put(extra) for name, extra in extras.items()}
    with way.serves(draw(st.integers(1, 200))):
        out, lse = attention(
            q,
            k,
            v,
            top_left=rules.top_left,
            return_lse=True,
            **extras,
            **keywords(way, rules),
        )
        exact.check(out, lse)


def assert_same(expected: tuple[Tensor, ...], got: Any) -> None:
    for one, other in zip(expected, got, strict=False):
        assert torch.equal(one, other)


@given(
    st.sampled_from([(1, 1, 8, 1, 64), (2, 300, 2, 2, 64), (1, 1, 1, 8, 128), (1, 700, 1, 4, 40)]),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_results_depend_neither_on_threads_nor_on_luck(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, causal: bool
) -> None:
    batch, query_len, key_heads, group, dim = sizes
    q = torch.randn(batch, query_len, key_heads * group, dim).to(dtype)
    k, v = torch.randn(2, batch, 5000, key_heads, dim).to(dtype)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(flash_attn_func(q, k, v, causal=causal, return_attn_probs=True))
    for result in results[1:]:
        assert_same(results[0], result)


@ways
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys_are_zero_with_infinite_lse(way: Way, dtype: torch.dtype) -> None:
    q, k = (way.put(torch.randn(1, length, 2, 8).to(dtype)) for length in (5, 3))
    with way.serves():
        out, lse, _ = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
        none, none_lse, _ = flash_attn_func(q, k[:, :0], k[:, :0], return_attn_probs=True)
    assert out[:, :2].eq(0).all()
    assert lse[..., :2].eq(torch.inf).all()
    assert lse[..., 2:].isfinite().all()
    assert none.eq(0).all()
    assert none_lse.eq(torch.inf).all()


@ways
@pytest.mark.parametrize(
    ("batch", "query_len", "key_len"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0), (1, 0, 0)]
)
def test_zero_sizes(way: Way, batch: int, query_len: int, key_len: int) -> None:
    q = way.put(torch.randn(batch, query_len, 2, 8))
    k = way.put(torch.randn(batch, key_len, 1, 8))
    with way.serves():
        out, lse, _ = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert (out.shape, lse.shape) == (q.shape, (batch, 2, query_len))
    assert out.eq(0).all()


@ways
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poison_stays_in_the_rows_that_see_it(way: Way, poison: float) -> None:
    q, k, v = torch.randn(3, 1, 40, 2, 16)
    k[0, 30, 0] = poison
    with way.serves():
        out = flash_attn_func(way.put(q), way.put(k), way.put(v), causal=True)
    assert out[0, :30].isfinite().all()
    assert out[0, :, 1].isfinite().all()
    if math.isnan(poison):
        assert out[0, 30:, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("query_len", [1, 2, 40])
def test_subnormal_queries_meet_huge_keys(query_len: int, dtype: torch.dtype) -> None:
    # An instruction that takes subnormal numbers for 0 would make all keys alike.
    q = torch.randint(-4, 5, (1, query_len, 8, 128)).to(dtype) * 2.0**-130
    k = torch.randint(-4, 5, (1, 70, 2, 128)).to(dtype) * 2.0**124
    v = torch.randn(1, 70, 2, 128).to(dtype)
    assert (q != 0).any()
    assert q.abs().max() < torch.finfo(dtype).tiny
    keys, values = (x.double().repeat_interleave(4, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), keys) / 128**0.5
    assert scores.std() > 0.05
    expected = scores.softmax(-1) @ values.transpose(1, 2)
    # Half of 2^-149 in each element of the scaled q, times 128 elements of k up to 2^126, is 2^-17
    # in a score and twice that in a probability. Then comes the rounding of the output.
    bound = 4 * 2.0**-16 * v.abs().max() + torch.finfo(dtype).eps / 2 * expected.abs()
    error = (flash_attn_func(q, k, v).double().transpose(1, 2) - expected).abs()
    assert (error <= bound).all()


def test_output_keeps_the_layout_of_q() -> None:
    q = torch.randn(2, 3, 7, 16).transpose(1, 2)
    out = flash_attn_func(q, q, q)
    assert out.stride() == q.stride()
    wide = torch.randn(2, 7, 3, 24)
    out = flash_attn_func(q, q, wide)
    assert out.is_contiguous()


def test_overlapping_and_broadcast_inputs_are_read_in_place() -> None:
    row = torch.randn(1, 1, 1, 32)
    q, k, v = row.expand(2, 9, 4, 32), row.expand(2, 11, 1, 32), row.expand(2, 11, 1, 32)
    exact = exact_attention(q, k, v, Rules())
    exact.check(*checked(flash_attn_func(q, k, v, return_attn_probs=True)))
    sliding = torch.randn(200).as_strided((1, 20, 2, 32), (0, 4, 1, 1))
    exact = exact_attention(sliding, sliding, sliding, Rules())
    exact.check(*checked(flash_attn_func(sliding, sliding, sliding, return_attn_probs=True)))


def test_unaligned_memory_is_copied() -> None:
    memory = bytearray(torch.randn(2 * 5 * 2 * 8).numpy().tobytes())
    aligned = torch.frombuffer(memory, dtype=torch.float32).view(2, 5, 2, 8)
    moved = bytearray(b"\0" + memory)
    unaligned = torch.frombuffer(moved, dtype=torch.float32, offset=1).view(2, 5, 2, 8)
    assert unaligned.data_ptr() % 4 != 0
    expected = flash_attn_func(aligned, aligned, aligned, return_attn_probs=True)
    again = flash_attn_func(unaligned, unaligned, unaligned, return_attn_probs=True)
    assert_same(checked(expected), again)


@pytest.mark.parametrize("dim", [1, 4])
def test_lazily_negated_tensors_are_read_with_their_sign(dim: int) -> None:
    values = torch.randn(3, 1, 6, 2, dim, dtype=torch.complex64).conj().imag
    assert values.is_neg()
    q, k, v = values
    expected = flash_attn_func(*(t.resolve_neg() for t in (q, k, v)))
    assert_same((expected,), (flash_attn_func(q, k, v),))


def checked(result: Any) -> tuple[Tensor, Tensor]:
    out, lse, _ = result
    return out, lse


class Index:
    """A whole number of a foreign type, as numpy's are."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"Index({self.value})"


@pytest.mark.parametrize(
    "window",
    [[5, 2], torch.tensor([5, 2]), (Index(5), Index(2)), range(5, 1, -3), torch.Size([5, 2])],
    ids=str,
)
def test_windows_of_every_kind(window: Any) -> None:
    q = torch.randn(1, 20, 2, 8)
    expected = flash_attn_func(q, q, q, window_size=(5, 2))
    assert_same((expected,), (flash_attn_func(q, q, q, window_size=window),))


def test_numbers_of_every_kind() -> None:
    q = torch.randn(1, 20, 2, 8)
    expected = flash_attn_func(q, q, q, 0.0, 0.5, True, (-7, 3), 2.0)
    kinds: list[tuple[Any, Any, Any]] = [
        (torch.tensor(0.5), torch.tensor(True), torch.tensor(2)),
        (0.5, 1, 2),
        (torch.tensor([0.5]), True, torch.tensor([2.0], dtype=torch.float16)),
    ]
    for scale, causal, softcap in kinds:
        got = flash_attn_func(q, q, q, 0, scale, causal, (-1, -99), softcap, deterministic=True)
        assert_same((expected,), (got,))


SIGNATURES = {
    "flash_attn_func": "(q, k, v, *)",
    "flash_attn_kvpacked_func": "(q, kv, *)",
    "flash_attn_qkvpacked_func": "(qkv, *)",
    "flash_attn_varlen_func": "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
    "max_seqlen_k, *, block_table=None)",
    "flash_attn_varlen_kvpacked_func": "(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, "
    "max_seqlen_k, *)",
    "flash_attn_varlen_qkvpacked_func": "(qkv, cu_seqlens, max_seqlen, *)",
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False)",
}
TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name: str) -> None:
    signature = inspect.signature(getattr(metal_flash_attn, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    plain = signature.replace(parameters=bare, return_annotation=signature.empty)
    assert str(plain) == SIGNATURES[name].replace("*", TAIL)


def test_plan_names_tier_and_reasons() -> None:
    q = torch.randn(1, 20, 2, 8)
    chosen = plan(q, q, q, causal=True)
    assert chosen.tier == "cpu"
    assert chosen.isa in metal_flash_attn._native.instruction_sets()
    reasons = dict(chosen.reasons)
    assert reasons["torch"] == "cpu comes before it and serves this call"
    assert reasons["simdgroup"] == "needs tensors on an MPS device"
    assert repr(chosen).startswith(f"Plan(tier='cpu', isa='{chosen.isa}', reasons=[('")
    assert chosen == plan(q, q, q)
    elsewhere = plan(*[q.to("meta")] * 3)
    assert (elsewhere.tier, elsewhere.isa) == ("torch", None)
    with pytest.raises(ValueError, match=r"k has shape \(1, 20, 3, 8\)"):
        plan(q, q.new_empty(1, 20, 3, 8), q)


def test_forced_tier_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 20, 2, 8)
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "v1")
    with pytest.raises(NotImplementedError, match=r"MTLFLASHATTN_KERNEL.*needs tensors on an MPS"):
        flash_attn_func(q, q, q)


def test_every_instruction_set_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 70, 2, 40)
    exact = exact_attention(q, k, v, Rules(causal=True))
    available = metal_flash_attn._native.instruction_sets()
    for isa in ["portable", "avx2", "avx512", "neon"]:
        monkeypatch.setenv("MTLFLASHATTN_CPU_ISA", isa)
        if isa in available:
            assert plan(q, k, v).isa == isa
            exact.check(*checked(flash_attn_func(q, k, v, causal=True, return_attn_probs=True)))
        else:
            with pytest.raises(NotImplementedError, match=f"{isa} is not supported; this machine"):
                flash_attn_func(q, k, v)


def test_a_bad_setting_warns_once_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 20, 2, 8)
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "fast")
    with pytest.warns(RuntimeWarning, match='MTLFLASHATTN_KERNEL is "fast"; allowed: auto') as seen:
        flash_attn_func(q, q, q)
    assert len(seen) == 1
    # Warnings are errors here: the second call gives none.
    flash_attn_func(q, q, q)
    monkeypatch.setenv("MTLFLASHATTN_TORCH_CHUNK", "0")
    with pytest.warns(RuntimeWarning) as seen:
        flash_attn_func(q, q, q)
    assert len(seen) == 2
    monkeypatch.delenv("MTLFLASHATTN_KERNEL")
    monkeypatch.delenv("MTLFLASHATTN_TORCH_CHUNK")
    flash_attn_func(q, q, q)


def test_trace_counts_by_shape_and_tier() -> None:
    q = torch.randn(2, 20, 2, 8)
    flash_attn_func(q, q, q)
    with trace() as outer:
        with trace() as inner:
            flash_attn_func(q, q, q)
        flash_attn_func(q, q, q)
        flash_attn_func(q.half(), q.half(), q.half(), causal=True)
    flash_attn_func(q, q, q)
    most, least = outer.calls
    assert (most.calls, most.dtype, most.head_dim, most.value_dim) == (2, "float32", 8, 8)
    assert (most.query_len, most.key_len, most.causal, most.tier) == (20, 20, False, "cpu")
    assert (least.calls, least.dtype, least.causal) == (1, "float16", True)
    assert repr(least).startswith("TraceEntry(calls=1, dtype='float16', head_dim=8,")
    assert [entry.calls for entry in inner.calls] == [1]
    assert outer.summary().startswith("[MTLFLASHATTN_TRACE] 3 attention call(s), 2 distinct")
    with trace() as nothing:
        pass
    assert (nothing.calls, nothing.summary()) == ([], "")


CALL = """
import torch, metal_flash_attn
q = torch.arange(2 * 6 * 2 * 8).view(2, 6, 2, 8).sin()
out, lse, _ = metal_flash_attn.flash_attn_func(q, q, q, causal=True, return_attn_probs=True)
qkv = torch.stack([q] * 3, 2)
assert torch.equal(metal_flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), out)
print(out.double().sum().item(), lse.double().sum().item())
"""


def test_trace_variable_prints_at_exit(child: Any) -> None:
    process = child(CALL, MTLFLASHATTN_TRACE="1")
    assert process.stderr.startswith("[MTLFLASHATTN_TRACE] 2 attention call(s), 1 distinct")
    assert child(CALL).stderr == ""


def test_same_results_without_the_exchange_api(child: Any) -> None:
    before = "import torch; del torch.Tensor.__dlpack_c_exchange_api__\n"
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no exchange API to do without")
    assert child(before + CALL).stdout == child(CALL).stdout


def test_works_without_numpy(child: Any) -> None:
    before = "import sys, warnings; sys.modules['numpy'] = None; warnings.simplefilter('ignore')\n"
    after = "assert sys.modules['numpy'] is None"
    assert child(before + CALL + after).stdout == child(CALL).stdout


def test_reference_is_not_lenient() -> None:
    q, k, v = torch.randn(3, 1, 50, 2, 16)
    out, lse = checked(flash_attn_func(q, k, v, return_attn_probs=True))
    exact = exact_attention(q, k, v, Rules())
    exact.check(out, lse)
    one_key_less = exact_attention(q, k[:, 1:], v[:, 1:], Rules())
    for wrong in [
        (out + 1e-4, lse),
        (out, lse + 1e-4),
        (out * torch.nan, lse),
        (one_key_less.out.float(), lse),
        (out, one_key_less.lse.float()),
    ]:
        with pytest.raises(AssertionError):
            exact.check(*wrong)
