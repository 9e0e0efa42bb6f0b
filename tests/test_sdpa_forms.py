"""Patched and stock `scaled_dot_product_attention`, call form by call form.

Each form is called three times: stock torch, the patch on CPU tensors, the patch on the simulator.
Values are held against float64 within derived bounds, and strides, dtype and errors against stock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import reference
import torch
from metal_flash_attn import sdpa, trace
from torch import Tensor
from torch.nn import functional

stock = torch._C._nn.scaled_dot_product_attention

B, H, HK, LQ, LK, D, DV = 2, 4, 2, 9, 12, 16, 8
HALF, BFLOAT = torch.float16, torch.bfloat16


@dataclass
class Form:
    """Arguments of one call, and whether the patch must compute it."""

    q: Any
    k: Any
    v: Any
    served: bool = True
    positional: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    context: Callable[[], Any] = contextlib.nullcontext
    on_simulator: bool = True

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """The inputs that require grad, by name."""
        inputs = {"q": self.q, "k": self.k, "v": self.v}
        return {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}


def plain(*leading: int, lq: int = LQ, lk: int = LK, d: int = D, dv: int = D) -> list[Tensor]:
    """q, k and v with the given leading dimensions."""
    return [torch.randn(*leading, length, dim) for length, dim in ((lq, d), (lk, d), (lk, dv))]


def tokens_first(tensor: Tensor) -> Tensor:
    """The same values with the tokens before the heads in memory."""
    return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)


def keep(*shape: int) -> Tensor:
    """A boolean mask in which the first row hides everything."""
    mask = torch.rand(*shape) < 0.6
    if shape[-2] > 1:
        mask[..., 0, :] = False
    return mask


def forms() -> dict[str, Form]:
    """Every form by its name."""
    torch.manual_seed(0)
    q, k, v = plain(B, H)
    shared = plain(B, HK)
    q3, k3, v3 = plain(H)
    q5, k5, v5 = plain(3, B, H)
    wide = plain(B, H, dv=DV)
    no_grad = torch.no_grad

    def cast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(dtype) for tensor in tensors]

    def given(q: Any, k: Any, v: Any, **options: Any) -> Form:
        return Form(q, k, v, options=options)

    def refused(q: Any, k: Any, v: Any, *positional: Any, **options: Any) -> Form:
        return Form(q, k, v, served=False, positional=positional, options=options)

    return {
        # Shapes and layouts.
        "plain": given(q, k, v),
        "tokens first": given(tokens_first(q), tokens_first(k), tokens_first(v)),
        "tokens first, wide v": given(tokens_first(q), k, wide[2]),
        "tokens first, 3-d mask": given(tokens_first(q), k, v, attn_mask=keep(H, LQ, LK)),
        "q a slice": given(torch.randn(B, H, 2 * LQ, D)[:, :, ::2], k, v),
        "q columns": given(torch.randn(B, H, D, LQ).transpose(-1, -2), k, v),
        "k and v columns": given(q, *torch.randn(2, B, H, D, LK).transpose(-1, -2)),
        "packed qkv": given(*torch.randn(B, LQ, 3, H, D).transpose(1, 3).unbind(2)),
        "q heads outermost": given(torch.randn(H, B, LQ, D).transpose(0, 1), k, v),
        "expanded batch": given(q[:1].expand(B, -1, -1, -1), k, v),
        "one query": given(q[:, :, :1], k, v),
        "one key": given(q, k[:, :, :1], v[:, :, :1]),
        "one head": given(q[:, :1], k[:, :1], v[:, :1]),
        "head dimension 1": given(q[..., :1], k[..., :1], v[..., :1]),
        "head dimension 5": given(q[..., :5], k[..., :5], v[..., :5]),
        "wide v": given(q, k, torch.randn(B, H, LK, 24)),
        "narrow v": given(*wide),
        "3-d": given(q3, k3, v3),
        "3-d tokens first": given(tokens_first(q3), k3, v3),
        "3-d narrow v": given(q3, k3, v3[..., :DV]),
        "5-d": given(q5, k5, v5),
        "5-d tokens first": given(tokens_first(q5), tokens_first(k5), v5),
        "batch of k and v is broadcast": given(q, k[:1], v[:1]),
        "batch of q is broadcast": given(q[:1], k, v),
        # Dtypes.
        "float16": given(*cast(HALF, q, k, v)),
        "bfloat16": given(*cast(BFLOAT, q, k, v)),
        "bfloat16 tokens first": given(*map(tokens_first, cast(BFLOAT, q, k, v))),
        "float64": refused(*cast(torch.float64, q, k, v)),
        "int32": refused(*cast(torch.int32, q, k, v)),
        "complex64": refused(*cast(torch.complex64, q, k, v)),
        "mixed dtypes": refused(q, k.half(), v),
        # Masks.
        "bool 2-d": given(q, k, v, attn_mask=keep(LQ, LK)),
        "bool 3-d": given(q, k, v, attn_mask=keep(H, LQ, LK)),
        "bool 4-d": given(q, k, v, attn_mask=keep(B, H, LQ, LK)),
        "bool of keys": given(q, k, v, attn_mask=keep(B, 1, 1, LK)),
        "bool of one row": given(q, k, v, attn_mask=keep(1, LK)),
        "bool of one column": given(q, k, v, attn_mask=keep(LQ, 1)),
        "bool by sequence": given(q, k, v, attn_mask=keep(B, 1, LQ, LK)),
        "bool transposed": given(q, k, v, attn_mask=keep(LK, LQ).t()),
        "bool hides all": given(q, k, v, attn_mask=torch.zeros(LQ, LK, dtype=torch.bool)),
        "bool shows all": given(q, k, v, attn_mask=torch.ones(LQ, LK, dtype=torch.bool)),
        "float 2-d": given(q, k, v, attn_mask=torch.randn(LQ, LK)),
        "float 4-d": given(q, k, v, attn_mask=torch.randn(B, H, LQ, LK)),
        "float by head": given(q, k, v, attn_mask=torch.randn(1, H, LQ, LK)),
        "float with -inf": given(
            q, k, v, attn_mask=torch.zeros(LQ, LK).masked_fill(~keep(LQ, LK), -torch.inf)
        ),
        "float32 for float16": given(*cast(HALF, q, k, v), attn_mask=torch.randn(LQ, LK)),
        "bfloat16 for bfloat16": given(
            *cast(BFLOAT, q, k, v), attn_mask=torch.randn(LQ, LK).bfloat16()
        ),
        "3-d and bool 2-d": given(q3, k3, v3, attn_mask=keep(LQ, LK)),
        "3-d and bool 3-d": given(q3, k3, v3, attn_mask=keep(H, LQ, LK)),
        "5-d and bool 2-d": given(q5, k5, v5, attn_mask=keep(LQ, LK)),
        "5-d and bool 4-d": given(q5, k5, v5, attn_mask=keep(B, 1, LQ, LK)),
        "5-d and bool 5-d": given(q5, k5, v5, attn_mask=keep(3, 1, H, LQ, LK)),
        "mask positional": Form(q, k, v, positional=(keep(LQ, LK), 0.0, False)),
        "mask 1-d": refused(q, k, v, attn_mask=torch.ones(LK, dtype=torch.bool)),
        "mask 5-d": refused(q, k, v, attn_mask=keep(2, B, H, LQ, LK)),
        "mask that does not fit": refused(q, k, v, attn_mask=keep(LQ, LK - 1)),
        "mask int32": refused(q, k, v, attn_mask=torch.ones(LQ, LK, dtype=torch.int32)),
        "mask float64": refused(q, k, v, attn_mask=torch.randn(LQ, LK).double()),
        "mask float16 for float32": refused(q, k, v, attn_mask=torch.randn(LQ, LK).half()),
        "mask a list": refused(q, k, v, attn_mask=[True]),
        # Causal.
        "causal": given(q, k, v, is_causal=True),
        "causal, more queries": given(*plain(B, H, lq=LK, lk=LQ), is_causal=True),
        "causal, equal lengths": given(*plain(B, H, lk=LQ), is_causal=True),
        "causal tokens first": given(tokens_first(q), k, v, is_causal=True),
        "causal one query": given(q[:, :, :1], k, v, is_causal=True),
        "causal grouped float16": given(*cast(HALF, q, *shared[1:]), is_causal=True,
                                        enable_gqa=True),
        "causal with a mask": refused(q, k, v, attn_mask=keep(LQ, LK), is_causal=True),
        "causal 1": refused(q, k, v, is_causal=1),
        # Groups of heads.
        "grouped": given(q, *shared[1:], enable_gqa=True),
        "grouped tokens first": given(tokens_first(q), *shared[1:], enable_gqa=True),
        "grouped with a mask": given(q, *shared[1:], attn_mask=keep(LQ, LK), enable_gqa=True),
        "grouped 3-d": given(q3, k3[:2], v3[:2], enable_gqa=True),
        "one key head": given(q, k[:, :1], v[:, :1], enable_gqa=True),
        "one key head is broadcast": given(q, k[:, :1], v[:, :1]),
        "enable_gqa without groups": given(q, k, v, enable_gqa=True),
        "groups without enable_gqa": refused(q, *shared[1:]),
        "heads that do not divide": refused(*plain(B, 3)[:1], *shared[1:], enable_gqa=True),
        "heads of k and v differ": refused(q, k[:, :2], v[:, :1], enable_gqa=True),
        "enable_gqa None": refused(q, k, v, enable_gqa=None),
        # Scale.
        "scale": given(q, k, v, scale=0.3),
        "scale 0": given(q, k, v, scale=0),
        "negative scale": given(q, k, v, scale=-0.3),
        "scale a tensor": refused(q, k, v, scale=torch.tensor(0.3)),
        "scale inf": refused(q, k, v, scale=float("inf")),
        "scale positional": refused(q, k, v, None, 0.0, False, 0.3),
        "scale text": refused(q, k, v, scale="0.3"),
        # Gradients and dropout.
        "q requires grad": given(q.clone().requires_grad_(), k, v),
        "v requires grad": given(q, k, v.clone().requires_grad_()),
        "k and v require grad": given(q, k.clone().requires_grad_(), v.clone().requires_grad_()),
        "mask requires grad": refused(q, k, v, attn_mask=torch.randn(LQ, LK, requires_grad=True)),
        "grad mode off": Form(q.clone().requires_grad_(), k, v, context=no_grad),
        "inference mode": Form(q, k, v, context=torch.inference_mode),
        "dropout 1": refused(q, k, v, dropout_p=1.0),
        "dropout 1.5": refused(q, k, v, dropout_p=1.5),
        # Empty and wrong.
        "no queries": refused(q[:, :, :0], k, v),
        "no keys": refused(q, k[:, :, :0], v[:, :, :0]),
        "no sequences": refused(q[:0], k[:0], v[:0]),
        "2-d": refused(q[0, 0], k[0, 0], v[0, 0]),
        "1-d": refused(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]),
        "6-d": refused(q5[None], k5[None], v5[None]),
        "k of another width": refused(q, k[..., :5], v),
        "v of another length": refused(q, k, v[:, :, :5]),
        "v missing": refused(q, k, None),
        "v a list": refused(q, k, [1.0]),
        "unknown option": refused(q, k, v, softcap=3.0),
        "meta k": refused(q, k.to("meta"), v),
        # Autocast.
        "autocast": Form(q, k, v, context=lambda: torch.autocast("cpu", BFLOAT)),
        "autocast, mixed": Form(q.half(), k, v, context=lambda: torch.autocast("cpu", BFLOAT)),
        "autocast, float mask": Form(
            q, k, v, options={"attn_mask": torch.randn(LQ, LK)},
            context=lambda: torch.autocast("cpu", BFLOAT),
        ),
        "autocast, float64": Form(
            q.double(), k.double(), v.double(), served=False,
            context=lambda: torch.autocast("cpu", BFLOAT),
        ),
        # A backend by name.
        "sdpa_kernel math": Form(
            q, k, v, served=False,
            context=lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ),
    }  # fmt: skip


# Forms that are called once more with gradients of q, k and v, also on the simulator or not:
# each takes kernels of its own there.
WITH_GRADIENTS = {
    "plain": True, "causal grouped float16": True, "bool 4-d": True, "tokens first": True,
    "packed qkv": False, "expanded batch": False, "k and v columns": False, "one query": False,
    "wide v": False, "narrow v": False, "3-d": False, "3-d tokens first": False, "5-d": False,
    "5-d tokens first": False, "batch of k and v is broadcast": False,
    "batch of q is broadcast": False, "float16": False, "bfloat16": False, "bool of keys": False,
    "bool hides all": False, "bool 3-d": False, "float 2-d": False, "float with -inf": False,
    "5-d and bool 4-d": False, "causal": False, "causal, more queries": False, "grouped": False,
    "one key head is broadcast": False, "negative scale": False, "autocast": False,
    "autocast, mixed": False, "float64": False, "sdpa_kernel math": False,
}  # fmt: skip


def with_gradients(form: Form, on_simulator: bool) -> Form:
    """The same form with inputs that require grad."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in (form.q, form.k, form.v))
    return replace(form, q=q, k=k, v=v, on_simulator=on_simulator)


