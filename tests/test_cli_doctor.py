"""`python -m metal_flash_attn doctor`: what works here, what does not, what to do."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import standin_mps
import torch
from metal_flash_attn import _doctor, _doctor_text, _native, flash_attn_func, shim
from metal_flash_attn._cli import main

METAL_TIERS = ["tensorops", "tensorops-staged", "simdgroup", "scalar"]
ALL_CALLS = [f"{dtype} D{dim}" for dim in (64, 128) for dtype in ("float16", "bfloat16", "float32")]


def examine() -> dict[str, Any]:
    return _doctor.examine().to_json()


def tier(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (entry for entry in report["tiers"] if entry["name"] == name)
    assert isinstance(found, dict)
    return found


def problems(report: dict[str, Any]) -> list[str]:
    found = report["findings"]
    return [f"{x['about']}: {x['text']}" for x in found if x["severity"] == "problem"]


def no_mps() -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has a GPU")


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MTLFLASHATTN_")}
    return subprocess.run(
        [sys.executable, "-m", "metal_flash_attn", *arguments],
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_machine_without_a_gpu_is_well() -> None:
    no_mps()
    report = examine()
    assert report["ok"], problems(report)
    assert report["format"] == 1
    assert report["versions"]["torch"] == torch.__version__
    assert report["gpu"]["device"] is None
    assert "Mac with Apple silicon" in report["gpu"]["missing"]
    assert report["cpu"]["isa"] in report["cpu"]["available"] == _native.instruction_sets()
    assert tier(report, "cpu")["state"] == tier(report, "torch")["state"] == "proved"
    assert sorted(tier(report, "cpu")["serves"]) == sorted(ALL_CALLS)
    for name in METAL_TIERS:
        (reason,) = tier(report, name)["unavailable"]
        assert tier(report, name)["state"] == "unavailable"
        assert "no GPU" in reason["reason"]
        assert sorted(reason["calls"]) == sorted(ALL_CALLS)


def test_a_gpu_is_named_with_its_tiers() -> None:
    with standin_mps.installed():
        report = examine()
    assert report["ok"], problems(report)
    assert report["gpu"] == {
        "device": "mps",
        "name": "Apple M1",
        "cores": 8,
        "macos": "15.0",
        "missing": None,
    }
    assert tier(report, "simdgroup")["state"] == "available"
    assert sorted(tier(report, "simdgroup")["serves"]) == sorted(ALL_CALLS)
    (reason,) = tier(report, "tensorops")["unavailable"]
    assert reason["reason"] == "needs an M5 or later; this is Apple M1"
    assert reason["remedy"] is None


def test_what_an_update_enables_is_said() -> None:
    with standin_mps.installed(macos="13.6"):
        report = examine()
        text = _doctor_text.render(_doctor.examine(), width=200)
    (reason,) = tier(report, "simdgroup")["unavailable"]
    assert reason["calls"] == ["bfloat16 D64", "bfloat16 D128"]
    assert reason["remedy"] == "update macOS"
    assert tier(report, "simdgroup")["serves"] == [x for x in ALL_CALLS if "bf" not in x]
    assert "not bfloat16 at D64 and D128: needs macOS >= 14.0 for bfloat16" in text
    assert "-> update macOS" in text
    assert report["ok"]


def test_the_simulator_stands_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLFLASHATTN_DEVICE", "simulator")
    report = examine()
    assert report["ok"], problems(report)
    assert report["gpu"]["device"] == tier(report, "simdgroup")["device"] == "simulator"
    (reason,) = tier(report, "cpu")["unavailable"]
    assert reason["remedy"] == "unset MTLFLASHATTN_DEVICE"


@pytest.mark.parametrize(
    ("variable", "value", "problem", "remedy"),
    [
        (
            "MTLFLASHATTN_PROBE",
            "maybe",
            'settings: MTLFLASHATTN_PROBE is "maybe"; allowed',
            "unset",
        ),
        ("MTLFLASHATTN_KERNEL", "v2r", "tiers: MTLFLASHATTN_KERNEL: v2r for this call", "unset"),
        ("MTLFLASHATTN_KERNEL", "v3", 'settings: MTLFLASHATTN_KERNEL is "v3"; allowed', "unset"),
    ],
)
def test_settings_that_cannot_be_followed_are_problems(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, problem: str, remedy: str
) -> None:
    no_mps()
    monkeypatch.setenv(variable, value)
    report = examine()
    assert not report["ok"]
    (found,) = (x for x in report["findings"] if x["severity"] == "problem")
    assert f"{found['about']}: {found['text']}".startswith(problem)
    assert found["remedy"].startswith(f"{remedy} {variable}")


def test_an_instruction_set_of_another_machine_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (other, *_) = {"avx2", "avx512", "neon"} - set(_native.instruction_sets())
    monkeypatch.setenv("MTLFLASHATTN_CPU_ISA", other)
    report = examine()
    assert any("MTLFLASHATTN_CPU_ISA" in problem for problem in problems(report))
    assert report["cpu"]["isa"] is None
    assert tier(report, "torch")["state"] != "proved"


def test_a_misspelt_setting_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLFLASHATTN_KERNAL", "v1")
    report = examine()
    (note,) = report["findings"]
    assert note["severity"] == "note"
    assert note["remedy"] == "did you mean MTLFLASHATTN_KERNEL?"
    assert report["ok"]


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **keywords: Any) -> torch.Tensor:
        out: torch.Tensor = flash_attn_func(*arguments, **keywords)
        # A lost key of fifty.
        return out * 1.02

    monkeypatch.setattr("metal_flash_attn.interface.flash_attn_func", wrong)
    report = examine()
    assert tier(report, "cpu")["state"] == tier(report, "torch")["state"] == "demoted"
    assert [x for x in problems(report) if "the cpu tier fails: off by" in x]


def test_an_exception_in_a_look_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no such disk")

    monkeypatch.setattr(shim, "status", fail)
    report = examine()
    assert problems(report) == ["shim: could not be examined: OSError: no such disk"]
    assert report["shim"] is None
    assert "no such disk" in _doctor_text.render(_doctor.examine())


def test_the_environment_is_as_before() -> None:
    before = dict(os.environ)
    examine()
    assert dict(os.environ) == before


def test_the_shim_state_is_that_of_an_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MTLFLASHATTN_SHIM", "on")
    monkeypatch.setenv("MTLFLASHATTN_SHIM_DENY", "wan")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "import flash_attn finds ours" in text
    assert "hidden from wan" in text
    status = shim.status()
    report = examine()
    assert report["shim"]["location"] == status.location
    assert report["shim"]["denied"] == ["wan"]


@pytest.mark.parametrize("processor", ["arm", "i386"])
def test_a_mac_without_mps_says_why(monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    no_mps()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    machine = "arm64" if processor == "arm" else "x86_64"
    monkeypatch.setattr(platform, "machine", lambda: machine)
    report = examine()
    if processor == "arm":
        assert "gpu: this torch is built without MPS" in problems(report)
    else:
        assert "this is Darwin x86_64" in report["gpu"]["missing"]
        assert report["ok"]


def test_text_keeps_to_the_width_and_colours_to_terminals() -> None:
    report = _doctor.examine()
    for width in (60, 80, 120):
        lines = _doctor_text.render(report, width=width, colour=False).splitlines()
        # A path is never broken.
        assert all(len(line) <= width or "/" in line for line in lines)
        assert not any("\x1b" in line for line in lines)
    plain = _doctor_text.render(report, width=100, colour=False)
    coloured = _doctor_text.render(report, width=100, colour=True)
    assert coloured != plain
    for code in ("32", "31", "2", "36", "0"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == plain


def test_the_command_runs() -> None:
    process = run("doctor", "--json")
    report = json.loads(process.stdout)
    assert process.returncode == (0 if report["ok"] else 1)
    assert process.stderr == ""
    assert set(report) == {
        "format",
        "ok",
        "versions",
        "gpu",
        "cpu",
        "tiers",
        "cache",
        "settings",
        "shim",
        "sdpa",
        "findings",
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('raise OSError("libtorch.so: cannot open it")', "OSError: libtorch.so: cannot open it"),
        ("", "cannot import name 'Tensor' from 'torch'"),
    ],
)
def test_a_broken_torch_is_reported(tmp_path: Path, text: str, shown: str) -> None:
    (tmp_path / "torch.py").write_text(text)
    process = run("doctor", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert process.returncode == 1
    assert "!!  torch: cannot be imported: " in process.stdout
    assert shown in " ".join(process.stdout.split())
    assert process.stderr == ""
    report = json.loads(
        run("doctor", "--json", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path])).stdout
    )
    assert report["tiers"] is None
    assert report["settings"] is not None


def test_other_commands_point_to_doctor(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text('raise ImportError("no torch today")')
    process = run("plan", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert process.returncode == 1
    assert "no torch today" in process.stderr
    assert "doctor` says what is wrong" in process.stderr


def test_an_import_still_fails_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text('raise ImportError("no torch today")')
    process = subprocess.run(
        [sys.executable, "-c", "import metal_flash_attn"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 1
    assert "ImportError: no torch today" in process.stderr


def test_kernels_that_proved_themselves_are_counted() -> None:
    q = torch.randn(1, 24, 2, 16)
    with standin_mps.installed():
        assert tier(examine(), "simdgroup")["state"] == "available"
        flash_attn_func(q, q, q)
        report = examine()
        text = _doctor_text.render(_doctor.examine(), width=100)
    assert tier(report, "simdgroup")["state"] == "proved"
    assert report["cache"]["proved"] == 1
    assert report["cache"]["failed"] == 0
    assert report["cache"]["first_use_seconds"] > 0
    assert "1 kernel got their probe right" in " ".join(text.split())
    assert report["cache"]["path"] in text
    assert report["ok"]


def test_a_kernel_that_failed_is_a_problem_with_its_reason() -> None:
    q = torch.randn(1, 24, 2, 16)
    with standin_mps.installed(is_wrong=lambda source: "attention_simdgroup" in source):
        with pytest.warns(RuntimeWarning, match="the simdgroup tier failed"):
            flash_attn_func(q, q, q)
        report = examine()
    found = tier(report, "simdgroup")
    assert found["state"] == "demoted"
    assert "1 of 1 kernel failed here" in found["detail"]
    assert "off by" in found["detail"]
    assert not report["ok"]
    (problem,) = (x for x in report["findings"] if x["severity"] == "problem")
    assert "MTLFLASHATTN_PROBE=force" in problem["remedy"]


def test_a_cache_that_cannot_be_read_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MTLFLASHATTN_CACHE", str(tmp_path / "file"))
    with standin_mps.installed():
        report = examine()
    assert [x["about"] for x in report["findings"]] == ["cache"]
    assert report["findings"][0]["severity"] == "note"
    assert "MTLFLASHATTN_CACHE" in report["findings"][0]["remedy"]


def test_kernels_are_probed_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = _native._machine

    def few_calls() -> dict[str, Any]:
        machine = real()
        machine["calls"] = machine["calls"][:1]
        return machine

    monkeypatch.setattr(_native, "_machine", few_calls)
    with standin_mps.installed() as standin:
        before = dict(os.environ)
        report = _doctor.examine(probe=True, progress=lambda text, *_: seen.append(text))
        assert dict(os.environ) == before
    assert seen == ["float16 D64", "float16 D64 causal"]
    assert len(standin.compiled) == 2
    assert report.cache is not None
    assert report.cache.proved == 2
    # The kernels of long calls, not of the small ones that were made.
    assert all("#define SIMDGROUPS 8" in source for source in standin.compiled)
