"""What kernels must show before they serve, and how verdicts outlive the process.

Through a stand-in for torch's MPS half, as in test_metal.py. Every test ends with a right answer.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from metal_flash_attn import _native, flash_attn_func, plan, trace
from reference import Arithmetic, Rules
from reference import attention as exact_attention
from standin_mps import HANG, faults_of, installed
from torch import Tensor

METAL = Arithmetic(is_metal=True, weights=torch.float16)
# Launches of one probe.
PROBE = 3


def problem(dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, 21, heads, dim).half() for heads in (4, 2, 2))
    return q, k, v


def is_simdgroup(text: str) -> bool:
    return "attention_simdgroup" in text


def attend(tier: str, dim: int = 16) -> None:
    """A call that `tier` must serve, and get right."""
    q, k, v = problem(dim)
    with trace() as calls:
        out = flash_attn_func(q, k, v, causal=True)
    assert [entry.tier for entry in calls.calls] == [tier]
    arithmetic = METAL if tier == "simdgroup" else Arithmetic()
    exact_attention(q, k, v, Rules(causal=True), arithmetic).check(out)


def fail(message: str, dim: int = 16) -> None:
    """A call whose kernel fails for the first time."""
    with pytest.warns(RuntimeWarning, match=message) as seen:
        attend("torch", dim)
    assert len(seen) == 1


def later() -> None:
    """What a process forgets when it ends."""
    _native._forget_kernels()


def probes() -> dict[str, Any]:
    answer = _native._probes()
    assert answer is not None
    return answer


def verdicts() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = probes()["verdicts"]
    return found


def cache() -> Path:
    return Path(os.environ["MTLFLASHATTN_CACHE"])


# Verdicts are kept.


def test_a_kernel_proves_itself_once_on_a_machine() -> None:
    with installed() as device:
        for _ in range(2):
            attend("simdgroup")
        assert [len(device.compiled), len(device.dispatches)] == [1, PROBE + 2]
        later()
        attend("simdgroup")
        assert [len(device.compiled), len(device.dispatches)] == [2, PROBE + 3]


def test_the_verdict_says_what_was_found() -> None:
    with installed(reported_threads=576):
        attend("simdgroup")
        known = probes()
    assert known["device"] == "mps"
    version = torch.__version__
    assert known["machine"]["gpu"] == "Apple M1, 8 cores"
    assert [known["machine"]["os"], known["machine"]["torch"]] == ["macOS 15.0", version]
    (verdict,) = known["verdicts"]
    assert {name: verdict[name] for name in ("tier", "dtype", "head_dim", "value_dim")} == {
        "tier": "simdgroup",
        "dtype": "float16",
        "head_dim": 16,
        "value_dim": 16,
    }
    assert verdict["features"] == ["causal or window on the right", "aligned rows"]
    assert [verdict["proved"], verdict["failure"], verdict["launches"]] == [True, None, PROBE]
    # 576 threads are the class of at most 184 registers.
    assert [verdict["max_threads_per_threadgroup"], verdict["registers"]] == [576, 184]
    cost = verdict["compile_seconds"] + verdict["probe_seconds"]
    assert cost > 0
    assert known["first_use_seconds"] == pytest.approx(cost)
    stored = json.loads(Path(known["path"]).read_text())
    assert Path(known["path"]).parent == cache()
    assert list(stored["verdicts"]) == [
        f"simdgroup float16 16/16 [{', '.join(verdict['features'])}] {verdict['tile']}"
    ]


def test_without_probes_nothing_is_read_or_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLFLASHATTN_PROBE", "off")
    with installed() as device:
        attend("simdgroup")
        assert len(device.dispatches) == 1
        assert list(cache().iterdir()) == []
        # What served unchecked has to prove itself when that is asked for.
        monkeypatch.setenv("MTLFLASHATTN_PROBE", "on")
        attend("simdgroup")
        assert len(device.dispatches) == 1 + PROBE + 1


def test_an_edited_kernel_is_probed_anew() -> None:
    with installed() as device:
        attend("simdgroup")
        path = Path(probes()["path"])
        (fingerprint,) = {
            v["fingerprint"] for v in json.loads(path.read_text())["verdicts"].values()
        }
        path.write_text(path.read_text().replace(fingerprint, fingerprint[::-1]))
        later()
        attend("simdgroup")
        assert len(device.dispatches) == 2 * (PROBE + 1)
        assert len(verdicts()) == 1


@pytest.mark.parametrize("change", ["macos", "torch", "gpu"])
def test_another_machine_starts_anew(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    with installed(is_wrong=is_simdgroup):
        fail("results are off")
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.1")
    with installed(macos="15.1" if change == "macos" else "15.0") as device:
        if change == "gpu":
            monkeypatch.setattr(torch._C, "_mps_get_core_count", lambda: 7)
        attend("simdgroup")
        assert len(device.dispatches) == PROBE + 1
    assert len(list(cache().glob("*.json"))) == 2


def test_another_pipeline_from_the_same_text_is_probed_anew() -> None:
    with installed(reported_threads=576) as device:
        attend("simdgroup")
        later()
        device.reported_threads = 512
        attend("simdgroup")
        assert len(device.dispatches) == 2 * (PROBE + 1)
        assert [v["max_threads_per_threadgroup"] for v in verdicts()] == [512]


# Kernels that fail.

FAULTS = faults_of(is_simdgroup, "simdgroup") | {"exceeds 16 limit": {"max_threads": 16}}


@pytest.mark.parametrize("message", FAULTS)
def test_a_kernel_that_failed_serves_no_more_on_this_machine(message: str) -> None:
    with installed(**FAULTS[message]):
        fail(f"{message}.*; this kernel serves no more on this machine until MTLFLASHATTN_PROBE=fo")
    # In later processes it is not compiled, let alone launched, and nothing is said.
    with installed() as device:
        assert plan(*problem(), causal=True).tier == "torch"
        attend("torch")
        assert [device.compiled, device.dispatches] == [[], []]
        chosen = plan(*problem(), causal=True)
        assert chosen.tier == "torch"
        assert "MTLFLASHATTN_PROBE=force" in dict(chosen.reasons)["simdgroup"]
        # Another one has its own chance.
        attend("simdgroup", dim=24)


def test_a_remembered_failure_is_an_error_where_the_tier_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with installed(is_wrong=is_simdgroup):
        fail("results are off")
    with installed():
        monkeypatch.setenv("MTLFLASHATTN_KERNEL", "simdgroup")
        with pytest.raises(NotImplementedError, match=r"are off.*MTLFLASHATTN_PROBE=force checks"):
            attend("simdgroup")
        monkeypatch.delenv("MTLFLASHATTN_KERNEL")
        attend("torch")


def test_a_compiler_that_fails_on_one_head_dimension_fails_on_that_alone() -> None:
    with installed(refuses_source=lambda text: "#define HEAD_DIM 24\n" in text):
        attend("simdgroup", dim=16)
        fail("head_dim 24.*refused by the stand-in", dim=24)
        attend("simdgroup", dim=32)
        later()
        for dim, tier in [(16, "simdgroup"), (24, "torch"), (32, "simdgroup")]:
            attend(tier, dim)
        assert {v["head_dim"]: v["proved"] for v in verdicts()} == {16: True, 24: False, 32: True}


@pytest.mark.parametrize("in_the_same_process", [True, False])
def test_a_forced_probe_gives_another_chance(
    monkeypatch: pytest.MonkeyPatch, in_the_same_process: bool
) -> None:
    with installed(is_wrong=is_simdgroup) as device:
        fail("results are off")
        device.is_wrong = lambda _: False
        if not in_the_same_process:
            later()
        monkeypatch.setenv("MTLFLASHATTN_PROBE", "force")
        for _ in range(2):
            attend("simdgroup")
        # One probe each, and the two calls.
        assert len(device.dispatches) == 2 * PROBE + 2
        monkeypatch.delenv("MTLFLASHATTN_PROBE")
        later()
        attend("simdgroup")
        assert len(device.dispatches) == 2 * PROBE + 3
        # It can take the chance away as well.
        device.is_wrong = is_simdgroup
        later()
        monkeypatch.setenv("MTLFLASHATTN_PROBE", "force")
        fail("results are off")
        assert [v["proved"] for v in verdicts()] == [False]


ERROR = "kIOGPUCommandBufferCallbackError"
PASSING = [
    f"Discarded (victim of GPU error/recovery) (00000005:{ERROR}InnocentVictim)",
    f"Ignored (for causing prior/excessive GPU errors) (00000004:{ERROR}SubmissionsIgnored)",
    f"Insufficient Memory (00000008:{ERROR}OutOfMemory)",
    "Compiler failed with XPC_ERROR_CONNECTION_INTERRUPTED",
]


@pytest.mark.parametrize("message", PASSING)
def test_what_is_not_the_kernels_fault_is_not_remembered(message: str) -> None:
    with installed(hangs=is_simdgroup, hang_message=message):
        fail("serves no more in this process until")
        attend("torch")
    with installed():
        attend("simdgroup")


def test_short_memory_during_a_probe_concerns_one_call() -> None:
    with installed(is_short_of_memory=lambda _: True) as device:
        fail("out of memory")
        device.is_short_of_memory = lambda _: False
        attend("simdgroup")


def test_control_c_during_a_probe_is_no_verdict() -> None:
    def interrupt(_: str) -> bool:
        raise KeyboardInterrupt

    with installed(is_wrong=interrupt) as device:
        with pytest.raises(KeyboardInterrupt):
            attend("simdgroup")
        device.is_wrong = lambda _: False
        attend("simdgroup")


def test_work_that_was_launched_before_is_finished_before_a_probe() -> None:
    with installed() as device:
        attend("simdgroup")
        assert device.synchronized == 1
        attend("simdgroup")
        assert device.synchronized == 1
        # An error of earlier work is not the kernel's, and not hidden.
        device.pending = HANG
        with pytest.raises(RuntimeError, match="GPU Hang"):
            attend("simdgroup", dim=24)
        attend("simdgroup", dim=24)


# The file.


def only_record() -> Path:
    (path,) = cache().glob("*.json")
    return path


def cut_off(text: str) -> str:
    return text[: len(text) // 2]


BROKEN: dict[str, Callable[[str], str]] = {
    "cut off": cut_off,
    "empty": lambda _: "",
    "foreign": lambda _: '{"somebody": "else"}',
    "from the future": lambda text: text.replace('"format": 1,', '"format": 99,'),
    "of another machine": lambda text: text.replace("macOS 15.0", "macOS 15.9"),
    "binary": lambda _: "\0" * 100,
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_cannot_be_used_is_replaced(what: str) -> None:
    with installed() as device:
        attend("simdgroup")
        good = only_record().read_text()
        broken = BROKEN[what](good)
        assert broken != good
        only_record().write_text(broken)
        later()
        assert probes()["trouble"] is not None
        attend("simdgroup")
        assert len(device.dispatches) == 2 * (PROBE + 1)
        later()
        assert probes()["trouble"] is None
        attend("simdgroup")
        assert len(device.dispatches) == 2 * (PROBE + 1) + 1


def test_without_a_folder_verdicts_last_as_long_as_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("MTLFLASHATTN_CACHE", str(file / "folder"))
    with installed(is_wrong=is_simdgroup) as device:
        fail("serves no more in this process")
        attend("torch")
        assert len(device.dispatches) == PROBE
        assert [v["proved"] for v in verdicts()] == [False]
        later()
        device.is_wrong = lambda _: False
        attend("simdgroup")
        assert "cannot be written" in probes()["trouble"]


READ_ONLY = """
import os
import torch
import standin_mps, metal_flash_attn
from metal_flash_attn import _native
q = torch.randn(1, 9, 2, 16)
with standin_mps.installed() as device:
    out = metal_flash_attn.flash_attn_func(q, q, q)
    assert len(device.dispatches) == 4, device.dispatches
    assert "cannot be written" in _native._probes()["trouble"]
    assert metal_flash_attn.plan(q, q, q).tier == "simdgroup"
