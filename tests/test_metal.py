"""The dispatch of Metal kernels: through a stand-in for torch's MPS half, and by the simulator.

Everything from the public function to the kernel object is the shipped code. What replaces torch's
compiled half follows its rules (standin_mps.py), and what executes the kernels is the simulator.
The numerical tests of test_interface.py run over the same ways.
"""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import standin_mps
import torch
from metal_flash_attn import (
    _native,
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    plan,
    trace,
)
from reference import Arithmetic, Rules
from reference import attention as exact_attention
from standin_mps import installed
from torch import Tensor
from typing_extensions import Self

METAL = Arithmetic(is_metal=True, weights=torch.float16)


def problem(length: int = 21, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, length, heads, dim).half() for heads in (4, 2, 2))
    return q, k, v


def served(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of `call`, and the tiers that served."""
    with trace() as calls:
        result = call()
    return result, [entry.tier for entry in calls.calls]


def check(result: Tensor, q: Tensor, k: Tensor, v: Tensor, tier: str, **rules: Any) -> None:
    arithmetic = METAL if tier == "simdgroup" else Arithmetic()
    exact_attention(q, k, v, Rules(**rules), arithmetic).check(result)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MTLFLASHATTN_DEVICE", "simulator")
    _native._forget_kernels()
    yield
    _native._forget_kernels()


# What a launch looks like.


def test_a_launch_binds_ten_tensors_and_two_lists() -> None:
    q, k, v = problem()
    with installed() as device:
        out, tiers = served(lambda: flash_attn_func(q, k, v, causal=True))
    assert tiers == ["simdgroup"]
    check(out, q, k, v, "simdgroup", causal=True)
    # Three small problems before the first use, and the call.
    assert [len(device.compiled), len(device.dispatches)] == [1, 4]
    launch = device.dispatches[-1]
    tensors, sizes, factors = launch.arguments[:-2], *launch.arguments[-2:]
    assert len(tensors) == 10
    assert all(isinstance(tensor, Tensor) for tensor in tensors)
    assert [tensor.data_ptr() for tensor in tensors[:4]] == [t.data_ptr() for t in (q, k, v, out)]
    assert all(type(size) is int for size in sizes)
    assert all(type(factor) is float for factor in factors)
    assert launch.group_size[0] == 32
    assert all(n % group == 0 for n, group in zip(launch.threads, launch.group_size, strict=True))


def test_a_kernel_is_compiled_once_for_all_lengths() -> None:
    with installed() as device:
        for length in (1, 7, 30):
            q, k, v = problem(length)
            check(flash_attn_func(q, k, v), q, k, v, "simdgroup")
        assert len(device.compiled) == 1
        # The LSE is one more output, and so another kernel.
        flash_attn_func(q, k, v, return_attn_probs=True)
        assert len(device.compiled) == 2


def test_a_batch_of_ragged_sequences_is_one_launch_that_does_not_read_the_offsets() -> None:
    q, k, v = (torch.randn(40, heads, 16).half() for heads in (4, 2, 2))
    cu = torch.tensor([0, 9, 9, 31], dtype=torch.int32)
    with installed() as device:
        flash_attn_varlen_func(q, k, v, cu, cu, 22, 22)
        before = len(device.dispatches)
        # Of a bound that is too small the CPU engine says so; finding out would wait for the GPU.
        out = flash_attn_varlen_func(q, k, v, cu, cu, 21, 21)
        assert len(device.dispatches) == before + 1
    assert out[31:].eq(0).all()
    with pytest.raises(ValueError, match="max_seqlen_q"):
        flash_attn_varlen_func(q, k, v, cu, cu, 21, 21)


@pytest.mark.parametrize("wrong", [[0, 2**31 - 1, 5], [-(2**31), 70, 3], [40, 0, 40]])
def test_wrong_offsets_that_nobody_reads_do_no_harm(wrong: list[int]) -> None:
    memory = torch.full((200, 2, 16), torch.nan).half()
    memory[80:120] = 1.0
    tokens = memory[80:120]
    cu = torch.tensor(wrong, dtype=torch.int32)
    with installed():
        out = flash_attn_varlen_func(tokens, tokens, tokens, cu, cu, 40, 40)
    # Every value is 1: rows that were computed are 1, and the others 0.
    assert ((out == 0) | (out == 1)).all()


def test_nothing_is_launched_for_nothing() -> None:
    q, k, v = problem()
    with installed() as device:
        flash_attn_func(q, k, v)
        before = len(device.dispatches)
        for nothing in [(q[:0], k[:0], v[:0]), (q[:, :0], k, v)]:
            out, tiers = served(functools.partial(flash_attn_func, *nothing))
            assert out.numel() == 0
            assert tiers == ["simdgroup"]
        assert len(device.dispatches) == before
        no_keys = flash_attn_func(q, k[:, :0], v[:, :0])
        assert len(device.dispatches) == before + 1
    assert no_keys.eq(0).all()


# Nothing is copied.


def allocations(call: Callable[[], Any]) -> tuple[list[int], set[str]]:
    """Sizes of the memory that torch allocated during `call`, and the operations it ran."""
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        call()
    events = profile.events()
    assert events is not None
    sizes = [event.self_cpu_memory_usage for event in events]
    return [size for size in sizes if size > 0], {event.name for event in events}


def layouts() -> dict[str, Callable[[], Any]]:
    def heads_first(*shape: int) -> Tensor:
        return torch.randn(shape).half().transpose(1, 2).contiguous().transpose(1, 2)

    def padded(*shape: int) -> Tensor:
        return torch.randn(*shape[:-1], shape[-1] + 3).half()[..., : shape[-1]]

    q, k, v = problem()
    kv, qkv = torch.randn(1, 21, 2, 2, 16).half(), torch.randn(1, 21, 3, 4, 16).half()
    cu = torch.tensor([0, 9, 21], dtype=torch.int32)
    views = padded(1, 21, 4, 16), padded(1, 33, 2, 16), padded(1, 33, 2, 16)
    first = heads_first(2, 21, 4, 24), heads_first(2, 33, 2, 24), heads_first(2, 33, 2, 24)
    return {
        "grouped heads": lambda: flash_attn_func(q, k, v, causal=True),
        "with lse": lambda: flash_attn_func(q, k, v, return_attn_probs=True)[:2],
        "heads first": lambda: flash_attn_func(*first),
        "padded rows": lambda: flash_attn_func(*views),
        "broadcast keys": lambda: flash_attn_func(q, k[:, :1].expand(1, 21, 2, 16), v),
        "kvpacked": lambda: flash_attn_kvpacked_func(q, kv),
        "qkvpacked": lambda: flash_attn_qkvpacked_func(qkv),
        "varlen": lambda: flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 12, 12),
        "bias": lambda: attention(q, k, v, bias=torch.ones(1, 1, 1, 1).expand(1, 4, 21, 21)),
    }


@pytest.mark.parametrize("layout", layouts())
def test_inputs_are_read_where_they_lie(layout: str) -> None:
    call = layouts()[layout]
    with installed():
        results = call()
        sizes, operations = allocations(call)
    results = results if isinstance(results, tuple) else (results,)
    expected = sorted(t.untyped_storage().nbytes() for t in results)
    extra = [4] if layout == "bias" else []  # The bias itself.
    assert sorted(sizes) == sorted(expected + extra)
    assert not {name for name in operations if "copy" in name or "contiguous" in name}


def test_rows_are_read_by_fours_only_where_each_of_them_starts_at_one() -> None:
    memory = torch.randn(1, 21, 2, 24).half()
    q, k = memory[..., :16], memory[..., 4:20]
    values = {0: k, 1: memory[..., 1:17], 2: memory[..., 2:18], 4: k, 8: memory[..., 8:]}
    aligned = {}
    for start, v in values.items():
        with installed() as device:
            out = flash_attn_func(q, k, v)
        check(out, q, k, v, "simdgroup")
        aligned[start] = "#define ALIGNED 1\n" in device.compiled[0]
    assert aligned == {0: True, 1: False, 2: False, 4: True, 8: True}
    with installed() as device:
        rows = torch.randn(1, 21, 2, 17).half()[..., :16]
        check(flash_attn_func(q, rows, k), q, rows, k, "simdgroup")
    assert "#define ALIGNED 0\n" in device.compiled[0]


def test_only_inputs_with_scattered_rows_are_copied() -> None:
    q, k, v = problem()
    scattered = k.transpose(1, 3).contiguous().transpose(1, 3)
    with installed():
        expected = flash_attn_func(q, k, v)
        sizes, _ = allocations(lambda: flash_attn_func(q, scattered, v))
        assert sorted(sizes) == sorted([k.nbytes, expected.nbytes])
        assert torch.equal(flash_attn_func(q, scattered, v), expected)


# Faults.

FAULTS: dict[str, dict[str, Callable[[str], bool]]] = {
    "refused by the stand-in": {"refuses_source": lambda text: "attention_simdgroup" in text},
    "Failed to create function state": {"refuses_pipeline": lambda name: "simdgroup" in name},
    "results are off by": {"is_wrong": lambda text: "attention_simdgroup" in text},
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_broken_kernel_is_replaced_with_one_warning(message: str) -> None:
    q, k, v = problem()
    with installed(**FAULTS[message]) as device:
        with pytest.warns(RuntimeWarning, match=f"simdgroup tier failed.*torch.*{message}") as seen:
            out, tiers = served(lambda: flash_attn_func(q, k, v))
        assert (len(seen), tiers) == (1, ["torch"])
        check(out, q, k, v, "torch")
        # Warnings are errors here: there is no second one, for this kernel or another.
        for tensors in [(q, k, v), problem(dim=24)]:
            out, tiers = served(functools.partial(flash_attn_func, *tensors))
            assert tiers == ["torch"]
            check(out, *tensors, "torch")
        assert len(device.compiled) == 2
        chosen = plan(q, k, v)
        assert chosen.tier == "torch"
        assert message in dict(chosen.reasons)["simdgroup"]


@pytest.mark.parametrize("message", FAULTS)
def test_a_forced_tier_that_is_broken_is_an_error(
    monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "simdgroup")
    q, k, v = problem()
    with installed(**FAULTS[message]):
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=f"MTLFLASHATTN_KERNEL.*{message}"):
                flash_attn_func(q, k, v)
        monkeypatch.setenv("MTLFLASHATTN_KERNEL", "scalar")
        out, tiers = served(lambda: flash_attn_func(q, k, v))
    assert tiers == ["scalar"]
    check(out, q, k, v, "scalar")


def test_only_the_kernel_that_is_broken_is_replaced() -> None:
    def is_wrong(text: str) -> bool:
        return "#define HEAD_DIM 16\n" in text

    with installed(is_wrong=is_wrong):
        q, k, v = problem()
        with pytest.warns(RuntimeWarning, match="head_dim 16"):
            _, tiers = served(lambda: flash_attn_func(q, k, v))
        assert tiers == ["torch"]
        q, k, v = problem(dim=24)
        out, tiers = served(lambda: flash_attn_func(q, k, v))
    assert tiers == ["simdgroup"]
    check(out, q, k, v, "simdgroup")


def test_the_check_before_first_use_is_what_finds_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MTLFLASHATTN_PROBE", "off")
    q, k, v = problem()
    with installed(is_wrong=lambda _: True) as device:
        out, tiers = served(lambda: flash_attn_func(q, k, v))
        assert (tiers, len(device.dispatches)) == (["simdgroup"], 1)
    with pytest.raises(AssertionError, match="times its bound"):
        check(out, q, k, v, "simdgroup")


def test_short_memory_concerns_one_call() -> None:
    q, k, v = problem()
    with installed() as device:
        check(flash_attn_func(q, k, v), q, k, v, "simdgroup")
        device.is_short_of_memory = lambda _: True
        with pytest.warns(RuntimeWarning, match="torch tier serves instead: out of memory: MPS"):
            out, tiers = served(lambda: flash_attn_func(q, k, v))
        assert tiers == ["torch"]
        check(out, q, k, v, "torch")
        device.is_short_of_memory = lambda _: False
        out, tiers = served(lambda: flash_attn_func(q, k, v))
        assert tiers == ["simdgroup"]
        check(out, q, k, v, "simdgroup")


def test_no_memory_for_the_results_is_an_error() -> None:
    endless = torch.zeros(8).half().as_strided((1, 2**40, 1, 8), (0, 0, 8, 1))
    with installed(), pytest.raises(RuntimeError, match="allocate"):
        flash_attn_func(endless, endless[:, :4], endless[:, :4])


def test_a_device_that_holds_fewer_threads_refuses_the_kernel() -> None:
    q, k, v = problem()
    with installed(max_threads=16), pytest.warns(RuntimeWarning, match="exceeds 16 limit"):
        out, tiers = served(lambda: flash_attn_func(q, k, v))
    assert tiers == ["torch"]
    check(out, q, k, v, "torch")


def test_every_kernel_broken_leaves_torch() -> None:
    q, k, v = problem()
    with installed(refuses_source=lambda _: True), pytest.warns(RuntimeWarning):
        out, tiers = served(lambda: flash_attn_func(q, k, v))
    assert tiers == ["torch"]
    check(out, q, k, v, "torch")


def test_control_c_in_the_compiler_is_no_fault_of_the_kernel() -> None:
    def interrupt(_: str) -> bool:
        raise KeyboardInterrupt

    q, k, v = problem()
    with installed(refuses_source=interrupt) as device:
        with pytest.raises(KeyboardInterrupt):
            flash_attn_func(q, k, v)
        device.refuses_source = lambda _: False
        _, tiers = served(lambda: flash_attn_func(q, k, v))
    assert tiers == ["simdgroup"]


def test_a_warning_that_is_an_error_ends_one_call() -> None:
    q, k, v = problem()
    with installed(refuses_source=lambda _: True), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="torch tier serves instead"):
            flash_attn_func(q, k, v)
        out, tiers = served(lambda: flash_attn_func(q, k, v))
    assert tiers == ["torch"]
    check(out, q, k, v, "torch")


def test_memory_is_bounded() -> None:
    """More kernels than are kept: the least recently used ones are compiled again."""
    with installed() as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "_SimulatedLibrary", Counted)
        patch.setenv("MTLFLASHATTN_PROBE", "off")
        inputs = [torch.zeros(1, 1, 1, dim).half() for dim in range(1, 258)]
        for q in inputs:
            flash_attn_func(q, q, q)
        assert len(device.compiled) == len(inputs)
        for q, more in [(inputs[-1], 0), (inputs[1], 0), (inputs[0], 1), (inputs[1], 1)]:
            flash_attn_func(q, q, q)
            assert len(device.compiled) == len(inputs) + more


class Counted:
    """A library whose kernels do nothing."""

    max_threads = 1024

    def __init__(self, source: str) -> None:
        self.source = source

    def pipeline(self, _: str) -> Counted:
        return self

    def dispatch(self, *_: Any) -> None:
        """Leaves the output as it is."""


# Threads.


def test_threads_never_share_a_kernel_object() -> None:
    q, k, v = problem(40)
    wrong: list[Tensor] = []
    with installed():
        expected = flash_attn_func(q, k, v)

        def work() -> None:
            # The stand-in asserts that an object is called by one thread at a time.
            results = [flash_attn_func(q, k, v) for _ in range(3)]
            wrong.extend(result for result in results if not torch.equal(result, expected))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# What torch does to calls.


def test_compiled_graphs_reach_the_kernels_with_the_strides_of_eager_calls() -> None:
    torch._dynamo.reset()
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in problem())

    def both(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        return [out, lse, flash_attn_func(q, k, v)]

    with installed():
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        (results, tiers), eager = served(lambda: compiled(q, k, v)), both(q, k, v)
    assert set(tiers) == {"simdgroup"}
    for one, other in zip(results, eager, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


class OnMps(torch.Tensor):
    """A tensor that says it lives on `mps`, over CPU memory."""

    memory: Tensor

    def __new__(cls, memory: Tensor) -> Self:
        mps = torch.device("mps")
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, memory.shape, strides=memory.stride(), dtype=memory.dtype, device=mps
        )
        wrapper.memory = memory
        return wrapper

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        if func is torch.ops.mtlflashattn.forward.default:
            return _native.execute_operator(*args)
        here = {"device": torch.device("cpu")} if "device" in (kwargs or {}) else {}
        unwrap = lambda t: t.memory if isinstance(t, OnMps) else t  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, {**(kwargs or {}), **here}))
        wrap = lambda t: OnMps(t) if isinstance(t, Tensor) else t  # noqa: E731
        return torch.utils._pytree.tree_map(wrap, func(*args, **kwargs))


def test_tensors_on_mps_are_known_by_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # The small problem would be moved to a device that is not there.
    monkeypatch.setenv("MTLFLASHATTN_PROBE", "off")
    q, k, v = problem()
    monkeypatch.setattr(standin_mps, "unwrap", lambda tensor: getattr(tensor, "memory", tensor))
    with installed():
        _native._pretend_mps(False)
        out, tiers = served(lambda: flash_attn_func(OnMps(q), OnMps(k), OnMps(v)))
        assert plan(OnMps(q), OnMps(k), OnMps(v)).tier == "simdgroup"
        with pytest.raises(ValueError, match="k is on device cpu; allowed: mps, the device of q"):
            flash_attn_func(OnMps(q), k, OnMps(v))
    assert tiers == ["simdgroup"]
    assert out.device.type == "mps"
    check(out.memory, q, k, v, "simdgroup")


WITHOUT_EXCHANGE = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import standin_mps, metal_flash_attn
q = torch.randn(1, 9, 2, 16)
with standin_mps.installed():
    packed = torch.stack([q, q, q], 2)
    out = metal_flash_attn.flash_attn_qkvpacked_func(packed)
    assert metal_flash_attn.plan(q, q, q).tier == "simdgroup"
torch.testing.assert_close(out, metal_flash_attn.flash_attn_func(q, q, q), atol=1e-5, rtol=1e-5)
"""


def test_metadata_comes_from_attributes_without_the_exchange_api(child: Any) -> None:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no exchange API to do without")
    child(WITHOUT_EXCHANGE, PYTHONPATH=str(Path(__file__).parent))


# The planner's view of the device.


def test_the_plan_tells_what_the_device_lacks() -> None:
    q, k, v = problem()
    with installed():
        reasons = dict(plan(q, k, v).reasons)
    assert reasons["tensorops"] == "needs an M5 or later; this is Apple M1"
    assert reasons["cpu"] == "needs CPU tensors"
    assert reasons["torch"] == "simdgroup comes before it and serves this call"


@pytest.mark.parametrize(
    ("macos", "tier"), [("13.6", "torch"), ("", "torch"), ("14.0", "simdgroup")]
)
def test_bfloat16_needs_a_macos_that_is_known_to_have_it(macos: str, tier: str) -> None:
    q, k, v = (t.bfloat16() for t in problem())
    with installed(macos=macos):
        assert plan(q, k, v).tier == tier


@pytest.mark.usefixtures("simulator")
def test_the_simulator_serves_cpu_tensors() -> None:
    q, k, v = problem()
    out, tiers = served(lambda: flash_attn_func(q, k, v, causal=True))
    assert tiers == ["simdgroup"]
    check(out, q, k, v, "simdgroup", causal=True)
    reasons = dict(plan(q, k, v).reasons)
    assert reasons["cpu"] == "MTLFLASHATTN_DEVICE sends CPU tensors to the simulator"


@pytest.mark.usefixtures("simulator")
def test_packed_sequences_fill_the_rows_between_them() -> None:
    q, k, v = (torch.randn(40, 2, 16) for _ in range(3))
    cu = torch.tensor([3, 9, 9, 31], dtype=torch.int32)
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu, cu, 22, 22, return_attn_probs=True)
    for rows in (slice(0, 3), slice(31, 40)):
        assert out[rows].eq(0).all()
        assert lse[:, rows].eq(torch.inf).all()
    for start, end in itertools.pairwise([3, 9, 31]):
        rows = slice(start, end)
        exact_attention(q[None, rows], k[None, rows], v[None, rows], Rules(), METAL).check(
            out[None, rows], lse[None, :, rows]
        )
