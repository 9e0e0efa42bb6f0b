"""`python -m metal_flash_attn tune`, and what planners make of its record."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import standin_mps
import torch
from metal_flash_attn import _doctor, _native, _tune, flash_attn_func, plan
from metal_flash_attn._cli import main
from metal_flash_attn._progress import Bar

ONE = shlex.split("tune --dtype f16 --head-dim 64 --full")
KEY = "simdgroup float16 64/64"


def tune(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*ONE, *arguments, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["tune", *arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def plan_of(dtype: torch.dtype, queries: int = 4096) -> Any:
    q = torch.empty(1, queries, 16, 64, dtype=dtype)
    k = torch.empty(1, 4096, 16, 64, dtype=dtype)
    return plan(q, k, k)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTLFLASHATTN_DEVICE", "simulator")


@pytest.mark.usefixtures("simulator")
def test_the_simulator_ranks_by_bytes_and_the_planner_follows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = plan_of(torch.float32)
    assert before.tile_source == "default"
    arguments = shlex.split("--dtype f32 --tile simdgroups=8,row_fragments=2,staged=on")
    answer = tune(capsys, *arguments)
    (result,) = answer["results"]
    assert result["key"] == "simdgroup float32 64/64"
    assert result["unit"] == "weighted bytes"
    assert result["default_text"] == before.tile
    costs = result["costs"]
    assert len(costs) == 4
    assert costs[result["best"]] == min(costs.values())
    # 16 rows a simdgroup take more registers than the planner likes, and half as many bytes.
    assert result["best"] != result["default"]
    after = plan_of(torch.float32)
    assert (after.tile, after.tile_source) == (result["best_text"], "tuned")
    record = json.loads(Path(answer["file"]).read_text())["tiles"][result["key"]]
    default_cost = costs[result["default"]]
    assert (record["cost"], record["default_cost"]) == (min(costs.values()), default_cost)
    # Another kind of call is nobody's concern, and neither is one that the tile does not suit.
    assert plan_of(torch.bfloat16).tile_source == "default"
    assert plan_of(torch.float32, queries=1).tile_source == "default"
    main(shlex.split("plan --dtype f32 --q 1x4096x16x64"))
    assert "measured on this machine" in capsys.readouterr().out
    # A machine that is not here has its own tiles.
    main(shlex.split("plan --gpu m1 --dtype f32 --q 1x4096x16x64"))
    assert "the planner's choice" in capsys.readouterr().out
    report = _doctor.examine()
    assert report.cache is not None
    assert report.cache.tuned_tiles == 1
    assert main([*ONE, "--candidates", "1", "--clear"]) == 0
    assert "best         the same" in capsys.readouterr().out


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"keys": "64"}, "keys=64 is no candidate of this version"),
        ({"cores": "8"}, 'its record "cores=8" is none of this version'),
        ({}, 'its record "" is none of this version'),
        ({"keys": [1]}, "its record"),
    ],
)
def test_a_record_that_is_no_tile_is_ignored(
    capsys: pytest.CaptureFixture[str], fields: dict[str, Any], reason: str
) -> None:
    answer = tune(capsys, "--candidates", "1")
    file = Path(answer["file"])
    text = json.loads(file.read_text())
    text["tiles"][KEY]["tile"] = fields
    file.write_text(json.dumps(text))
    _native._forget_kernels()
    os.environ["MTLFLASHATTN_TRACE"] = "off"
    main(shlex.split("plan --dtype f16 --q 1x4096x16x64"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "the planner's choice the tuned tile is ignored" in printed
    assert reason in printed
    assert plan_of(torch.float16).tile_source == "default"


@pytest.mark.usefixtures("simulator")
def test_tiles_of_a_tier_that_would_not_serve_can_be_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--tier", "tensorops", "--tile", "in_step=off,keys=32,query=threadgroup"]
    (result,) = tune(capsys, *arguments, "--candidates", "2", "--dry-run")["results"]
    assert result["key"] == "tensorops float16 64/64"
    assert [pattern.split(",")[-1] for pattern in result["costs"]] == ["in_step=on", "in_step=off"]
    # To wait for one another moves no bytes.
    assert len(set(result["costs"].values())) == 1


@pytest.mark.usefixtures("simulator")
def test_tiles_of_the_decode_kernel_are_counted_with_one_query(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--tier", "decode", "--candidates", "2", "--dry-run"]
    (result,) = tune(capsys, *arguments)["results"]
    assert result["key"] == "decode float16 64/64"
    # K and V of 256 keys are read once, and what is merged is less than a half of them.
    keys = 2 * 256 * 64 * 2
    question = _tune.Case("f16", 64, causal=False).question(256, 1, "decode")
    for pattern in result["costs"]:
        counts = _native._count_tile(question, pattern)
        assert keys < counts["device_bytes"] < 1.5 * keys
        assert counts["products"] >= 2 * 256 // 8 * 64 // 8


@pytest.mark.usefixtures("simulator")
def test_nothing_is_kept_on_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(capsys, "--candidates", "1", "--dry-run")["file"] is None
    assert not list(Path(os.environ["MTLFLASHATTN_CACHE"]).glob("*.json"))


@pytest.mark.usefixtures("simulator")
def test_a_folder_that_cannot_be_written_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MTLFLASHATTN_CACHE", str(tmp_path / "file"))
    error = refused(capsys, *ONE[1:], "--candidates", "1")
    assert "set MTLFLASHATTN_CACHE to a folder that can be written" in error


def test_a_gpu_is_timed_in_rounds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tune, "_ROUNDS", 3)
    with standin_mps.installed() as standin:
        arguments = ["--length", "40", "--heads", "1", "--tile", "keys=32,staged=off"]
        (result,) = tune(capsys, *arguments, "--candidates", "6")["results"]
        assert result["unit"] == "nanoseconds"
        assert result["default"] in result["costs"]
        assert not result["failed"]
        assert standin.synchronized > 2 * len(result["costs"])
        # Each tile is another kernel, compiled once.
        assert len(standin.compiled) == len(result["costs"])
        gain = 1 - result["costs"][result["best"]] / result["costs"][result["default"]]
        assert result["best"] == result["default"] or gain >= _tune.MIN_GAIN


def test_a_tile_that_fails_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tune, "_ROUNDS", 1)
    wrong = "#define KEYS 8\n"
    with standin_mps.installed(is_wrong=lambda source: wrong in source):
        arguments = ["--length", "40", "--heads", "1", "--tile", "simdgroups=1,staged=off"]
        (result,) = tune(capsys, *arguments)["results"]
        assert result["failed"]
        assert all("keys=8" in pattern for pattern in result["failed"])
        assert not any("keys=8," in pattern for pattern in result["costs"])
        assert all("in the check" in reason for reason in result["failed"].values())


def test_a_tuned_tile_that_fails_later_gives_way_to_the_default() -> None:
    q = torch.randn(1, 64, 2, 64)
    with standin_mps.installed() as standin:
        default = plan(q, q, q)
        question = _tune.Case("f32", 64, causal=False).question(64, 2, None)
        candidates = _native._tile_candidates(question, None)
        others = [x for x in candidates["candidates"] if "keys=8" in x["pattern"]]
        winner = {"pattern": others[0]["pattern"], "cost": 1, "default_cost": 2, "unit": "x"}
        _native._store_tiles([{"key": candidates["key"], **winner}], False)
        tuned = plan(q, q, q)
        assert (tuned.tile, tuned.tile_source) == (others[0]["text"], "tuned")
        assert tuned.tile != default.tile
        standin.refuses_source = lambda source: "#define KEYS 8\n" in source
        out = flash_attn_func(q, q, q)
        assert (plan(q, q, q).tier, plan(q, q, q).tile) == ("simdgroup", default.tile)
        assert len(standin.compiled) == 2
    torch.testing.assert_close(out, flash_attn_func(q, q, q))


def test_a_forced_tile_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 24, 2, 16)
    exact = flash_attn_func(q, q, q)
    with standin_mps.installed() as standin:
        monkeypatch.setenv("MTLFLASHATTN_TILE", "keys=8,simdgroups=2")
        torch.testing.assert_close(flash_attn_func(q, q, q), exact)
        assert "#define KEYS 8\n" in standin.compiled[0]
        assert plan(q, q, q).tile_source == "forced"
        assert "tile_source='forced'" in repr(plan(q, q, q))
        monkeypatch.setenv("MTLFLASHATTN_TILE", "keys=64")
        with pytest.raises(NotImplementedError, match=r"keys=64 .* have: simdgroups 1, 2, 4, 8;"):
            flash_attn_func(q, q, q)
        assert not _doctor.examine().ok
    monkeypatch.setenv("MTLFLASHATTN_TILE", "keys=many")
    with pytest.warns(RuntimeWarning, match='MTLFLASHATTN_TILE is "keys=many"; allowed: fields'):
        flash_attn_func(q, q, q)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "f8"], "--dtype is 'f8'; allowed: f16, bf16, f32"),
        (["--dtype", "f16,"], "--dtype is 'f16,'; allowed: values separated by commas"),
        (["--head-dim", "0"], "--head-dim is '0'; allowed: whole numbers of at least 1"),
        (["--heads", "0"], "--heads is 0; allowed: a whole number of at least 1"),
        (["--tile", "keys"], '--tile is "keys"; allowed: fields of a tile'),
        (["--tier", "cpu"], '--tier is "cpu"; allowed: decode'),
        (["--tier", "scalar"], "--tier: tuning scalar: it has no tiles to choose from"),
        (["--causal", "--full"], "argument --full: not allowed with argument --causal"),
    ],
)
@pytest.mark.usefixtures("simulator")
def test_bad_arguments_say_what_is_allowed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, *arguments)


def test_without_a_gpu_the_way_to_the_simulator_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has a GPU")
    assert "pass --device simulator to rank tiles by counters" in refused(capsys)


def test_slow_tiles_leave_after_the_first_rounds() -> None:
    samples: dict[str, list[float]] = {"default": [], "fast": [], "slow": [], "near": []}
    seconds = {"default": 9.0, "fast": 1.0, "slow": 4.0, "near": 1.2}
    for pattern in _tune._in_rounds(samples):
        samples[pattern].append(seconds[pattern])
    counts = {pattern: len(taken) for pattern, taken in samples.items()}
    assert counts == {"default": 9, "fast": 9, "slow": 2, "near": 9}


def test_a_bar_is_drawn_on_terminals_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = Bar()
    bar("tile", 1, 2)
    bar.end()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = Bar()
    bar("tile", 1, 2)
    bar.end()
    drawn = capsys.readouterr().err
    assert "[###############...............] 1/2  tile" in drawn
    assert drawn.endswith("\r")
