"""The patch itself: installing, gates, what falls through unseen, compilation, fallback, cost."""

# Calls with lists of tensors, whose length mypy does not know.
# mypy: disable-error-code="call-arg, misc, arg-type"

from __future__ import annotations

import pickle
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from metal_flash_attn import _native, sdpa, trace
from metal_flash_attn.sdpa import _call, _gates, _operator, _Patch, _state, _stock, _training
from torch import Tensor
from torch.nn import functional
from ways import has_mps

stock = torch._C._nn.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def no_patch() -> Iterator[None]:
    """Nothing is installed before or after a test, and the one warning was not given yet."""
    sdpa.uninstall()
    _operator._Warned.already = False
    torch._dynamo.reset()
    yield
    sdpa.uninstall()
    assert functional.scaled_dot_product_attention is stock


def tensors(length: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, 4, length, 32).to(dtype) for _ in range(3))
    return q, k, v


def is_served(*arguments: Any, **options: Any) -> bool:
    with trace() as calls:
        functional.scaled_dot_product_attention(*arguments, **options)
    return bool(calls.calls)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Looks the function up at each call."""
    return functional.scaled_dot_product_attention(q, k, v)


def test_install_and_uninstall() -> None:
    assert not sdpa.installed()
    assert not sdpa.uninstall()
    assert sdpa.install(cpu=True)
    assert sdpa.installed()
    assert functional.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
    assert not sdpa.install()
    assert is_served(*tensors())
    assert sdpa.uninstall()
    assert not sdpa.installed()
    assert not is_served(*tensors())


def test_cpu_tensors_are_served_on_request_only() -> None:
    sdpa.install()
    assert not is_served(*tensors())
    assert sdpa.explain(*tensors()).gate == "device"


def test_context_manager_restores_what_was_there() -> None:
    with sdpa.patched(cpu=True):
        assert is_served(*tensors())
    assert not sdpa.installed()
    sdpa.install(min_seq=17)
    before = _state.patch
    with pytest.raises(TypeError), sdpa.patched(cpu=True):
        functional.scaled_dot_product_attention()
    assert _state.patch is before
    assert not is_served(*tensors())


@pytest.mark.parametrize("value", ["off", "0", "False"])
def test_the_environment_can_forbid_it(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MTLFLASHATTN_SDPA", value)
    assert not sdpa.install(cpu=True)
    assert not sdpa.installed()
    assert sdpa.explain(*tensors()).gate == "settings"
    with sdpa.patched(cpu=True):
        assert not is_served(*tensors())


def test_the_environment_can_open_every_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLFLASHATTN_SDPA", "on")
    tiny = tensors(1)
    with sdpa.patched():
        assert is_served(*tiny)
        assert sdpa.explain(*tiny).gate == "forced"


@pytest.mark.skipif(
    _native.instruction_sets()[-1] not in ("avx2", "avx512"), reason="a CPU that was not measured"
)
@pytest.mark.parametrize(
    ("dtype", "queries", "served"),
    [
        (torch.float32, 15, False),
        (torch.float32, 16, True),
        (torch.float16, 1, True),
    ],
)
def test_small_calls_are_left_to_torch_where_it_is_faster(
    dtype: torch.dtype, queries: int, served: bool
) -> None:
    q = torch.zeros(1, 8, queries, 64, dtype=dtype)
    k = torch.zeros(1, 8, 128, 64, dtype=dtype)
    with sdpa.patched(cpu=True):
        decision = sdpa.explain(q, k, k)
    assert decision.gate == ("speed" if served else "thresholds")
    assert decision.serves == served


def test_somebody_elses_patch_below_ours_is_kept() -> None:
    seen = []

    def theirs(*arguments: Any, **options: Any) -> Tensor:
        seen.append(len(arguments))
        return stock(*arguments, **options)

    functional.scaled_dot_product_attention = theirs
    try:
        sdpa.install()
        functional.scaled_dot_product_attention(*tensors())
        assert seen == [3]
        sdpa.uninstall()
        assert functional.scaled_dot_product_attention is theirs
    finally:
        functional.scaled_dot_product_attention = stock


def test_somebody_elses_patch_above_ours_is_kept() -> None:
    sdpa.install(cpu=True)
    below = functional.scaled_dot_product_attention

    def theirs(*arguments: Any, **options: Any) -> Tensor:
        return below(*arguments, **options)

    functional.scaled_dot_product_attention = theirs
    assert sdpa.uninstall()
    assert functional.scaled_dot_product_attention is theirs
    assert not is_served(*tensors())
    assert sdpa.install(cpu=True)
    assert is_served(*tensors())
    functional.scaled_dot_product_attention = below
    sdpa.uninstall()


def test_the_function_pickles_and_works_without_the_patch() -> None:
    sdpa.install()
    copied = pickle.loads(pickle.dumps(functional.scaled_dot_product_attention))  # noqa: S301
    sdpa.uninstall()
    q, k, v = tensors()
    assert torch.equal(copied(q, k, v), stock(q, k, v))
    assert "enable_gqa" in copied.__doc__


def test_torch_modules_reach_it() -> None:
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 64, 32)
    with torch.no_grad():
        expected, _ = attention(x, x, x, need_weights=False, attn_mask=torch.zeros(64, 64).bool())
        with sdpa.patched(cpu=True), trace() as calls:
            got, _ = attention(x, x, x, need_weights=False, attn_mask=torch.zeros(64, 64).bool())
    torch.testing.assert_close(got, expected)
    assert len(calls.calls) <= 1  # torch has a fast path of its own that asks nobody.


class Subclass(torch.Tensor):
    """A tensor that wants to see operations."""


class Mode(torch.overrides.TorchFunctionMode):
    """Notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_who_watches_operations_sees_torchs_own() -> None:
    q, k, v = tensors()
    sdpa.install(cpu=True)
    with Mode() as mode:
        assert not is_served(q, k, v)
    assert stock in mode.seen
    assert not is_served(q.as_subclass(Subclass), k, v)
    assert not is_served(torch.nn.Parameter(q, requires_grad=False), k, v)
    with torch._subclasses.FakeTensorMode() as fake, torch.no_grad():
        out = attend_plainly(*map(fake.from_tensor, (q, k, v)))
        assert out.shape == q.shape
    with trace() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.vmap(functional.scaled_dot_product_attention)(q, k, v)
        with pytest.raises(NotImplementedError, match="forward AD"):
            torch.func.jvp(lambda x: functional.scaled_dot_product_attention(x, k, v), (q,), (q,))
        graph = torch.fx.symbolic_trace(attend_plainly)
    assert not calls.calls
    assert stock in {node.target for node in graph.graph.nodes}


