"""Wrong calls over a cache: each gets an error that says what is wrong, and leaves the caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from metal_flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(**changed: Any) -> dict[str, Any]:
    """Two sequences get two keys each, in a cache of three slots of 20 positions."""
    torch.manual_seed(0)
    arguments = {
        "q": torch.randn(2, 2, 4, 16),
        "k_cache": torch.randn(3, 20, 2, 16),
        "v_cache": torch.randn(3, 20, 2, 16),
        "k": torch.randn(2, 2, 2, 16),
        "v": torch.randn(2, 2, 2, 16),
        "rotary_cos": torch.randn(24, 8),
        "rotary_sin": torch.randn(24, 8),
        "cache_seqlens": int32(5, 9),
        "cache_batch_idx": int32(2, 0),
    }
    return {**arguments, **changed}


def paged(**changed: Any) -> dict[str, Any]:
    """The same in pages: 40 and 9 positions are filled."""
    arguments = {
        **dense(),
        "k_cache": torch.randn(6, 16, 2, 16),
        "v_cache": torch.randn(6, 16, 2, 16),
        "rotary_cos": torch.randn(48, 8),
        "rotary_sin": torch.randn(48, 8),
        "cache_seqlens": int32(40, 9),
        "cache_batch_idx": None,
        "block_table": int32([4, 0, 2], [5, -1, -1]),
    }
    return {**arguments, **changed}


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(3, 20, 2, 16)


def on_cache(cache: str, other: str, cut: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    arguments = dense()
    return {**arguments, other: cut(arguments[cache])}


WINDOWED = torch.randn(200).as_strided((3, 20, 2, 16), (60, 3, 1, 1))
BOTH = torch.randn(3, 21, 2, 16)

WRONG_CALLS: list[tuple[str, Callable[[], dict[str, Any]], type[Exception], str]] = [
    # Contents.
    (
        "a stale length",
        lambda: dense(cache_seqlens=int32(5, 19)),
        ValueError,
        "cache_seqlens is 19 at index 1; allowed: 0 to 18: 20 positions in the cache, less 2 new",
    ),
    (
        "a negative length",
        lambda: dense(cache_seqlens=int32(-1, 9)),
        ValueError,
        "cache_seqlens is -1 at index 0; allowed: 0 to 18",
    ),
    (
        "a length as a number",
        lambda: dense(cache_seqlens=19),
        ValueError,
        "cache_seqlens is 19; allowed: 0 to 18",
    ),
    (
        "a negative number",
        lambda: dense(cache_seqlens=-3),
        ValueError,
        "cache_seqlens is -3; allowed: 0 to 18",
    ),
    (
        "a length beyond the block table",
        lambda: paged(cache_seqlens=int32(47, 9)),
        ValueError,
        "cache_seqlens is 47 at index 0; allowed: 0 to 46: 48 positions",
    ),
    (
        "a slot that is not there",
        lambda: dense(cache_batch_idx=int32(2, 3)),
        ValueError,
        "cache_batch_idx is 3 at index 1; allowed: 0 to 2, the slots of the cache",
    ),
    (
        "a negative slot",
        lambda: dense(cache_batch_idx=int32(-1, 0)),
        ValueError,
        "cache_batch_idx is -1 at index 0",
    ),
    (
        "a slot for two sequences",
        lambda: dense(cache_batch_idx=int32(2, 2)),
        ValueError,
        "cache_batch_idx is 2 at index 0 and at index 1; allowed: a slot of its own",
    ),
    (
        "padding behind the end",
        lambda: dense(cache_leftpad=int32(0, 10)),
        ValueError,
        "cache_leftpad is 10 at index 1; allowed: 0 to 9, the filled length",
    ),
    (
        "negative padding",
        lambda: dense(cache_leftpad=int32(-1, 0)),
        ValueError,
        "cache_leftpad is -1 at index 0",
    ),
    (
        "a page that is not there",
        lambda: paged(block_table=int32([4, 6, 2], [5, -1, -1])),
        ValueError,
        "block_table is 6 at index (0, 1); allowed: 0 to 5, the pages of the cache",
    ),
    (
        "a page that was never given",
        lambda: paged(block_table=int32([4, 0, -1], [5, -1, -1])),
        ValueError,
        "block_table is -1 at index (0, 2); allowed: 0 to 5",
    ),
    (
        "two sequences that write one page",
        lambda: paged(block_table=int32([4, 0, 5], [5, -1, -1])),
        ValueError,
        "block_table is 5 at index (0, 2) and at index (1, 0); allowed: pages that get new keys",
    ),
    (
        "a page that another sequence reads",
        lambda: paged(block_table=int32([5, 0, 2], [5, -1, -1])),
        ValueError,
        "block_table is 5 at index (1, 0) and at index (0, 0)",
    ),
    (
        "a page that one sequence has twice",
        lambda: paged(block_table=int32([2, 0, 2], [5, -1, -1])),
        ValueError,
        "block_table is 2 at index (0, 2) and at index (0, 0)",
    ),
    (
        "queries beyond the tables",
        lambda: dense(q=torch.randn(2, 9, 4, 16), cache_seqlens=int32(5, 18), causal=True),
        ValueError,
        "rotary_cos is a tensor of 24 positions; allowed: more than 26, the position of the last",
    ),
    # Dtypes.
    (
        "int64 lengths",
        lambda: dense(cache_seqlens=torch.tensor([5, 9])),
        TypeError,
        "cache_seqlens has dtype int64; allowed: int32",
    ),
    (
        "an int64 table",
        lambda: paged(block_table=torch.tensor([[4, 0, 2], [5, 1, 3]])),
        TypeError,
        "block_table has dtype int64; allowed: int32",
    ),
    (
        "int64 slots",
        lambda: dense(cache_batch_idx=torch.tensor([2, 0])),
        TypeError,
        "cache_batch_idx has dtype int64; allowed: int32",
    ),
    (
        "float padding",
        lambda: dense(cache_leftpad=torch.zeros(2)),
        TypeError,
        "cache_leftpad has dtype float32; allowed: int32",
    ),
    (
        "a cache of another dtype",
        lambda: dense(k_cache=torch.zeros(3, 20, 2, 16).half()),
        TypeError,
        "k_cache has dtype float16; allowed: float32, the dtype of q",
    ),
    (
        "new keys of another dtype",
        lambda: dense(k=torch.zeros(2, 2, 2, 16).half()),
        TypeError,
        "k has dtype float16; allowed: float32, the dtype of q",
    ),
    (
        "tables of another dtype",
        lambda: dense(rotary_sin=torch.zeros(24, 8).double()),
        TypeError,
        "rotary_sin has dtype float64; allowed: float32, float16 or bfloat16",
    ),
    # Shapes.
    (
        "a cache for another batch",
        lambda: dense(cache_batch_idx=None),
        ValueError,
        "k_cache has shape (3, 20, 2, 16); allowed: batch = 2, as in q, or cache_batch_idx",
    ),
    (
        "caches of different lengths",
        lambda: dense(v_cache=torch.zeros(3, 19, 2, 16)),
        ValueError,
        "v_cache has shape (3, 19, 2, 16); allowed: dimension 1 = 20, as in k_cache",
    ),
    (
        "pages of a size that no kernel reads",
        lambda: paged(k_cache=torch.zeros(6, 20, 2, 16), v_cache=torch.zeros(6, 20, 2, 16)),
        ValueError,
        "k_cache has shape (6, 20, 2, 16); allowed: pages of a multiple of 16 keys",
    ),
    (
        "new keys of another batch",
        lambda: dense(k=torch.zeros(1, 2, 2, 16), v=torch.zeros(1, 2, 2, 16)),
        ValueError,
        "k has shape (1, 2, 2, 16); allowed: batch = 2, as in q",
    ),
    (
        "fewer new values than keys",
        lambda: dense(v=torch.zeros(2, 1, 2, 16)),
        ValueError,
        "v has shape (2, 1, 2, 16); allowed: new_seqlen = 2, as in k",
    ),
    (
        "more new keys than positions",
        lambda: dense(
            k=torch.zeros(2, 21, 2, 16),
            v=torch.zeros(2, 21, 2, 16),
            rotary_cos=None,
            rotary_sin=None,
        ),
        ValueError,
        "k has shape (2, 21, 2, 16); allowed: at most 20 new keys",
    ),
    (
        "lengths for another batch",
        lambda: dense(cache_seqlens=int32(5)),
        ValueError,
        "cache_seqlens has shape (1); allowed: (2): one for each sequence",
    ),
    (
        "a table for another batch",
        lambda: paged(block_table=int32([4, 0, 2])),
        ValueError,
        "block_table has shape (1, 3); allowed: (2, max_pages)",
    ),
    (
        "tables shorter than the cache",
        lambda: dense(rotary_cos=torch.zeros(19, 8), rotary_sin=torch.zeros(19, 8)),
        ValueError,
        "rotary_cos has shape (19, 8); allowed: at least 20 positions",
    ),
    (
        "tables wider than a head",
        lambda: dense(rotary_cos=torch.zeros(24, 9), rotary_sin=torch.zeros(24, 9)),
        ValueError,
        "rotary_cos has shape (24, 9); allowed: (positions, rotary_dim / 2) with rotary_dim from 2",
    ),
    # What is missing, or does not go together.
    (
        "keys without values",
        lambda: dense(v=None),
        ValueError,
        "v is None; allowed: a tensor, as k is one",
    ),
    (
        "cos without sin",
        lambda: dense(rotary_sin=None),
        ValueError,
        "rotary_sin is None; allowed: a tensor, as rotary_cos is one",
    ),
    (
        "rotation of nothing new",
        lambda: dense(k=None, v=None),
        ValueError,
        "k is None; allowed: a tensor, as rotary_cos is one",
    ),
    (
        "new keys behind nothing",
        lambda: dense(cache_seqlens=None),
        ValueError,
        "cache_seqlens is None; allowed: the filled length of each sequence",
    ),
    (
        "pages and slots",
        lambda: paged(cache_batch_idx=int32(0, 1)),
        NotImplementedError,
        "cache_batch_idx: together with block_table is not supported",
    ),
    (
        "pages and padding",
        lambda: paged(cache_leftpad=int32(0, 1)),
        NotImplementedError,
        "cache_leftpad: together with block_table is not supported",
    ),
    (
        "too many splits",
        lambda: dense(num_splits=129),
        ValueError,
        "num_splits is 129; allowed: 0 to 128",
    ),
    (
        "no tensor",
        lambda: dense(block_table=[[0, 1]]),
        TypeError,
        "block_table is a list; allowed: torch.Tensor",
    ),
    # Caches that cannot be written.
    (
        "a cache with gaps in its rows",
        lambda: dense(k_cache=torch.zeros(3, 20, 2, 32)[..., ::2]),
        ValueError,
        "k_cache is a tensor with last stride 2; allowed: aligned tensors whose last dimension",
    ),
    (
        "an expanded cache",
        lambda: dense(v_cache=torch.zeros(1, 20, 2, 16).expand(3, 20, 2, 16)),
        ValueError,
        "v_cache is a tensor whose elements share memory; allowed: caches with memory for each",
    ),
    (
        "a cache of overlapping windows",
        lambda: dense(k_cache=WINDOWED),
        ValueError,
        "k_cache is a tensor whose elements share memory",
    ),
    (
        "an inference tensor",
        lambda: dense(k_cache=inference()),
        ValueError,
        "k_cache is an inference tensor outside torch.inference_mode(); allowed: tensors that can",
    ),
    (
        "one cache for keys and values",
        lambda: on_cache("k_cache", "v_cache", lambda cache: cache),
        ValueError,
        "v_cache is a tensor in the memory of k_cache; allowed: tensors apart from the caches",
    ),
    (
        "caches that overlap by all rows but one",
        lambda: dense(k_cache=BOTH[:, :20], v_cache=BOTH[:, 1:]),
        ValueError,
        "v_cache is a tensor in the memory of k_cache",
    ),
    (
        "new keys in the cache",
        lambda: on_cache("k_cache", "k", lambda cache: cache[:2, :2]),
        ValueError,
        "k is a tensor in the memory of k_cache",
    ),
    (
        "queries in the cache",
        lambda: on_cache("v_cache", "q", lambda cache: cache.view(-1)[:256].view(2, 2, 4, 16)),
        ValueError,
        "q is a tensor in the memory of v_cache",
    ),
    # Gradients.
    (
        "a query that requires grad",
        lambda: dense(q=torch.randn(2, 2, 4, 16, requires_grad=True)),
        NotImplementedError,
        "q: a tensor that requires grad, in attention over a cache, is not supported; call under",
    ),
    (
        "a cache that requires grad",
        lambda: dense(k_cache=torch.nn.Parameter(torch.zeros(3, 20, 2, 16))),
        NotImplementedError,
        "k_cache: a tensor that requires grad",
    ),
    (
        "another device",
        lambda: dense(cache_seqlens=int32(5, 9).to("meta")),
        ValueError,
        "cache_seqlens is on device meta; allowed: cpu, the device of q",
    ),
]


@pytest.mark.parametrize("row", WRONG_CALLS, ids=[row[0] for row in WRONG_CALLS])
def test_wrong_calls_leave_the_caches(row: Any) -> None:
    _, make, exception, message = row
    arguments = make()
    caches = [arguments[name] for name in ("k_cache", "v_cache")]
    before = [cache.detach().clone() for cache in caches]
    with pytest.raises(exception) as caught:
        flash_attn_with_kvcache(**arguments)
    assert caught.type is exception
    assert str(caught.value).startswith(message)
    assert all(torch.equal(*pair) for pair in zip(before, caches, strict=True))


def test_the_right_calls_are_right() -> None:
    """What the wrong ones were made of."""
    for arguments in (dense(), paged(), dense(cache_leftpad=int32(5, 0))):
        before = arguments["k_cache"].clone()
        assert flash_attn_with_kvcache(**arguments).isfinite().all()
        assert (arguments["k_cache"] != before).any(-1).sum() == 2 * 2 * 2


def test_halves_of_one_tensor_are_apart() -> None:
    for both, axis in [(torch.zeros(3, 2, 20, 2, 16), 1), (torch.zeros(3, 20, 2, 2, 16), 2)]:
        k_cache, v_cache = both.unbind(axis)
        arguments = dense(k_cache=k_cache, v_cache=v_cache)
        assert flash_attn_with_kvcache(**arguments).isfinite().all()
        assert both.any(-1).sum() == 2 * 2 * 2 * 2


def test_paged_keys_of_packed_queries_are_checked() -> None:
    q, pages = torch.randn(5, 4, 16), torch.randn(6, 16, 2, 16)
    cu = int32(0, 2, 5)

    def call(table: Any, cu_k: Any, max_k: Any = 40, **rest: Any) -> Any:
        return flash_attn_varlen_func(
            q, rest.pop("k", pages), pages, cu, cu_k, 3, max_k, block_table=table, **rest
        )

    table = int32([4, 0], [5, -1])
    assert call(table, int32(0, 20, 30)).isfinite().all()
    for arguments, message in [
        ((int32([4, 9], [5, -1]), int32(0, 20, 30)), "block_table is 9 at index (0, 1)"),
        ((table, int32(0, 33, 40)), "cu_seqlens_k is 33 keys of sequence 0; allowed: 0 to 32"),
        ((table, int32(0, 20, 10)), "cu_seqlens_k is 10 at index 2; allowed: offsets that never"),
        ((table, int32(0, 20, 30), 15), "max_seqlen_k is 15; allowed: at least 20"),
        ((table, int32(0, 20)), "cu_seqlens_k has shape (2); allowed: (3)"),
    ]:
        with pytest.raises(ValueError, match="allowed") as caught:
            call(*arguments)
        assert str(caught.value).startswith(message)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        call(table, int32(0, 20, 30), dropout_p=0.5)
    message = r"^v has shape \(6, 16, 2, 16\); allowed: dimension 1 = 20, as in k$"
    with pytest.raises(ValueError, match=message):
        call(table, int32(0, 20, 30), k=torch.zeros(6, 20, 2, 16))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"])
def test_no_tensor_loses_its_gradient(name: str, compiled: bool) -> None:
    arguments = dense()
    arguments[name] = arguments[name].clone().requires_grad_()
    call: Any = flash_attn_with_kvcache
    if compiled:
        call = torch.compile(call, backend="eager", fullgraph=True)
    before = arguments["k_cache"].detach().clone()
    # torch.compile puts the error of an operator into one of its own.
    error = torch._dynamo.exc.Unsupported if compiled else NotImplementedError
    with pytest.raises(error, match=f"{name}: a tensor that requires grad"):
        call(**arguments)
    assert torch.equal(arguments["k_cache"], before)
    with torch.no_grad():
        call(**arguments)


def test_slopes_and_pages_of_packed_queries_lose_no_gradient() -> None:
    cu, pages = int32(0, 2, 5), torch.randn(6, 16, 2, 16)
    arguments: dict[str, Any] = {"q": torch.randn(5, 4, 16), "k": pages, "v": pages.clone()}
    arguments |= {"cu_seqlens_q": cu, "cu_seqlens_k": int32(0, 20, 30), "max_seqlen_q": 3}
    arguments |= {"max_seqlen_k": 20, "block_table": int32([4, 0], [5, 1])}
    arguments["alibi_slopes"] = torch.rand(4)
    for name in ("q", "k", "v", "alibi_slopes"):
        changed = {**arguments, name: arguments[name].clone().requires_grad_()}
        with pytest.raises(NotImplementedError, match=f"^{name}: a tensor that requires grad"):
            flash_attn_varlen_func(**changed)
