"""What may come in from outside: wrong calls, hostile tensors, threads, forks and signals."""

# Wrong calls are the subject.
# mypy: disable-error-code="arg-type, misc"

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import metal_flash_attn
import numpy as np
import pytest
import torch
from metal_flash_attn import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    plan,
)
from torch import Tensor


def dense(batch: int = 2, length: int = 5, heads: int = 4, dim: int = 8) -> Tensor:
    return torch.ones(batch, length, heads, dim)


Q, K = dense(), dense(length=7, heads=2)
KV, QKV = torch.ones(2, 7, 2, 2, 8), torch.ones(2, 5, 3, 4, 8)
TQ, TK, TKV, TQKV = (torch.ones(10, *shape) for shape in [(4, 8), (2, 8), (2, 2, 8), (3, 4, 8)])
CU = torch.tensor([0, 4, 10], dtype=torch.int32)


def cu(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def varlen(q: Any = TQ, k: Any = TK, v: Any = TK, *lengths: Any, **options: Any) -> Any:
    return flash_attn_varlen_func(q, k, v, *(lengths or (CU, CU, 6, 6)), **options)


TESTS = str(Path(__file__).parent)

# (call, exception, what the message says: the argument, what came, what is allowed)
WRONG_CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # Not tensors.
    (lambda: flash_attn_func(None, K, K), TypeError, "q is None; allowed: torch.Tensor"),
    (lambda: flash_attn_func(Q, 3, K), TypeError, r"k is 3 (int); allowed: torch.Tensor"),
    (lambda: flash_attn_func(Q, K, "v"), TypeError, r"v is 'v' (str); allowed: torch.Tensor"),
    (
        lambda: flash_attn_func(np.ones((2, 5, 4, 8), np.float32), K, K),
        TypeError,
        "q is a numpy.ndarray; allowed: torch.Tensor",
    ),
    (lambda: flash_attn_func([Q], K, K), TypeError, "q is a list; allowed: torch.Tensor"),
    (
        lambda: flash_attn_kvpacked_func(Q, (K, K)),
        TypeError,
        "kv is a tuple; allowed: torch.Tensor",
    ),
    (
        lambda: flash_attn_qkvpacked_func(object()),
        TypeError,
        "qkv is an object; allowed: torch.Tensor",
    ),
    (
        lambda: flash_attn_func(Q, K, K, alibi_slopes=[1.0]),
        TypeError,
        "alibi_slopes is a list; allowed: torch.Tensor",
    ),
    (
        lambda: varlen(TQ, TK, TK, [0, 4, 10], CU, 6, 6),
        TypeError,
        "cu_seqlens_q is a list; allowed: torch.Tensor",
    ),
    (
        lambda: varlen(TQ, TK, TK, CU, None, 6, 6),
        TypeError,
        "cu_seqlens_k is None; allowed: torch.Tensor",
    ),
    (
        lambda: flash_attn_varlen_qkvpacked_func(TQKV, None, 6),
        TypeError,
        "cu_seqlens is None; allowed: torch.Tensor",
    ),
    (lambda: attention(Q, K, K, mask=1), TypeError, "mask is 1 (int); allowed: torch.Tensor"),
    # Dtypes.
    (
        lambda: flash_attn_func(Q.double(), K.double(), K.double()),
        TypeError,
        "q has dtype float64; allowed: float32, float16 or bfloat16",
    ),
    (
        lambda: flash_attn_func(Q.int(), K.int(), K.int()),
        TypeError,
        "q has dtype int32; allowed: float32, float16 or bfloat16",
    ),
    (
        lambda: flash_attn_func(Q.to(torch.complex64), K, K),
        TypeError,
        "q has dtype complex64; allowed: float32, float16 or bfloat16",
    ),
    (
        lambda: flash_attn_qkvpacked_func(QKV.bool()),
        TypeError,
        "qkv has dtype bool; allowed: float32, float16 or bfloat16",
    ),
    (
        lambda: flash_attn_func(Q, K.half(), K),
        TypeError,
        "k has dtype float16; allowed: float32, the dtype of q",
    ),
    (
        lambda: flash_attn_func(Q, K, K.bfloat16()),
        TypeError,
        "v has dtype bfloat16; allowed: float32, the dtype of q",
    ),
    (
        lambda: flash_attn_kvpacked_func(Q, KV.half()),
        TypeError,
        "kv has dtype float16; allowed: float32, the dtype of q",
    ),
    (
        lambda: varlen(TQ, TK, TK, CU.long(), CU, 6, 6),
        TypeError,
        "cu_seqlens_q has dtype int64; allowed: int32",
    ),
    (
        lambda: flash_attn_varlen_qkvpacked_func(TQKV, CU.long(), 6),
        TypeError,
        "cu_seqlens has dtype int64; allowed: int32",
    ),
    (
        lambda: flash_attn_func(Q, K, K, alibi_slopes=torch.ones(4).half()),
        TypeError,
        "alibi_slopes has dtype float16; allowed: float32",
    ),
    (
        lambda: attention(Q, K, K, bias=torch.ones(5, 7, dtype=torch.bool)),
        TypeError,
        "bias has dtype bool; allowed: float32, float16 or bfloat16",
    ),
    (
        lambda: attention(Q, K, K, mask=torch.ones(5, 7)),
        TypeError,
        "mask has dtype float32; allowed: bool",
    ),
    (
        lambda: attention(Q, K, K, sinks=torch.ones(4).double()),
        TypeError,
        "sinks has dtype float64; allowed: float32",
    ),
    # Kinds of tensors.
    (
        lambda: flash_attn_func(Q.to_sparse(), K, K),
        TypeError,
        "q is a sparse_coo tensor; allowed: dense (torch.strided) tensors",
    ),
    (
        lambda: flash_attn_kvpacked_func(Q, KV.to_mkldnn()),
        TypeError,
        "kv is a _mkldnn tensor; allowed: dense (torch.strided) tensors",
    ),
    (
        lambda: flash_attn_func(torch.nested.nested_tensor([Q[0], Q[1]]), K, K),
        TypeError,
        "q is a nested tensor; allowed: dense (torch.strided) tensors",
    ),
    (
        lambda: flash_attn_func(Q, K.to("meta"), K),
        ValueError,
        "k is on device meta; allowed: cpu, the device of q",
    ),
    (
        lambda: flash_attn_qkvpacked_func(QKV, alibi_slopes=torch.ones(4, device="meta")),
        ValueError,
        "alibi_slopes is on device meta; allowed: cpu, the device of qkv",
    ),
    # Shapes.
    (
        lambda: flash_attn_func(Q[0], K, K),
        ValueError,
        "q has shape (5, 4, 8); allowed: 4 dimensions (batch, seqlen, heads, head_dim)",
    ),
    (
        lambda: flash_attn_func(torch.ones(()), K, K),
        ValueError,
        "q has shape (); allowed: 4 dimensions (batch, seqlen, heads, head_dim)",
    ),
    (
        lambda: flash_attn_func(Q.view(1, 1, 2, 5, 4, 8), K, K),
        ValueError,
        "q has shape (1, 1, 2, 5, 4, 8); allowed: at most 5 dimensions",
    ),
    (
        lambda: flash_attn_func(Q, K[:1], K),
        ValueError,
        "k has shape (1, 7, 2, 8); allowed: batch = 2, as in q",
    ),
    (
        lambda: flash_attn_kvpacked_func(Q, KV[:1]),
        ValueError,
        "kv has shape (1, 7, 2, 2, 8); allowed: batch = 2, as in q",
    ),
    (
        lambda: flash_attn_func(Q, K, K[:, :3]),
        ValueError,
        "v has shape (2, 3, 2, 8); allowed: seqlen = 7, as in k",
    ),
    (
        lambda: flash_attn_func(Q, dense(heads=3), dense(heads=3)),
        ValueError,
        "k has shape (2, 5, 3, 8); allowed: a number of heads that divides the 4 heads of q",
    ),
    (
        lambda: flash_attn_func(Q, K, dense(length=7)),
        ValueError,
        "v has shape (2, 7, 4, 8); allowed: heads = 2, as in k",
    ),
    (
        lambda: flash_attn_func(Q, K[..., :4], K),
        ValueError,
        "k has shape (2, 7, 2, 4); allowed: head_dim = 8, as in q",
    ),
    (
        lambda: flash_attn_func(Q[..., :0], K[..., :0], K),
        ValueError,
        "q has shape (2, 5, 4, 0); allowed: a head_dim of at least 1",
    ),
    (
        lambda: flash_attn_qkvpacked_func(QKV[:, :, :2]),
        ValueError,
        "qkv has shape (2, 5, 2, 4, 8); allowed: 5 dimensions (batch, seqlen, 3, heads, head_dim)",
    ),
    (
        lambda: flash_attn_kvpacked_func(Q, QKV),
        ValueError,
        "kv has shape (2, 5, 3, 4, 8); allowed: 5 dimensions (batch, seqlen, 2, heads, head_dim)",
    ),
    (
        lambda: flash_attn_varlen_qkvpacked_func(QKV, CU, 6),
        ValueError,
        "qkv has shape (2, 5, 3, 4, 8); allowed: 4 dimensions (total, 3, heads, head_dim)",
    ),
    (
        lambda: varlen(Q, TK, TK),
        ValueError,
        "q has shape (2, 5, 4, 8); allowed: 3 dimensions (total, heads, head_dim)",
    ),
    (
        lambda: varlen(TQ, TK, TK, CU[None], CU, 6, 6),
        ValueError,
        "cu_seqlens_q has shape (1, 3); allowed: (batch + 1)",
    ),
    (
        lambda: varlen(TQ, TK, TK, CU[:0], CU, 6, 6),
        ValueError,
        "cu_seqlens_q has shape (0); allowed: (batch + 1)",
    ),
    (
        lambda: varlen(TQ, TK, TK, CU, CU[:2], 6, 6),
        ValueError,
        "cu_seqlens_k has shape (2); allowed: (3), as cu_seqlens_q",
    ),
    (
        lambda: varlen(TQ, TK, TK, cu(0, 1, 4, 5, 10)[::2], CU, 6, 6),
        ValueError,
        "cu_seqlens_q is a tensor with stride 2; allowed: a contiguous tensor",
    ),
    (
        lambda: flash_attn_func(Q, K, K, alibi_slopes=torch.ones(2)),
        ValueError,
        "alibi_slopes has shape (2); allowed: (4) or (2, 4)",
    ),
    (
        lambda: attention(Q, K, K, bias=torch.ones(5, 5)),
        ValueError,
        "bias has shape (5, 5); allowed: a shape that broadcasts to (2, 4, 5, 7)",
    ),
    (
        lambda: attention(Q, K, K, mask=torch.ones(3, 1, 5, 7, dtype=torch.bool)),
        ValueError,
        "mask has shape (3, 1, 5, 7); allowed: a shape that broadcasts to (2, 4, 5, 7)",
    ),
    (
        lambda: attention(Q, K, K, sinks=torch.ones(3)),
        ValueError,
        "sinks has shape (3); allowed: (4)",
    ),
    # Lengths.
    (
        lambda: varlen(TQ, TK, TK, cu(0, 6, 4), CU, 6, 6),
        ValueError,
        "cu_seqlens_q is 4 at index 2; allowed: offsets that never decrease",
    ),
    (
        lambda: varlen(TQ, TK, TK, CU, cu(0, 4, 11), 6, 6),
        ValueError,
        "cu_seqlens_k is 11 at index 2; allowed: offsets that never decrease, from 0 to the 10",
    ),
    (
        lambda: flash_attn_varlen_qkvpacked_func(TQKV, cu(-1, 4, 10), 6),
        ValueError,
        "cu_seqlens is -1 at index 0; allowed: offsets that never decrease",
    ),
    (
        lambda: flash_attn_varlen_kvpacked_func(TQ, TKV, CU, CU, 5, 6),
        ValueError,
        "max_seqlen_q is 5; allowed: at least 6, the length of sequence 1 in cu_seqlens_q",
    ),
    (
        lambda: flash_attn_varlen_qkvpacked_func(TQKV, CU, -6),
        ValueError,
        "max_seqlen is -6; allowed: the length of the longest sequence",
    ),
    (
        lambda: varlen(TQ, TK, TK, CU, CU, 6.0, 6),
        TypeError,
        "max_seqlen_q is 6.0 (float); allowed: an integer",
    ),
    (
        lambda: varlen(TQ, TK, TK, CU, CU, 6, None),
        TypeError,
        "max_seqlen_k is None; allowed: an integer",
    ),
    # Numbers.
    (
        lambda: flash_attn_func(Q, K, K, softmax_scale="big"),
        TypeError,
        "softmax_scale is 'big' (str); allowed: None or a real number",
    ),
    (
        lambda: flash_attn_func(Q, K, K, softmax_scale=torch.ones(2)),
        TypeError,
        "softmax_scale is a torch.Tensor; allowed: None or a real number",
    ),
    (
        lambda: flash_attn_func(Q, K, K, softmax_scale=float("nan")),
        ValueError,
        "softmax_scale is NaN; allowed: ",
    ),
    (
        lambda: flash_attn_func(Q, K, K, softcap=-1.0),
        ValueError,
        "softcap is -1; allowed: 0 (off) or a positive number",
    ),
    (
        lambda: flash_attn_func(Q, K, K, softcap=None),
        TypeError,
        "softcap is None; allowed: a real number",
    ),
    (
        lambda: flash_attn_func(Q, K, K, dropout_p=1.0),
        ValueError,
        "dropout_p is 1; allowed: a probability in [0, 1)",
    ),
    (
        lambda: flash_attn_func(Q, K, K, dropout_p=float("nan")),
        ValueError,
        "dropout_p is NaN; allowed: a probability in [0, 1)",
    ),
    (
        lambda: flash_attn_func(Q, K, K, causal="no"),
        TypeError,
        "causal is 'no' (str); allowed: True or False",
    ),
    (
        lambda: flash_attn_func(Q, K, K, causal=torch.ones(2, dtype=torch.bool)),
        TypeError,
        "causal is a torch.Tensor; allowed: True or False",
    ),
    (
        lambda: flash_attn_func(Q, K, K, window_size=3),
        TypeError,
        "window_size is 3 (int); allowed: two integers (left, right)",
    ),
    (
        lambda: flash_attn_func(Q, K, K, window_size=(1, 2, 3)),
        ValueError,
        "window_size is (1, 2, 3); allowed: two integers (left, right)",
    ),
    (
        lambda: flash_attn_func(Q, K, K, window_size=(1.5, 2)),
        TypeError,
        "window_size is 1.5 (float); allowed: two integers (left, right)",
    ),
    (
        lambda: flash_attn_func(Q, K, K, window_size=(2**70, 2)),
        ValueError,
        "window_size is 1180591620717411303424 (int); allowed: integers of at most 64 bits",
    ),
    # Not supported.
    (
        lambda: flash_attn_func(Q, K, K, dropout_p=0.1, softcap=3.0),
        NotImplementedError,
        "softcap: softcap together with dropout is not supported; pass dropout_p=0.0",
    ),
    (
        lambda: flash_attn_func(Q, K, K, alibi_slopes=torch.rand(2, requires_grad=True)),
        NotImplementedError,
        "alibi_slopes: a tensor that requires grad is not supported; pass alibi_slopes.detach()",
    ),
    (
        lambda: flash_attn_func(Q.clone().requires_grad_(), K, K[:, :3]),
        ValueError,
        "v has shape",
    ),
    (
        lambda: flash_attn_func(Q, K, K, softmax_scale=torch.tensor(1.0, requires_grad=True)),
        NotImplementedError,
        "softmax_scale: a tensor that requires grad is not supported; pass a Python number",
    ),
    (
        lambda: attention(
            TQ,
            TK,
            TK,
            bias=torch.ones(4, 4),
            cu_seqlens_q=CU,
            cu_seqlens_k=CU,
            max_seqlen_q=6,
            max_seqlen_k=6,
        ),
        NotImplementedError,
        "bias: a bias over packed sequences is not supported; pad the sequences",
    ),
    (
        lambda: attention(Q, K, K, bias=torch.ones(1), mask=torch.ones(1)),
        ValueError,
        "bias and mask are both given; allowed: one of them",
    ),
    (lambda: plan(Q, 3, K), TypeError, "k is 3 (int); allowed: torch.Tensor"),
]