def test_nested_and_sparse_tensors_are_torchs() -> None:
    sdpa.install(cpu=True)
    for layout in (torch.strided, torch.jagged):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            heads_first = layout == torch.strided
            parts = [
                torch.randn((4, length, 32) if heads_first else (length, 4, 32))
                for length in (40, 60)
            ]
            nested = torch.nested.nested_tensor(parts, layout=layout)
            nested = nested if heads_first else nested.transpose(1, 2)
            with torch.no_grad():
                assert not is_served(nested, nested, nested)
        assert sdpa.explain(nested, nested, nested).gate == "type"


def test_scripts_hold_torchs_operator() -> None:
    sdpa.install(cpu=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(attend)
        traced = torch.jit.trace(attend, tuple(tensors()))
    assert "aten::scaled_dot_product_attention" in str(scripted.graph)
    assert "mtlflashattn" not in str(traced.graph)


def test_training_is_served() -> None:
    sdpa.install(cpu=True)
    leaves = [tensor.requires_grad_() for tensor in tensors(256)]
    expected = torch.autograd.grad(stock(*leaves).square().sum(), leaves)
    with trace() as calls:
        out = functional.scaled_dot_product_attention(*leaves)
        got = torch.autograd.grad(out.square().sum(), leaves)
    assert [entry.backward for entry in calls.calls] == [False, True]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    # What is torch's: the gradient of a mask, and derivatives of gradients.
    halves = [leaf.detach().half().requires_grad_() for leaf in leaves]
    mask = torch.zeros(256, 256, dtype=torch.float16, requires_grad=True)
    assert not is_served(*halves, attn_mask=mask)
    assert sdpa.explain(*halves, attn_mask=mask).gate == "gradient"
    assert is_served(*halves, attn_mask=mask.detach())
    # So are calls with little work, which would be served without gradients.
    short = tensors(64)
    assert is_served(*short)
    assert not is_served(short[0].requires_grad_(), *short[1:])
    out = functional.scaled_dot_product_attention(*leaves)
    first = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"SDPBackend\.MATH"):
        first[0].sum().backward()