assert os.listdir(os.environ["MTLFLASHATTN_CACHE"]) == []
torch.testing.assert_close(out, metal_flash_attn.flash_attn_func(q, q, q), atol=1e-5, rtol=1e-5)
"""
BESIDE = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


def test_a_read_only_folder_is_no_error(child: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o555)
    under: list[str] = []
    if os.geteuid() == 0:
        # Root may write everywhere unless it gives that up.
        if shutil.which("setpriv") is None:
            pytest.skip("nothing is read-only for root here")
        under = ["setpriv", "--bounding-set=-dac_override"]
    child(READ_ONLY, under=under, PYTHONPATH=BESIDE, MTLFLASHATTN_CACHE=str(folder))


PROCESS = """
import torch
import standin_mps, metal_flash_attn
with standin_mps.installed() as device:
    for dim in {dims}:
        q = torch.randn(1, 9, 2, dim)
        out = metal_flash_attn.flash_attn_func(q, q, q)
        torch.testing.assert_close(
            out, torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), q.transpose(1, 2), q.transpose(1, 2)
            ).transpose(1, 2), atol=1e-5, rtol=1e-5
        )
    print(len(device.dispatches))
"""


def test_two_processes_at_once_lose_nothing(child: Any) -> None:
    halves = [[8, 16, 24], [16, 24, 32]]
    printed: list[str] = []

    def run(dims: list[int]) -> None:
        printed.append(child(PROCESS.format(dims=dims), PYTHONPATH=BESIDE).stdout)

    threads = [threading.Thread(target=run, args=(dims,)) for dims in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(printed) == 2
    every = sorted({dim for dims in halves for dim in dims})
    with installed() as device:
        assert sorted(v["head_dim"] for v in verdicts()) == every
        # They count here, too.
        for dim in every:
            q = torch.randn(1, 9, 2, dim)
            exact_attention(q, q, q, Rules(), METAL).check(flash_attn_func(q, q, q))
        assert len(device.dispatches) == len(every)


def test_a_failure_that_another_process_found_meanwhile_stays() -> None:
    """Two processes probe one kernel; the one that ends later has found nothing."""

    def other_process(_: str) -> bool:
        path.write_text(failed)
        return False

    with installed(is_wrong=is_simdgroup) as device:
        fail("results are off")
        path, failed = only_record(), only_record().read_text()
        path.unlink()
        later()
        device.is_wrong = other_process
        fail("results are off")
        assert len(device.dispatches) == 2 * PROBE


def test_nothing_of_this_is_warned_about() -> None:
    with installed(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        attend("simdgroup")
        only_record().write_text("broken")
        later()
        attend("simdgroup")
    assert seen == []
