"""flash_attn.flash_attn_interface: single steps, helpers and the names of 1.x."""

# Calls with lists of tensors, whose length mypy does not know.
# mypy: disable-error-code="call-arg, misc, arg-type, type-var"

from __future__ import annotations

import inspect
from typing import Any

import metal_flash_attn
import pytest
import torch
from metal_flash_attn.shim.flash_attn import flash_attn_interface as interface
from torch import Tensor

FUNCTIONS = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
WRAPPED = [
    "flash_attn_forward",
    "flash_attn_varlen_forward",
    "flash_attn_backward",
    "flash_attn_varlen_backward",
]

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@pytest.fixture
def packed() -> dict[str, Any]:
    """Three sequences, one of them empty."""
    cu_seqlens = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    q, k, v = (torch.randn(12, 4, 16) for _ in range(3))
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens.clone(),
        "max_seqlen_q": 7,
        "max_seqlen_k": 7,
    }


def dense() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 5, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_public_functions_are_the_ones_of_the_package(name: str) -> None:
    assert getattr(interface, name) is getattr(metal_flash_attn, name)


@pytest.mark.parametrize("name", WRAPPED)
def test_the_wrapped_names(name: str) -> None:
    assert getattr(interface, f"_wrapped_{name}") is getattr(interface, f"_{name}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (2, 1)])
@pytest.mark.parametrize("dropout_p", [0.0, 1e-30])
@pytest.mark.parametrize("return_softmax", [False, True])
def test_forward(
    causal: bool, window: tuple[int, int], dropout_p: float, return_softmax: bool
) -> None:
    q, k, v = dense()
    expected = metal_flash_attn.flash_attn_func(
        q,
        k,
        v,
        softmax_scale=0.3,
        causal=causal,
        window_size=window,
        softcap=2.0,
        alibi_slopes=SLOPES,
        return_attn_probs=True,
    )
    out, lse, probabilities, rng_state = interface._flash_attn_forward(
        q, k, v, dropout_p, 0.3, causal, *window, 2.0, SLOPES, return_softmax
    )
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert lse.shape == (2, 4, 5)
    assert lse.dtype == torch.float32
    assert probabilities.numel() == 0
    assert rng_state.dtype == torch.int64
    assert rng_state.tolist() == [0, 0]


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_forward(packed: dict[str, Any], causal: bool) -> None:
    expected = metal_flash_attn.flash_attn_varlen_func(
        **packed,
        softmax_scale=0.3,
        causal=causal,
        window_size=(3, -1),
        softcap=2.0,
        alibi_slopes=SLOPES,
        return_attn_probs=True,
    )
    out, lse, probabilities, rng_state = interface._flash_attn_varlen_forward(
        **packed,
        dropout_p=0.0,
        softmax_scale=0.3,
        causal=causal,
        window_size_left=3,
        window_size_right=-1,
        softcap=2.0,
        alibi_slopes=SLOPES,
    )
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert lse.shape == (4, 12)
    assert probabilities.numel() == 0
    assert rng_state.tolist() == [0, 0]


def test_zero_tensors_clears_what_follows_the_last_sequence(packed: dict[str, Any]) -> None:
    packed["cu_seqlens_q"] = packed["cu_seqlens_k"] = torch.tensor([0, 5, 9], dtype=torch.int32)
    out, lse, *_ = interface._flash_attn_varlen_forward(
        **packed, dropout_p=0.0, softmax_scale=None, causal=False, zero_tensors=True
    )
    assert not bool(out[9:].any())
    assert bool((lse[:, 9:] == -torch.inf).all())
    assert bool(out[:9].any(-1).all())
    assert bool(lse[:, :9].isfinite().all())


@pytest.mark.parametrize("name", ["leftpad_k", "seqused_k"])
def test_paging_is_refused_by_name(packed: dict[str, Any], name: str) -> None:
    value: Any = {name: torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
        interface._flash_attn_varlen_forward(
            **packed, dropout_p=0.0, softmax_scale=None, causal=False, **value
        )


def test_pages_are_the_keys_that_the_table_says() -> None:
    q, cu = torch.randn(9, 4, 16), torch.tensor([0, 5, 9], dtype=torch.int32)
    k, v = torch.randn(2, 3, 16, 2, 16)
    table = torch.tensor([[2], [0]], dtype=torch.int32)
    step = (q, k, v, cu, cu, 5, 5, 0.0, None, True)
    out, lse, *_ = interface._flash_attn_varlen_forward(*step, block_table=table)
    keys, values = (torch.cat([t[2, :5], t[0, :4]]) for t in (k, v))
    expected = interface._flash_attn_varlen_forward(q, keys, values, *step[3:])
    torch.testing.assert_close((out, lse), expected[:2])


def test_backward_writes_the_gradients_of_autograd() -> None:
    q, k, v = dense()
    rules: Any = (0.0, None, True, 3, -1, 2.0, SLOPES)
    out, lse, _, rng_state = interface._flash_attn_forward(q, k, v, *rules, False)
    dout = torch.randn_like(out)
    # In place: the middle of wider rows.
    wide = [torch.full((*t.shape[:-1], 18), 7.0) for t in (q, k, v)]
    dq, dk, dv = (t[..., 1:-1] for t in wide)
    step = (dout, q, k, v, out, lse, dq, dk, dv, *rules, True, rng_state)
    softmax_d = interface._flash_attn_backward(*step)
    leaves: Any = [t.clone().requires_grad_() for t in (q, k, v)]
    same = interface.flash_attn_func(*leaves, 0.0, None, True, (3, -1), 2.0, SLOPES)
    expected = torch.autograd.grad(same, leaves, dout)
    assert all(torch.equal(*pair) for pair in zip((dq, dk, dv), expected, strict=True))
    assert all((t[..., [0, -1]] == 7).all() for t in wide)
    assert softmax_d.shape == (2, 4, 128)
    assert torch.allclose(softmax_d[..., :5], (dout * out).sum(-1).transpose(1, 2))
    assert (softmax_d[..., 5:] == 0).all()


def test_varlen_backward_writes_the_gradients_of_autograd(packed: dict[str, Any]) -> None:
    tensors = packed.pop("q"), packed.pop("k"), packed.pop("v")
    rules: Any = (0.0, 0.3, True, -1, -1, 0.0, None)
    out, lse, _, _ = interface._flash_attn_varlen_forward(*tensors, *packed.values(), *rules)
    dout, gradients = torch.randn_like(out), [torch.empty_like(t) for t in tensors]
    softmax_d = interface._flash_attn_varlen_backward(
        dout, *tensors, out, lse, *gradients, *packed.values(), *rules, False
    )
    leaves: Any = [t.clone().requires_grad_() for t in tensors]
    same = interface.flash_attn_varlen_func(*leaves, **packed, softmax_scale=0.3, causal=True)
    expected = torch.autograd.grad(same, leaves, dout)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
    assert softmax_d.shape == (4, 12 + 128 * 3)
    # The second sequence is empty; the third begins at row 5 and behind two gaps.
    rows = (dout * out).sum(-1).T
    assert torch.allclose(softmax_d[:, :5], rows[:, :5])
    assert torch.allclose(softmax_d[:, 5 + 256 : 12 + 256], rows[:, 5:])
    assert softmax_d.count_nonzero() == rows.count_nonzero()


def test_gradients_of_parts_of_the_keys_add_up() -> None:
    """Sequence-parallel libraries pass out and the log-sum-exp of all keys with some of them."""
    q, k, v = dense()
    rules: Any = (0.0, None, False, -1, -1, 0.0, None)
    out, lse, _, _ = interface._flash_attn_forward(q, k, v, *rules, False)
    dout = torch.randn_like(out)
    whole, dq, dk, dv = (torch.empty_like(t) for t in (q, q, k, v))
    interface._flash_attn_backward(dout, q, k, v, out, lse, whole, dk, dv, *rules, False)
    total = torch.zeros_like(q)
    for part in (slice(0, 4), slice(4, 9)):
        step = (dout, q, k[:, part], v[:, part], out, lse, dq, dk[:, part], dv[:, part])
        before = dk.clone()
        interface._flash_attn_backward(*step, *rules, False)
        assert torch.allclose(before, dk, atol=1e-6)
        total += dq
    assert torch.allclose(total, whole, atol=1e-6)


def test_backward_names_what_does_not_fit() -> None:
    q, k, v = dense()
    rules: Any = (0.0, None, False, -1, -1, 0.0, None)
    out, lse, _, _ = interface._flash_attn_forward(q, k, v, *rules, False)
    good = {"dout": out, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
    good |= {"dq": q.clone(), "dk": k.clone(), "dv": v.clone()}
    for name, wrong, error in [
        ("dout", out[:, :3], ValueError),
        ("out", out.half(), TypeError),
        ("softmax_lse", lse.transpose(1, 2), ValueError),
        ("softmax_lse", lse.double(), TypeError),
        ("dq", q[:1], ValueError),
        ("dk", k.transpose(-1, -2).contiguous().transpose(-1, -2), ValueError),
        ("dv", v.bfloat16(), TypeError),
    ]:
        call = {**good, name: wrong}
        with pytest.raises(error, match=name):
            interface._flash_attn_backward(*call.values(), *rules, False)
    with pytest.raises(ValueError, match="rng_state is None"):
        interface._flash_attn_backward(*good.values(), 0.1, *rules[1:], False)
    interface._flash_attn_backward(*[*good.values()][:6], None, good["dk"], None, *rules, False)
    assert not torch.equal(good["dk"], k)


def test_backward_compiles() -> None:
    q, k, v = dense()
    rules: Any = (0.0, None, True, -1, -1, 0.0, None)
    out, lse, _, _ = interface._flash_attn_forward(q, k, v, *rules, False)

    def step(dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        return interface._flash_attn_backward(out, q, k, v, out, lse, dq, dk, dv, *rules, False)

    eager = [torch.empty_like(t) for t in (q, k, v)]
    compiled = [torch.empty_like(t) for t in (q, k, v)]
    softmax_d = step(*eager)
    assert torch.allclose(torch.compile(step, fullgraph=True)(*compiled), softmax_d)
    assert all(torch.equal(*pair) for pair in zip(eager, compiled, strict=True))


def test_signatures_are_the_ones_of_flash_attn() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    tail = ["dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right"]
    tail += ["softcap", "alibi_slopes"]
    lengths = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    gradients = ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"]
    assert names(interface._flash_attn_forward) == ["q", "k", "v", *tail, "return_softmax"]
    assert names(interface._flash_attn_varlen_forward) == [
        *["q", "k", "v", *lengths, *tail, "return_softmax"],
        *["block_table", "leftpad_k", "seqused_k", "zero_tensors"],
    ]
    end = [*tail, "deterministic", "rng_state"]
    assert names(interface._flash_attn_backward) == [*gradients, *end]
    assert names(interface._flash_attn_varlen_backward) == [
        *[*gradients, *lengths, *end],
        "zero_tensors",
    ]


def test_maybe_contiguous() -> None:
    x = torch.randn(3, 4)
    assert interface.maybe_contiguous(x) is x
    copied = interface.maybe_contiguous(x.T)
    assert copied is not None
    assert copied.stride(-1) == 1
    assert torch.equal(copied, x.T)
    assert interface.maybe_contiguous(None) is None


def test_round_multiple() -> None:
    assert [interface.round_multiple(x, 128) for x in (0, 1, 128, 129)] == [0, 128, 128, 256]


@pytest.mark.parametrize(
    ("head_dim", "is_dropout", "expected"),
    [
        *[(32, False, 128), (32, True, 128), (64, False, 128), (64, True, 64)],
        *[(96, False, 64), (96, True, 64), (128, False, 64), (128, True, 32)],
        *[(160, True, 64), (192, False, 64), (256, True, 64)],
    ],
)
def test_block_sizes(head_dim: int, is_dropout: bool, expected: int) -> None:
    assert interface._get_block_size_n("cpu", head_dim, is_dropout, False) == expected


def test_block_sizes_end_at_256() -> None:
    with pytest.raises(ValueError, match=r"head_dim .* got 257"):
        interface._get_block_size_n("cpu", 257, False, False)


@pytest.mark.parametrize("causal", [False, True])
def test_the_names_of_version_1(packed: dict[str, Any], causal: bool) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k = packed.values()
    expected: Any = metal_flash_attn.flash_attn_varlen_func(
        **packed, softmax_scale=0.3, causal=causal
    )
    kv, qkv = torch.stack((k, v), 1), torch.stack((q, k, v), 1)
    # Positions as in 1.x: dropout_p has no default, and deterministic comes last.
    tail: Any = (0.0, 0.3, causal, False, True)
    lengths = (cu_q, cu_k, max_q, max_k)
    outputs = [
        interface.flash_attn_unpadded_func(q, k, v, *lengths, *tail),
        interface.flash_attn_unpadded_kvpacked_func(q, kv, *lengths, *tail),
        interface.flash_attn_unpadded_qkvpacked_func(qkv, cu_q, max_q, *tail),
    ]
    for out in outputs:
        assert torch.equal(out, expected)


def test_the_causal_mask_of_version_1_is_refused_where_it_differs(packed: dict[str, Any]) -> None:
    packed["cu_seqlens_q"] = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"causal.*top left.*flash_attn_varlen_func"):
        interface.flash_attn_unpadded_func(**packed, dropout_p=0.0, causal=True)
    packed["kv"] = torch.stack((packed.pop("k"), packed.pop("v")), 1)
    with pytest.raises(NotImplementedError, match=r"causal.*flash_attn_varlen_kvpacked_func"):
        interface.flash_attn_unpadded_kvpacked_func(**packed, dropout_p=0.0, causal=True)
    out = interface.flash_attn_unpadded_kvpacked_func(**packed, dropout_p=0.0)
    assert out.shape == (12, 4, 16)


def test_the_probabilities_of_version_1_are_refused(packed: dict[str, Any]) -> None:
    q, k, v, cu_seqlens, *_ = packed.values()
    kv, qkv = torch.stack((k, v), 1), torch.stack((q, k, v), 1)
    lengths = (cu_seqlens, cu_seqlens, 7, 7)
    for call in (
        lambda: interface.flash_attn_unpadded_func(q, k, v, *lengths, 0.0, return_attn_probs=True),
        lambda: interface.flash_attn_unpadded_kvpacked_func(
            q, kv, *lengths, 0.0, return_attn_probs=True
        ),
        lambda: interface.flash_attn_unpadded_qkvpacked_func(
            qkv, cu_seqlens, 7, 0.0, return_attn_probs=True
        ),
    ):
        with pytest.raises(NotImplementedError, match="return_attn_probs"):
            call()