def test_what_falls_through_with_gradients_may_be_served_without() -> None:
    """The forms that the patch remembers are apart."""

    class Picky:
        def __init__(self) -> None:
            self.asked: list[bool] = []

        def decide(self, call: _stock.Call) -> sdpa.Decision:
            self.asked.append(call.gradient)
            return sdpa.Decision(not call.gradient, "thresholds", "")

    sdpa.install(cpu=True)
    gates, picky = sdpa._state.patch.cpu, Picky()  # type: ignore[union-attr]
    assert gates is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "decide", picky.decide)
        q, k, v = tensors()
        for _ in range(2):
            assert not is_served(q.requires_grad_(), k, v)
            with torch.no_grad():
                assert is_served(q, k, v)
    assert picky.asked == [True, False, False]


# torch.compile.


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    causal = functional.scaled_dot_product_attention(
        q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True
    )
    return out + 2 * causal.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_are_served(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (64, 80) if dynamic else (64,):
        q, k, v = tensors(length)
        mask = torch.rand(length, length) < 0.7
        expected = attend(q, k, v, mask)
        with sdpa.patched(cpu=True), trace() as calls:
            got = compiled(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, mask)
        torch.testing.assert_close(got, expected)
        assert sum(entry.calls for entry in calls.calls) == 2


def test_compiled_calls_follow_install_and_uninstall() -> None:
    compiled = torch.compile(
        functional.scaled_dot_product_attention, fullgraph=True, backend="eager"
    )

    def count(*arguments: Any) -> int:
        with trace() as calls:
            torch.compile(attend_plainly, backend="eager")(*arguments)
        return len(calls.calls)

    q, k, v = tensors()
    assert count(q, k, v) == 0
    with sdpa.patched(cpu=True):
        assert count(q, k, v) == 1
        assert count(*(t[:, :, :1, :1] for t in (q, k, v))) == 0
        assert count(q.clone().requires_grad_(), k, v) == 0
        q, k, v = tensors(256)
        assert count(q.clone().requires_grad_(), k, v) == 1
        q, k, v = tensors()
    assert count(q, k, v) == 0
    compiled(q, k, v)


def test_compiled_training_is_served() -> None:
    leaves = [tensor.requires_grad_() for tensor in tensors(256)]
    expected = torch.autograd.grad(attend(*leaves, None).sum(), leaves)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with sdpa.patched(cpu=True), trace() as calls:
        got = torch.autograd.grad(compiled(*leaves, None).sum(), leaves)
    assert sum(entry.calls for entry in calls.calls if entry.backward) == 2
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_exported_programs_hold_torchs_operator() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v)

    for strict in (False, True):
        with sdpa.patched(cpu=True):
            program = torch.export.export(Module(), tuple(tensors()), strict=strict)
        targets = {str(node.target) for node in program.graph.nodes}
        assert "aten.scaled_dot_product_attention.default" in targets


def test_the_operator_keeps_torchs_rules() -> None:
    q, k, v = tensors()
    mask = torch.rand(64, 64) < 0.7
    for layout in ("like_query", "contiguous", "tokens_first"):
        for query in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
            arguments = (query, k, v[..., :8], mask, False, None, layout)
            if layout != "like_query":
                torch.library.opcheck(_operator.SDPA, arguments)
            torch.library.opcheck(_operator.SDPA, (query, k, v, None, True, 0.3, layout))
    with pytest.raises(NotImplementedError, match="requires grad"):
        _operator.SDPA(q.requires_grad_(), k, v, None, False, None, "contiguous")