@pytest.mark.parametrize("row", WRONG_CALLS, ids=[row[2].split(";")[0] for row in WRONG_CALLS])
@pytest.mark.filterwarnings("ignore:.*[Nn]ested.*:UserWarning")
def test_wrong_calls(row: tuple[Callable[[], Any], type[Exception], str]) -> None:
    call, exception, message = row
    with pytest.raises(exception) as caught:
        call()
    assert caught.type is exception
    assert str(caught.value).startswith(message)


def test_gradients_may_be_left_out_on_purpose() -> None:
    q = Q.clone().requires_grad_()
    with torch.no_grad():
        out = flash_attn_func(q, K, K)
    with torch.inference_mode():
        same = flash_attn_func(q, K, K)
    assert not out.requires_grad
    assert torch.equal(out, same)


def test_tangents_are_not_dropped() -> None:
    call = lambda q: flash_attn_func(q, K, K)  # noqa: E731
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(call, (Q,), (Q,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode"),
    ):
        call(torch.autograd.forward_ad.make_dual(Q, Q))


def test_panics_become_runtime_errors(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r"internal error in mtlflashattn.*: asked to panic"):
        metal_flash_attn._native._panic()
    assert "asked to panic" in capfd.readouterr().err


@pytest.mark.parametrize(("tier", "seed"), [("auto", 0), ("auto", 1), ("torch", 2)])
def test_hostile_inputs_are_served_or_refused(child: Any, tier: str, seed: int) -> None:
    env = {"MTLFLASHATTN_KERNEL": tier, "MTLFLASHATTN_TORCH_CHUNK": "3"}
    process = child(f"import hostile; hostile.survive({seed})", PYTHONPATH=TESTS, **env)
    assert process.stdout.startswith("survived")


def test_hostile_inputs_are_served_or_refused_by_metal_kernels(child: Any) -> None:
    # Features make kernels: without the check before first use each is compiled and that is all.
    env = {"MTLFLASHATTN_DEVICE": "simulator", "MTLFLASHATTN_PROBE": "off"}
    env["MTLFLASHATTN_KERNEL"] = "scalar"
    process = child("import hostile; hostile.survive(3, 150)", PYTHONPATH=TESTS, **env)
    assert process.stdout.startswith("survived")


FORK = """
import warnings; warnings.simplefilter("ignore")
import os, torch
from metal_flash_attn import flash_attn_func
torch.set_num_threads(2)
q = torch.randn(2, 700, 4, 64)
# Not torch.equal: the threads of torch itself hang in a forked process.
expected = flash_attn_func(q, q, q).numpy().tobytes()
for generation in range(3):
    if pid := os.fork():
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    assert flash_attn_func(q, q, q).numpy().tobytes() == expected
print("done")
"""


def test_calls_work_after_a_fork(child: Any) -> None:
    # Each of the eight processes prints.
    assert child(FORK).stdout == "done\n" * 8


def test_threads_call_at_once() -> None:
    torch.set_num_threads(2)
    problems = [torch.randn(1, 100 + 150 * i, 4, 64) for i in range(4)]
    expected = [flash_attn_func(q, q, q, causal=True) for q in problems]
    wrong: list[int] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        for turn in range(12):
            index = (number + turn) % 4
            q = problems[index]
            got = flash_attn_func(q, q, q, causal=True)
            if not torch.equal(got, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


INTERRUPT = """
import os, signal, threading, time, torch
from metal_flash_attn import flash_attn_func
# A shell lets its background jobs ignore the signal, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(2)
q = torch.zeros(1, {length}, 8, 64)
flash_attn_func(q[:, :64], q[:, :64], q[:, :64])
sent = []
def interrupt():
    time.sleep(0.5)
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    flash_attn_func(q, q, q)
except KeyboardInterrupt:
    print(time.monotonic() - sent[0])
# Nothing is left over: the next call works.
assert flash_attn_func(q[:, :64], q[:, :64], q[:, :64]).eq(0).all()
"""


def test_control_c_ends_a_long_call(child: Any) -> None:
    # About 9 TFLOP: minutes.
    delay = float(child(INTERRUPT.format(length=65536)).stdout)
    assert delay < 3


def test_other_threads_run_during_a_long_call() -> None:
    q = torch.randn(1, 4096, 8, 64)
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks
    flash_attn_func(q, q, q)
    during = ticks - before
    done.set()
    thread.join()
    assert during > 10
