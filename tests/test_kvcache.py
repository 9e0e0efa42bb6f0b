"""`flash_attn_with_kvcache` and paged keys: any combination of arguments against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcache_cases import Case, cases, check, coarse
from metal_flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from reference import Rules, packed_attention
from torch import Tensor
from ways import WAYS, Way, parametrize, random_problems

CACHE_WAYS = [way for way in WAYS if way.tier in ("cpu", "torch")]
CACHE_WAYS += [Way("simulator", "decode"), Way("standin", "decode")]
ways = parametrize(CACHE_WAYS)


def any_case(test: Callable[[Way, st.DataObject], None]) -> Callable[[Way], None]:
    """Runs `test` on random calls, each way."""
    return random_problems(test, ways, examples=25)


@any_case
def test_results_and_caches(way: Way, data: st.DataObject) -> None:
    case = data.draw(cases(longest=way.at_most(70)))
    with way.serves():
        check(case, way.arithmetic(case.q.dtype))


@settings(max_examples=25)
@given(data=st.data())
def test_the_planners_choice(data: st.DataObject) -> None:
    check(data.draw(cases(longest=200)))


@any_case
def test_packed_queries_over_pages(way: Way, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    batch, size, per_sequence = data.draw(st.integers(1, 4)), 16, data.draw(st.integers(1, 3))
    query_lens = torch.randint(0, 6, (batch,), generator=generator)
    key_lens = torch.randint(0, size * per_sequence + 1, (batch,), generator=generator)
    blocks = batch * per_sequence + 2
    q = torch.randn(int(query_lens.sum()) + 2, 4, 20, generator=generator).to(dtype)
    k, v = torch.randn(2, blocks, size, 2, 20, generator=generator).to(dtype)
    # Sequences may share pages that nobody writes.
    table = torch.randint(0, blocks, (batch, per_sequence), generator=generator).int()
    causal, window = data.draw(st.booleans()), (data.draw(st.integers(-1, 20)), -1)
    slopes = torch.rand(batch, 4, generator=generator) if data.draw(st.booleans()) else None
    cu_q, cu_k = ([0, *lens.cumsum(0).tolist()] for lens in (query_lens, key_lens))
    with way.serves():
        out, lse, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            torch.tensor(cu_q, dtype=torch.int32),
            torch.tensor(cu_k, dtype=torch.int32),
            max(query_lens.tolist()),
            max(key_lens.tolist()),
            causal=causal,
            window_size=window,
            alibi_slopes=slopes,
            return_attn_probs=True,
            block_table=table,
        )
    keys, values = (
        torch.cat([t[table[b].long()].flatten(0, 1)[:n] for b, n in enumerate(key_lens.tolist())])
        for t in (k, v)
    )
    rules = Rules(causal=causal, window=window, alibi_slopes=slopes)
    expected = packed_attention(q, keys, values, cu_q, cu_k, rules, way.arithmetic(dtype))
    expected.check(out, lse)


@ways
def test_keys_are_split_as_asked(way: Way) -> None:
    """By the decode and the panel path of the CPU engine, and by kernels."""
    generator = torch.Generator().manual_seed(1)
    for query_len, lengths in [(1, [700, 0]), (5, [700, 131]), (1, 300)]:
        k_cache, v_cache = torch.randn(2, 2, 720, 2, 16, generator=generator)
        q = torch.randn(2, query_len, 8, 16, generator=generator)
        filled = lengths if isinstance(lengths, int) else torch.tensor(lengths).int()
        outs = []
        for num_splits in (0, 1, 3, 128):
            rest = {"cache_seqlens": filled, "causal": True, "num_splits": num_splits}
            case = Case(q, k_cache, v_cache, [k_cache, v_cache], rest)
            with way.serves():
                out, lse = case.run()
            case.expect(way.arithmetic(q.dtype)).check(out, lse)
            outs.append(out)
        # Sums in another order, where keys are split at all.
        assert torch.equal(outs[1], outs[2]) == (way.tier == "torch")


def test_compiled_calls_split_keys_as_asked() -> None:
    k_cache, v_cache = torch.randn(2, 1, 700, 2, 16)
    q = torch.randn(1, 1, 8, 16)
    compiled = torch.compile(flash_attn_with_kvcache, backend="eager", fullgraph=True)
    one, three = (flash_attn_with_kvcache(q, k_cache, v_cache, num_splits=n) for n in (1, 3))
    assert not torch.equal(one, three)
    for num_splits, expected in [(1, one), (3, three)]:
        assert torch.equal(compiled(q, k_cache, v_cache, num_splits=num_splits), expected)
    with pytest.raises(ValueError, match="num_splits is 129; allowed: 0 to 128"):
        compiled(q, k_cache, v_cache, num_splits=129)


@ways
def test_ordinary_rotary_tables_are_rounded_once(way: Way) -> None:
    """Angles as models have them: a rotated key is within one rounding of the exact one."""
    angles = torch.arange(40)[:, None] * 10000.0 ** (-torch.arange(16) / 16)
    for dtype, unit in [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)]:
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        k_cache, v_cache = torch.zeros(2, 2, 40, 2, 64, dtype=dtype)
        rest = {
            "k": torch.randn(2, 3, 2, 64).to(dtype),
            "v": torch.randn(2, 3, 2, 64).to(dtype),
            "rotary_cos": cos,
            "rotary_sin": sin,
            "cache_seqlens": torch.tensor([30, 7], dtype=torch.int32),
        }
        q = torch.randn(2, 1, 4, 64).to(dtype)
        case = Case(q, k_cache, v_cache, [k_cache, v_cache], rest)
        with way.serves():
            case.run()
        exact = Case(
            q.double(),
            k_cache,
            v_cache,
            [],
            {**rest, "rotary_cos": cos.double(), "rotary_sin": sin.double()},
        ).rotated(rest["k"].double(), advance=True)
        for sequence, filled in enumerate(case.filled()):
            error = (k_cache[sequence, filled : filled + 3].double() - exact[sequence]).abs()
            # Two products and a sum in float32, then one rounding.
            size = rest["k"][sequence].double().abs().amax(-1, keepdim=True)
            assert (error <= unit * exact[sequence].abs() + 2.0**-22 * 2 * size).all()


def test_decoding_step_by_step_gives_what_one_call_gives() -> None:
    """A prompt and single tokens through a paged cache, against attention over the whole."""
    torch.manual_seed(1)
    lengths, steps = [19, 3], 20
    q, k, v = (torch.randn(2, 19 + steps, heads, 32) for heads in (4, 2, 2))
    k_cache, v_cache = torch.randn(2, 8, 16, 2, 32)
    table = torch.tensor([[6, 1, 3], [0, 7, 2]], dtype=torch.int32)
    filled = torch.zeros(2, dtype=torch.int32)
    outs: list[list[Tensor]] = [[], []]
    for sequence, length in enumerate(lengths):
        own = slice(sequence, sequence + 1)
        out = flash_attn_with_kvcache(
            q[own, :length],
            k_cache,
            v_cache,
            k[own, :length],
            v[own, :length],
            cache_seqlens=filled[own],
            block_table=table[own],
            causal=True,
        )
        outs[sequence].append(out[0])
        filled[sequence] = length
    for _ in range(steps):
        now = torch.arange(2), filled.long()
        out = flash_attn_with_kvcache(
            q[now][:, None],
            k_cache,
            v_cache,
            k[now][:, None],
            v[now][:, None],
            cache_seqlens=filled,
            block_table=table,
            causal=True,
        )
        for sequence in range(2):
            outs[sequence].append(out[sequence])
        filled += 1
    for sequence, length in enumerate(lengths):
        whole = slice(0, length + steps)
        expected = flash_attn_func(
            q[sequence, None, whole],
            k[sequence, None, whole],
            v[sequence, None, whole],
            causal=True,
        )[0]
        torch.testing.assert_close(torch.cat(outs[sequence]), expected, rtol=1e-5, atol=1e-5)


def test_a_plain_cache_is_plain_attention() -> None:
    q, k_cache, v_cache = torch.randn(2, 3, 4, 24), *torch.randn(2, 2, 50, 2, 24)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, causal=True)
    torch.testing.assert_close(out, flash_attn_func(q, k_cache, v_cache, causal=True))


def test_writing_counts_as_writing() -> None:
    """Autograd notices a cache that it saved and that was written since."""
    k_cache, v_cache = torch.randn(2, 1, 8, 1, 8)
    weight = torch.randn(8, requires_grad=True)
    product = (weight * k_cache).sum()
    new = torch.randn(1, 1, 1, 8)
    with torch.no_grad():
        flash_attn_with_kvcache(new, k_cache, v_cache, new, new, cache_seqlens=3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    version = k_cache._version
    flash_attn_with_kvcache(new, k_cache, v_cache, cache_seqlens=3)
    assert k_cache._version == version


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        caches = torch.zeros(2, 1, 8, 1, 8)
        new = torch.ones(1, 1, 1, 8)
        out = flash_attn_with_kvcache(new, caches[0], caches[1], new, new, cache_seqlens=0)
        assert torch.equal(out, new)
        assert caches.sum() == 16


def test_copied_on_write_caches_leave_the_original_alone() -> None:
    original = torch.zeros(1, 8, 1, 8)
    k_cache, v_cache = torch._lazy_clone(original), torch.zeros(1, 8, 1, 8)
    new = torch.ones(1, 1, 1, 8)
    flash_attn_with_kvcache(new, k_cache, v_cache, new, new, cache_seqlens=0)
    assert original.sum() == 0
    assert k_cache.sum() == 8


EMPTY: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"cache_seqlens": 0}, (1, 2, 2, 8)),
    ({"q": torch.randn(0, 2, 2, 8), "cache": (0, 4)}, (0, 2, 2, 8)),
    ({"q": torch.randn(1, 0, 2, 8)}, (1, 0, 2, 8)),
]


@pytest.mark.parametrize(("arguments", "shape"), EMPTY)
def test_nothing_to_attend_to(arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    arguments = dict(arguments)
    q = arguments.pop("q", torch.randn(1, 2, 2, 8))
    caches = torch.randn(2, *arguments.pop("cache", (1, 4)), 1, 8)
    out, lse = flash_attn_with_kvcache(
        q, caches[0], caches[1], **arguments, return_softmax_lse=True
    )
    assert out.shape == shape
    if "cache_seqlens" in arguments:
        assert not out.any()
        assert (lse == torch.inf).all()


def test_coarse_values_rotate_exactly() -> None:
    """What the comparison bit for bit stands on."""
    values = coarse(torch.Generator().manual_seed(0), 4000)
    sums = values[:2000, None] * torch.tensor([0, 0.5, 1]) + values[2000:, None] * 0.5
    assert torch.equal(sums, sums.bfloat16().float())