# Torch looks at what is no leaf, and complains.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False)])
def test_the_operator_with_gradients_keeps_torchs_rules(wanted: tuple[bool, ...]) -> None:
    leaves = [
        tensor.transpose(1, 2).contiguous().requires_grad_(is_wanted)
        for tensor, is_wanted in zip(tensors(), wanted, strict=True)
    ]
    mask = torch.rand(64, 64) < 0.7
    for rest in ((mask, False, None), (None, True, 0.3)):
        torch.library.opcheck(_training.TRAINING, (*leaves, *rest))


# Errors inside.


def break_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> Tensor:
        raise MemoryError("no memory for a test")

    monkeypatch.setattr(_native, "sdpa", fail)


def test_an_error_inside_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    break_engine(monkeypatch)
    q, k, v = tensors()
    sdpa.install(cpu=True)
    with pytest.warns(RuntimeWarning, match="MemoryError: no memory for a test"):
        assert torch.equal(attend_plainly(q, k, v), stock(q, k, v))
    # A second warning would be an error here.
    assert torch.equal(attend_plainly(q, k, v), stock(q, k, v))


def test_a_compiled_graph_falls_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    break_engine(monkeypatch)
    q, k, v = tensors()
    expected = attend(q, k, v, None)
    with sdpa.patched(cpu=True), pytest.warns(RuntimeWarning, match="no memory") as seen:
        got = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v, None)
    torch.testing.assert_close(got, expected)
    assert len(seen) == 1