TABLE = forms()
TABLE |= {f"{n}, gradients": with_gradients(TABLE[n], on) for n, on in WITH_GRADIENTS.items()}


@contextlib.contextmanager
def patch_on(device: str) -> Iterator[None]:
    """The patch with every gate open, computing CPU tensors here or on the simulator."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MTLFLASHATTN_SDPA", "on")
        if device == "simulator":
            environment.setenv("MTLFLASHATTN_DEVICE", "simulator")
        with sdpa.patched():
            yield


def call(function: Callable[..., Any], form: Form) -> Any:
    """The result or the error."""
    with form.context():
        try:
            return function(form.q, form.k, form.v, *form.positional, **form.options)
        except Exception as error:
            return error


Problem = tuple[Tensor, Tensor, Tensor, reference.Rules]


def problem_of(form: Form, dtype: torch.dtype) -> Problem:
    """q, k and v as `[batch, length, heads, dim]`, flat over leading dimensions, and the rules."""
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), form.positional, strict=False))
    options |= form.options
    q, k, v = (tensor.detach().to(dtype) for tensor in (form.q, form.k, form.v))
    if q.dim() == 3:
        q, k, v = (tensor.unsqueeze(0) for tensor in (q, k, v))
    leading = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in (q, k, v)))
    q, k, v = (
        tensor.expand(*leading, *tensor.shape[-3:]).flatten(0, -4).transpose(1, 2)
        for tensor in (q, k, v)
    )
    mask = options.get("attn_mask")
    rules = reference.Rules(
        causal=options.get("is_causal", False), scale=options.get("scale"), top_left=True
    )
    if mask is not None:
        mask = mask if mask.dtype in {torch.bool, torch.float32} else mask.to(dtype)
        if form.context is not contextlib.nullcontext and mask.dtype != torch.bool:
            mask = mask.to(dtype)
        mask = mask.expand(*leading, q.shape[2], q.shape[1], k.shape[1]).flatten(0, -4)
        rules.mask, rules.bias = (mask, None) if mask.dtype == torch.bool else (None, mask)
    return q, k, v, rules


def arithmetic(dtype: torch.dtype, device: str) -> reference.Arithmetic:
    """How the device computes in `dtype`."""
    is_simulated = device == "simulator"
    return reference.Arithmetic(is_simulated, dtype if is_simulated else torch.float32)


def check_gradients(form: Form, expected: Tensor, got: Tensor, device: str) -> None:
    """Requires right gradients with the shapes and dtypes of those of stock torch."""
    inputs = form.differentiable
    d_out = torch.randn(got.shape).to(got.dtype)
    theirs = torch.autograd.grad(expected, list(inputs.values()), d_out)
    ours = torch.autograd.grad(got, list(inputs.values()), d_out)
    *tensors, rules = problem_of(form, got.dtype)
    q, k, v = tensors
    flat_d_out = d_out.reshape(-1, *d_out.shape[-3:]).transpose(1, 2)
    exact = reference.gradients(q, k, v, flat_d_out, None, rules, arithmetic(got.dtype, device))
    leading = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in (form.q, form.k, form.v)))

    def unflat(name: str, values: Tensor) -> Tensor:
        """`[..., heads, length, dim]`, summed over what was broadcast."""
        values = values.transpose(1, 2)
        return values.reshape(*leading, *values.shape[1:]).sum_to_size(inputs[name].shape)

    for name, stock_gradient, gradient in zip(inputs, theirs, ours, strict=True):
        assert gradient.dtype == stock_gradient.dtype == inputs[name].dtype
        assert gradient.shape == stock_gradient.shape
        # A sum over broadcast dimensions is rounded once more for each term.
        rounded = exact.bounds[name] + reference.UNIT[got.dtype] * exact.exact[name].abs()
        bound = unflat(name, exact.bounds[name] if leading == () else rounded)
        reference.assert_within(f"d{name}", gradient, unflat(name, exact.exact[name]), bound)


def test_the_table_is_long() -> None:
    assert len(TABLE) >= 100
    assert sum(form.served for form in TABLE.values()) >= 60


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (device, name)
        for device in ("cpu", "simulator")
        for name, form in TABLE.items()
        if device == "cpu" or form.on_simulator
    ],
)
def test_patched_and_stock_agree(device: str, name: str) -> None:
    form = TABLE[name]
    expected = call(stock, form)
    with patch_on(device):
        decision = call(sdpa.explain, form)
        with trace() as calls:
            got = call(functional.scaled_dot_product_attention, form)
    assert len(calls.calls) == form.served
    if isinstance(decision, sdpa.Decision):
        assert decision.serves == form.served
        assert decision.gate
        assert decision.reason
    else:
        # Arguments that the function itself would not take.
        assert isinstance(decision, TypeError)
        assert isinstance(expected, TypeError)
    if isinstance(expected, Exception):
        assert type(got) is type(expected)
        assert str(got) == str(expected)
        return
    assert isinstance(got, Tensor), got
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    assert got.requires_grad == expected.requires_grad
    if not form.served:
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
        return
    q, k, v, rules = problem_of(form, got.dtype)
    exact = reference.attention(q, k, v, rules, arithmetic(got.dtype, device))
    flat = got.unsqueeze(0) if got.dim() == 3 else got
    exact.check(flat.flatten(0, -4).transpose(1, 2))
    if got.requires_grad:
        with patch_on(device):
            check_gradients(form, expected, got, device)