@pytest.mark.parametrize("broken", ["_OWN_FORWARD", "_OWN_BACKWARD"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_graph_with_gradients_falls_back_too(
    broken: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the pass that fails, with the gradients of torch."""
    mask = torch.rand(256, 256) < 0.7 if masked else None
    inputs = (*(tensor.requires_grad_() for tensor in tensors(256)), mask)
    expected = attend(*inputs)
    grad_out = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, inputs[:3], grad_out)

    def fail(*_arguments: Any) -> Tensor:
        raise MemoryError("no memory for a test")

    monkeypatch.setattr(_training, broken, fail)

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        got = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs)
        return got, torch.autograd.grad(got, inputs[:3], grad_out)

    with sdpa.patched(cpu=True), pytest.warns(RuntimeWarning, match="no memory") as seen:
        got, gradients = run()
    torch.testing.assert_close((got, gradients), (expected, expected_gradients))
    assert len(seen) == 1


def test_an_interrupt_is_no_error_to_fall_back_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(_native, "sdpa", interrupt)
    sdpa.install(cpu=True)
    with pytest.raises(KeyboardInterrupt):
        functional.scaled_dot_product_attention(*tensors())


def test_a_tier_that_cannot_serve_is_an_error_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "scalar")
    sdpa.install(cpu=True)
    q, k, v = tensors()
    with pytest.warns(RuntimeWarning, match="MTLFLASHATTN_KERNEL"):
        assert torch.equal(functional.scaled_dot_product_attention(q, k, v), stock(q, k, v))


def test_tensors_of_two_devices_never_reach_an_engine() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="k is"):
        _native.sdpa(q, k.to("meta"), v, None, False, None, "contiguous")


# The gates of MPS, which need no MPS device to decide.

THRESHOLDS = _gates.Thresholds(min_score_gb=12.0, min_seq=4096, fast_min_seq=1024)


def mps_call(length: int = 512, keys: int | None = None, **changes: Any) -> _stock.Call:
    fields: dict[str, Any] = {
        "dtype": torch.float32,
        "batch": 1,
        "heads": 8,
        "query_len": length,
        "key_len": keys or length,
        "head_dim": 64,
        "value_dim": 64,
        "mask": None,
        "causal": False,
        "contiguous": True,
        "same_batch": True,
        "gradient": False,
    }
    return _stock.Call(**(fields | changes))


OLD, NEW = (2, 12), (2, 15)

# Version, call, gate, number of the upstream issue or pull request.
DECISIONS = {
    "short": (OLD, mps_call(), "thresholds", None),
    "long": (OLD, mps_call(4096), "length", None),
    "long keys": (OLD, mps_call(16, 4096), "length", None),
    "long half": (OLD, mps_call(4096, dtype=torch.float16), "length", "190791"),
    "long with a fused kernel": (NEW, mps_call(8192), "thresholds", None),
    "long without one": (NEW, mps_call(4096, head_dim=48, value_dim=48), "length", None),
    "long with a mask of another dtype": (
        NEW, mps_call(4096, dtype=torch.float16, mask=torch.float32), "length", "190791",
    ),
    "large": (OLD, mps_call(1000, batch=512, dtype=torch.bfloat16), "thresholds", None),
    "larger": (OLD, mps_call(1023, batch=520, heads=16, dtype=torch.bfloat16), "correctness",
               "179352"),
    "uneven v": (NEW, mps_call(value_dim=32), "uneven-v", None),
    "uneven v, old": ((2, 11), mps_call(value_dim=32), "correctness", "176767"),
    "causal half": (OLD, mps_call(dtype=torch.float16, causal=True), "correctness", "195910"),
    "causal half, fused": (NEW, mps_call(dtype=torch.float16, causal=True), "thresholds", None),
    "causal half, not fused": (
        NEW, mps_call(dtype=torch.float16, causal=True, head_dim=40, value_dim=40), "correctness",
        "195910",
    ),
    "causal float32": (OLD, mps_call(causal=True), "thresholds", None),
    "float32 beyond 4 GiB": (OLD, mps_call(12000), "correctness", "149261"),
    "masked in 2.7": ((2, 7), mps_call(mask=torch.bool), "correctness", "156707"),
    "masked in 2.8": ((2, 8), mps_call(mask=torch.bool), "thresholds", None),
    "decode in 2.8, permuted q": ((2, 8), mps_call(1, 64, contiguous=False), "correctness",
                                  "163597"),
    "decode in 2.8": ((2, 8), mps_call(1, 65), "correctness", "169222"),
    "decode in 2.10": ((2, 10), mps_call(1, 65), "thresholds", None),
    "long decode in 2.10": ((2, 10), mps_call(1, 1024), "correctness", "174861"),
    "long decode in 2.11": ((2, 11), mps_call(1, 1024), "thresholds", None),
    "permuted batch in 2.11": ((2, 11), mps_call(1, 64, batch=2, contiguous=False), "correctness",
                               "181133"),
    "decode with a mask in 2.11": ((2, 11), mps_call(1, 64, mask=torch.bool), "correctness",
                                   "182285"),
    "decode with a mask in 2.12": (OLD, mps_call(1, 64, mask=torch.bool), "correctness", "184180"),
    "decode with a mask": (NEW, mps_call(1, 64, mask=torch.bool), "thresholds", None),
    "decode with fewer keys": ((2, 8), mps_call(8, 7), "thresholds", None),
    "training, short": (NEW, mps_call(gradient=True), "thresholds", None),
    "training, uneven v": (NEW, mps_call(value_dim=32, gradient=True), "thresholds", None),
    "training, causal half": (NEW, mps_call(dtype=torch.float16, causal=True, gradient=True),
                              "thresholds", None),
    "training, long": (NEW, mps_call(8192, dtype=torch.float16, gradient=True), "length", None),
    "training, large": (NEW, mps_call(2048, batch=96, gradient=True), "memory", None),
    "training, larger": (NEW, mps_call(4095, batch=33, gradient=True), "correctness", "197636"),
}  # fmt: skip


@pytest.fixture
def no_fast_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gates, "_is_fast", lambda *_: False)


@pytest.mark.usefixtures("no_fast_tier")
@pytest.mark.parametrize("name", DECISIONS)
def test_mps_gates(name: str) -> None:
    version, call, gate, number = DECISIONS[name]
    decision = _gates.MpsGates(THRESHOLDS, version).decide(call)
    assert decision.gate == gate, decision
    assert decision.serves == (gate != "thresholds")
    assert (decision.source or "").rpartition("/")[2] == (number or "")


def test_every_defect_has_a_call_that_meets_it() -> None:
    met = {number for *_, number in DECISIONS.values()}
    # Two defects of one kind follow one another.
    huge = mps_call(70000, heads=1, dtype=torch.bfloat16, head_dim=48, value_dim=48)
    met.add(_gates.MpsGates(THRESHOLDS, NEW).decide(huge).source.rpartition("/")[2])  # type: ignore[union-attr]
    assert {defect.source.rpartition("/")[2] for defect in _stock.DEFECTS} <= met
    for entry in (*_stock.DEFECTS, *_stock.KERNELS):
        assert entry.source.startswith("https://github.com/pytorch/pytorch/")
    for defect in _stock.DEFECTS:
        assert defect.until is None or defect.since < defect.until
        assert defect.kernel in {
            _stock.GRAPH,
            _stock.MATH,
            *(kernel.name for kernel in _stock.KERNELS),
        }


def test_the_speed_gate_asks_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = _gates.MpsGates(THRESHOLDS, OLD)
    monkeypatch.setattr(_gates, "_is_fast", lambda *_: True)
    assert gates.decide(mps_call(1024)).gate == "speed"
    assert gates.decide(mps_call(1023)).gate == "thresholds"
    assert gates.decide(mps_call(1024, gradient=True)).gate == "thresholds"
    assert _gates.MpsGates(THRESHOLDS, NEW).decide(mps_call(1024)).gate == "thresholds"


@pytest.mark.usefixtures("no_fast_tier")
def test_thresholds_are_arguments_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    def gate(call: _stock.Call, **arguments: Any) -> str:
        with sdpa.patched(**arguments):
            assert isinstance(_state.patch, _Patch)
            return _gates.MpsGates(_state.patch.mps._thresholds, OLD).decide(call).gate  # type: ignore[union-attr]

    assert gate(mps_call(64)) == "thresholds"
    assert gate(mps_call(64), min_seq=64) == "length"
    assert gate(mps_call(64), min_score_gb=0) == "memory"
    monkeypatch.setenv("MTLFLASHATTN_SDPA_MIN_SEQ", "64")
    assert gate(mps_call(64)) == "length"
    assert gate(mps_call(64), min_seq=65) == "thresholds"
    monkeypatch.setenv("MTLFLASHATTN_SDPA_MIN_GB", "0.0001")
    assert gate(mps_call(63)) == "memory"


def test_a_mask_with_causal_raises_where_torch_would_abort() -> None:
    q, k, v = tensors()
    old, new = (_gates.MpsGates(THRESHOLDS, version) for version in (OLD, NEW))
    with sdpa.patched(cpu=True):
        for gates in (old, new):
            _state.patch = _Patch(gates, gates)
            with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set"):
                functional.scaled_dot_product_attention(
                    q, k, v, torch.ones(64, 64).bool(), is_causal=True
                )


@pytest.mark.parametrize(
    ("text", "version"), [("2.15.0+cu132", (2, 15)), ("2.9.1", (2, 9)), ("2.16.0a0+git1", (2, 16))]
)
def test_versions_are_read(text: str, version: tuple[int, int]) -> None:
    assert _stock.version_of(text) == version


def test_on_mps_a_call_reaches_the_kernels() -> None:
    if not has_mps():
        pytest.skip("this machine has no MPS device")
    q, k, v = (tensor.to("mps") for tensor in tensors())
    with sdpa.patched(min_seq=0):
        decision = sdpa.explain(q, k, v[..., :16])
        assert decision.gate in {"uneven-v", "correctness"}
        assert is_served(q, k, v[..., :16])


# The gates of CPUs.


def test_cpu_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = _gates.CpuGates()
    monkeypatch.setattr(gates, "_is_measured", True)
    monkeypatch.setattr(gates, "_in_matrix_unit", {torch.bfloat16})
    assert gates.decide(mps_call(64)).serves
    assert not gates.decide(mps_call(8)).serves
    assert not gates.decide(mps_call(64, dtype=torch.bfloat16)).serves
    assert gates.decide(mps_call(1, 512, dtype=torch.bfloat16)).serves
    assert not gates.decide(mps_call(64, mask=torch.float32)).serves
    assert gates.decide(mps_call(64, mask=torch.bool)).serves
    monkeypatch.setattr(gates, "_is_measured", False)
    assert "measured" in gates.decide(mps_call(64)).reason


def test_forms_that_are_shut_are_remembered_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_gates, "MOST_FORMS", 3)
    sdpa.install(cpu=True)
    assert _state.patch is not None
    assert _state.patch.cpu is not None
    for length in (1, 1, 2, 3, 4, 4):
        q = torch.randn(1, 1, length, 8)
        functional.scaled_dot_product_attention(q, q, q)
    assert len(_state.patch.cpu.shut) == 1
    with torch.autocast("cpu", torch.bfloat16):
        functional.scaled_dot_product_attention(q, q, q)
    assert len(_state.patch.cpu.shut) == 1


def test_forms_tell_apart_whatever_gates_look_at() -> None:
    forms = _native.ShutForms(100)
    q = torch.randn(2, 4, 6, 8)
    mask = torch.ones(6, 6).bool()
    none: dict[str, Any] = {}
    forms.add(q, q, q, (), none)
    for options, named in (((None, 0.0, False), none), ((), {"scale": 2.0, "attn_mask": None})):
        assert forms.holds(q.clone(), q, q, options, named)
    wider, half, strided = q.repeat(1, 1, 1, 2), q.half(), q.mT.contiguous().mT
    others: list[tuple[Tensor, Tensor, Tensor, tuple[Any, ...], dict[str, Any]]] = [
        (wider, q, q, (), none),
        (q, wider, q, (), none),
        (q, q, wider, (), none),
        (half, q, q, (), none),
        (q, half, q, (), none),
        (q, q, half, (), none),
        (q[0], q[0], q[0], (), none),
        (strided, q, q, (), none),
        (q, q, q, (mask,), none),
        (q, q, q, (), {"attn_mask": mask.float()}),
        (q, q, q, (None, 0.0, True), none),
        (q, q, q, (), {"enable_gqa": True}),
    ]
    for arguments in others:
        assert not forms.holds(*arguments)
        before = len(forms)
        forms.add(*arguments)
        assert len(forms) == before + 1, "each of them is a form"
    assert forms.holds(q, q, q, (), {"is_causal": True})


def test_what_has_no_form_is_never_remembered() -> None:
    forms = _native.ShutForms(100)
    q = torch.randn(2, 4, 6, 8)
    odd: list[tuple[Any, Any, Any, tuple[Any, ...], dict[str, Any]]] = [
        (torch.nn.Parameter(q), q, q, (), {}),
        (q, None, "v", (), {}),
        (q, q, q, ("mask",), {}),
        (q, q, q, (None, 0.0, 1), {}),
        (q, q, q, (), {"enable_gqa": None}),
        (q.to("meta"), q, q, (), {}),
        (q.to_sparse(), q, q, (), {}),
    ]
    for arguments in odd:
        forms.add(*arguments)
        assert not forms.holds(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        forms.add(q, q, q, (), {})
    assert len(forms) == 0


def overhead_us(arguments: tuple[Tensor, ...], rounds: int = 25, calls: int = 400) -> float:
    """Median over interleaved rounds of what the patch adds to a call, in CPU time."""

    def measure(function: Any) -> float:
        start = time.thread_time()
        for _ in range(calls):
            function(*arguments)
        return (time.thread_time() - start) / calls * 1e6

    patched = functional.scaled_dot_product_attention
    pairs = [(measure(stock), measure(patched)) for _ in range(rounds)]
    return statistics.median(with_patch - without for without, with_patch in pairs)


@pytest.mark.parametrize("device", ["cpu off", "cpu", "mps"])
def test_calls_that_fall_through_cost_little(device: str) -> None:
    """About 2 microseconds; a shared machine gets three times as long."""
    q = torch.randn(1, 1, 4, 8)
    with sdpa.patched(cpu=device == "cpu"):
        assert _state.patch is not None
        if device == "mps":
            _state.patch = _Patch(None, _gates.MpsGates(THRESHOLDS, NEW))
        assert not is_served(q, q, q)
        assert overhead_us((q, q, q)) < 6.0


def test_reasons_are_distinct() -> None:
    refusals = [x for x in vars(_call).values() if isinstance(x, sdpa.Decision)]
    assert len({x.reason for x in refusals}) == len(refusals)
    assert not any(x.serves for x in refusals)
