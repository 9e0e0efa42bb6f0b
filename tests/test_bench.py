"""`python -m metal_flash_attn bench`: statistics, work, who takes part, what is shown and drawn."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import hypothesis.strategies as st
import pytest
import standin_mps
import torch
from hypothesis import given
from metal_flash_attn import _native, flash_attn_func
from metal_flash_attn._bench import contenders, measure, memory, presets, simulated, timing
from metal_flash_attn._bench.problem import Problem
from metal_flash_attn._bench.timing import Spread, Timer
from metal_flash_attn._cli import main
from metal_flash_attn._doctor import environment

QUICK = shlex.split("--threads 1 --seconds 0 --rounds 2 --no-memory")
SMALL = ["--shape", "1x48x2x16"]


def bench(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["bench", *QUICK, *arguments]) == status
    return capsys.readouterr().out


def bench_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(bench(capsys, *arguments, "--json", "-"))
    return answer


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *arguments])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def absent(name: str) -> Callable[..., Any]:
    """`find_spec` of an interpreter without the module `name`."""
    find = importlib.util.find_spec
    return lambda wanted, *others: None if wanted == name else find(wanted, *others)


# Statistics


def test_a_spread_is_the_median_with_its_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]).relative == pytest.approx(1 / 3)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert Spread.of([7.0]).relative == 0.0


def test_what_slows_a_round_down_does_not_change_its_ratio() -> None:
    slowed = [1.0, 9.0, 2.0, 5.0]
    ratio = timing.paired_ratios([3 * factor for factor in slowed], slowed)
    assert ratio == Spread(3.0, 3.0, 3.0)


class FakeClock:
    """A clock that only calls advance, and a record of what happened."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds
            self.log.append(name)

        return run

    @contextlib.contextmanager
    def settings(self, name: str) -> Iterator[None]:
        self.log.append(f"<{name}")
        yield
        self.log.append(f"{name}>")


def test_contenders_take_turns_and_short_calls_are_repeated() -> None:
    fake = FakeClock()
    timer = Timer(lambda: fake.now, sample_seconds=1.0)
    calls = [fake.call("slow", 2.0), fake.call("fast", 0.25)]
    slow, fast = timing.interleave(calls, timer, seconds=0, rounds=2)
    assert slow == [2.0, 2.0]
    assert fast == [0.25, 0.25]
    first = ["slow", *["fast"] * 5]
    second = [*["fast"] * 5, "slow"]
    # Once before and once to count, then a round and a round in another order.
    assert fake.log == ["slow", "slow", "fast", "fast", *first, *second]


def test_settings_hold_around_each_sample() -> None:
    fake = FakeClock()
    timer = Timer(lambda: fake.now)
    settings = [lambda: fake.settings("a"), lambda: fake.settings("b")]
    calls = [fake.call("call", 1.0)] * 2
    timing.interleave(calls, timer, seconds=0, rounds=1, settings=settings)
    assert fake.log == ["<a", "call", "a>", "<b", "call", "b>"] * 2


def test_a_device_is_waited_for_before_and_after_a_sample() -> None:
    fake = FakeClock()
    timer = Timer(lambda: fake.now, wait=lambda: fake.log.append("wait"))
    assert timer.sample(fake.call("call", 3.0)) == 3.0
    assert fake.log == ["wait", "call", "wait"]


# Problems

SIZES = st.integers(1, 9)


@given(SIZES, SIZES, SIZES, SIZES, SIZES, SIZES, SIZES)
def test_shapes_are_read_as_they_are_written(
    batch: int, queries: int, keys: int, group: int, heads: int, dim: int, value_dim: int
) -> None:
    problem = Problem(queries, keys, group * heads, heads, dim, value_dim, batch)
    assert Problem.parse(problem.shape) == problem


@pytest.mark.parametrize(
    "problem",
    [
        Problem(7, 7, 2, 2, 8, 8, batch=3, causal=True),
        Problem(5, 9, 2, 1, 8, 4, causal=True),
        Problem(9, 9, 2, 2, 8, 8, window=(2, 1)),
        Problem(6, 9, 2, 2, 8, 8, window=(2, -1), causal=True),
        Problem(9, 9, 2, 2, 8, 8, lengths=(9, 1, 4), causal=True),
        Problem(9, 9, 2, 2, 8, 8, lengths=(9, 1, 4)),
    ],
    ids=lambda problem: problem.title,
)
def test_visible_keys_are_those_that_the_mask_shows(problem: Problem) -> None:
    mask = contenders.prepare(problem).mask
    if mask is None:
        assert problem.causal
        mask = torch.ones(problem.query_len, problem.key_len, dtype=torch.bool).tril()
    shape = (len(problem.lengths) or problem.batch, 1, problem.query_len, problem.key_len)
    shown = mask.expand(shape)
    lengths = problem.lengths or (problem.query_len,) * problem.batch
    visible = sum(int(rows[0, :length].sum()) for rows, length in zip(shown, lengths, strict=True))
    assert problem.visible == visible
    assert problem.flops == 2 * (problem.head_dim + problem.value_dim) * problem.heads * visible


def test_work_is_counted_as_in_the_literature() -> None:
    problem = Problem.parse("2x1024x8x64")
    assert problem.flops == 4 * 2 * 8 * 1024**2 * 64
    backward = Problem(1024, 1024, 8, 8, 64, 64, batch=2, backward=True)
    assert backward.flops == 3.5 * problem.flops  # Dao, FlashAttention-2, section 4.1.
    assert problem.minimal_bytes == 4 * 4 * 2 * 1024 * 8 * 64
    assert problem.score_bytes == 4 * 2 * 8 * 1024**2
    assert not problem.is_memory_bound
    assert Problem.parse("1x1:4096x32/8x128").is_memory_bound


@pytest.mark.parametrize("text", ["1x2x3", "0x2x3x4", "1x2x3/2x4", "axbxcxd", "1x2x3x4x5"])
def test_shapes_that_are_none_are_refused(capsys: pytest.CaptureFixture[str], text: str) -> None:
    error = refused(capsys, "--shape", text)
    assert f"--shape is {text!r}; allowed: " in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dtype f8", "--dtype is 'f8'; allowed: f32, f16, bf16"),
        ("--length 8,none", "--length is 'none'; allowed: whole numbers of at least 1"),
        ("--window 3", "--window is '3'; allowed: LEFT,RIGHT"),
        ("--tier v9", "--tier is 'v9'; allowed: "),
        ("--preset gpt9", "--preset is 'gpt9'; allowed: sd15, sdxl,"),
        ("--preset sdxl --length 64", "--length is given with --preset"),
        ("--preset sdxl --causal", "leave no call"),
        ("--threads 0", "--threads is 0; allowed: a whole number of at least 1"),
        ("--seconds nan", "--seconds is nan; allowed: a number of at least 0"),
        ("--device mps", "--device mps without an MPS device is not supported"),
        ("--device simulator --pictures x", "--pictures is given with --device simulator"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    if "--device mps" in arguments and torch.backends.mps.is_available():
        pytest.skip("there is an MPS device")
    assert message in refused(capsys, *shlex.split(arguments))


# Measuring


def settings(*names: str, device: str = "cpu") -> measure.Settings:
    return measure.Settings(device, names, 1, seconds=0.0, rounds=2, memory=False)


KINDS = [
    Problem.parse("2x40x4/2x16"),
    Problem(40, 40, 2, 2, 16, 16, causal=True, dtype="f16"),
    Problem(24, 40, 2, 2, 16, 16, causal=True, dtype="bf16"),
    Problem(1, 40, 4, 2, 16, 8, layout="heads"),
    Problem(40, 40, 2, 2, 16, 16, window=(5, 3)),
    Problem(40, 40, 2, 2, 16, 16, lengths=(7, 40, 1), causal=True),
    Problem(24, 40, 4, 2, 16, 16, causal=True, backward=True),
]


@pytest.mark.parametrize("problem", KINDS, ids=lambda problem: problem.title)
def test_all_contenders_compute_the_same(problem: Problem) -> None:
    names = ("stock", "math", "cpu", "torch", "simdgroup")
    result = measure.measure(problem, settings(*names), lambda _: None)
    assert [one.name for one in result.measurements] == ["stock", "math", "cpu", "torch"]
    (missing,) = result.absent
    assert (missing.name, missing.reason) == ("simdgroup", "needs tensors on an MPS device")
    for one in result.measurements:
        assert one.samples >= 2
        assert 0 < one.seconds.low <= one.seconds.median <= one.seconds.high
        assert one.tflops == pytest.approx(problem.flops / one.seconds.median / 1e12)
        assert one.ratio is not None
        assert one.agrees in ({None} if one.name == "stock" else {True}), one


def test_a_result_that_differs_is_told_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_key_too_many(q: Any, k: Any, v: Any, **others: Any) -> Any:
        return flash_attn_func(q, k, v, **{**others, "window_size": (-1, 1), "causal": False})

    name = "metal_flash_attn._bench.contenders.flash_attn_func"
    monkeypatch.setattr(name, one_key_too_many)
    shown = bench(capsys, "--shape", "1x512x2x16", "--causal", "--tier", "cpu", status=1)
    assert "!! cpu differs from stock by" in shown


def test_calls_that_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_MANY_FLOPS", 0.0)
    quick = measure.Settings("cpu", ["stock", "cpu"], 1, limit=0.0, memory=False)
    result = measure.measure(Problem.parse("1x512x1x16"), quick, lambda _: None)
    assert not result.measurements
    assert all("a call would take about" in one.reason for one in result.absent)
    monkeypatch.setattr(measure, "_free_bytes", lambda _: 1e4)
    result = measure.measure(Problem.parse("1x512x1x16"), quick, lambda _: None)
    assert [one.reason[:20] for one in result.absent] == ["its tensors take 0.0"] * 2


def test_stock_calls_that_would_end_the_process_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("stock", "math", "torch")
    long = Problem.parse("1x2048x300x8")  # 300 * 2048**2 scores are 4.7 GiB in float32.
    prepared = contenders.prepare(Problem.parse("1x8x1x8"))
    monkeypatch.setattr(measure, "prepare", lambda *_: dataclasses.replace(prepared, problem=long))
    monkeypatch.setattr(measure, "_MANY_FLOPS", float("inf"))
    monkeypatch.setattr(measure, "_free_bytes", lambda _: 1e12)
    with standin_mps.installed():
        result = measure.measure(long, settings(*names, device="mps"), lambda _: None)
    assert [one.name for one in result.absent] == ["stock", "math"]
    assert "pytorch/pytorch/issues/149261" in result.absent[0].reason
    # On the CPU stock torch is not known to be wrong.
    assert not measure._known_defects(prepared, "cpu")


def test_what_is_measured_is_shown_when_the_rest_is_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = contenders.prepare

    def interrupt(problem: Problem, device: str) -> Any:
        if problem.causal:
            raise KeyboardInterrupt
        return prepare(problem, device)

    monkeypatch.setattr(measure, "prepare", interrupt)
    assert "1x48x2x16 f32 full" in bench(capsys, *SMALL, "--tier", "cpu", status=130)
    with pytest.raises(KeyboardInterrupt):
        bench(capsys, *SMALL, "--tier", "cpu", "--causal")


def test_too_little_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **_others: object) -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GiB)")

    problem = Problem.parse("1x8x1x8")
    monkeypatch.setattr(measure, "interleave", fail)
    result = measure.measure(problem, settings("stock"), lambda _: None)
    assert "timing failed: RuntimeError: MPS backend out of memory" in result.notes[0]
    monkeypatch.setattr(measure, "prepare", fail)
    result = measure.measure(problem, settings("stock"), lambda _: None)
    assert "MPS backend out of memory" in result.absent[0].reason


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_the_scores_where_they_are_held() -> None:
    problem = Problem.parse("1x1024x8x64")
    assert memory.beyond_output(problem, "math", threads=1) > problem.score_bytes
    # What this process has freed before may be used again, but no such matrix would fit there.
    assert memory._measure(problem, "cpu", torch.get_num_threads()) < problem.score_bytes / 8


def test_a_gpu_is_timed_between_waits_and_weighed_by_its_driver(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_MOST_REPEATS", 2)
    cached = 5 * 2**20
    driver = {"_mps_emptyCache": lambda: None, "_mps_recommendedMaxMemory": lambda: 2**30}
    for name, function in driver.items():
        monkeypatch.setattr(torch._C, name, function, raising=False)
    with standin_mps.installed() as standin:
        monkeypatch.setattr(
            torch._C,
            "_mps_driverAllocatedMemory",
            lambda: cached * len(standin.dispatches),
            raising=False,
        )
        quick = shlex.split("bench --seconds 0 --rounds 2 --full --tier simdgroup,torch --json -")
        assert main([*quick, *SMALL]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["device"], answer["clock"]) == ("mps", "wall time")
    assert answer["machine"]["gpu"] == "Apple M1, 8 cores"
    (result,) = answer["results"]
    stock, simdgroup, _ = result["measurements"]
    assert simdgroup["agrees"]
    output = 48 * 2 * 16 * 2
    assert simdgroup["memory_bytes"] == cached - output
    assert stock["memory_bytes"] == 0
    assert standin.synchronized > 10


def test_the_simulator_counts_and_times_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, *shlex.split("--full --dtype f16 --tier simdgroup --device simulator")]
    answer = bench_json(capsys, *arguments)
    (result,) = answer["results"]
    (count,) = result["counts"]
    assert count["device_bytes"] >= result["problem"]["minimal_bytes"]
    assert count["products"] >= 2 * 2 * 6 * 6 * 2  # Two heads, two products of 6x6x2 fragments.
    assert "seconds" not in json.dumps(answer)
    shown = bench(capsys, *arguments)
    assert f"{count['products']:,}" in shown
    assert "no times" in shown
    large = Problem.parse("1x4096x8x64")
    (refusal,) = simulated.count_all([large], ["simdgroup"], lambda *_: None)[0].absent
    assert "the simulator is slow" in refusal.reason


# What is shown


def test_the_table_tells_who_took_part_and_who_did_not(capsys: pytest.CaptureFixture[str]) -> None:
    os_settings = {"MTLFLASHATTN_DEVICE": "simulator", "MTLFLASHATTN_KERNEL": "torch"}
    with environment(**os_settings):  # Neither must send a call elsewhere.
        shown = bench(capsys, *SMALL, "--math", "--full")
    for text in ("1x48x2x16 f32 full", "stock", "math", "cpu", "torch", "scores 18 KiB", "GFLOP/s"):
        assert text in shown
    assert "simdgroup: needs tensors on an MPS device\n" in shown
    assert f"torch {torch.__version__.partition('+')[0]}" in shown


def test_there_is_a_plain_table_without_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", absent("rich"))
    shown = bench(capsys, *SMALL, "--full", "--tier", "cpu")
    lines = shown.splitlines()
    assert lines[1].split() == ["problem", "by", "time", "+-", "speed", "ratio", "+-", "memory"]
    assert lines[2].startswith("1x48x2x16 f32 full  stock")
    assert shown.isascii()


def test_the_json_has_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    bench(capsys, *SMALL, "--dtype", "f16,bf16", "--backward", "--json", str(file))
    answer = json.loads(file.read_text())
    assert set(answer) == {"format", "machine", "device", "clock", "results"}
    assert answer["format"] == 1
    assert set(answer["machine"]) == {
        *("system", "processor", "gpu", "threads", "isa", "torch_isa", "torch", "mtlflashattn"),
    }
    titles = [result["problem"]["title"] for result in answer["results"]]
    shape = "1x48x2x16"
    assert titles == [
        f"{shape} {dtype} {mask} fwd+bwd"
        for dtype in ("f16", "bf16")
        for mask in ("full", "causal")
    ]
    for result in answer["results"]:
        assert set(result) == {"problem", "measurements", "absent", "notes"}
        for one in result["measurements"]:
            assert set(one) == {
                *("name", "detail", "seconds", "samples", "tflops", "gbytes_per_second"),
                *("ratio", "memory_bytes", "difference", "agrees"),
            }
            assert set(one["seconds"]) == set(one["ratio"]) == {"median", "low", "high"}


def drawn(folder: Path) -> dict[str, str]:
    """The words of the SVG pictures, by file; all PNG files must be there, too."""
    words = {}
    for path in sorted(folder.glob("*.svg")):
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))  # noqa: S314
        words[path.stem] = " ".join(root.itertext())
        png = path.with_suffix(".png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n")
        assert len(png) > 10_000
    return words


def test_lengths_make_lines(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"stock": 1e4, "cpu": 3e6, "torch": 9e7}
    monkeypatch.setattr(memory, "beyond_output", lambda _problem, name, _threads: sizes[name])
    folder = tmp_path / "figures"
    quick = shlex.split("bench --threads 1 --seconds 0 --rounds 2 --shape 1x8x2/1x16")
    assert main([*quick, "--length", "32,64", "--pictures", str(folder)]) == 0
    words = drawn(folder)
    assert set(words) == {"ratio", "memory"}
    common = ["sequence length (tokens)", "float32, full", "float32, causal", "cpu tier", "32"]
    common += ["batch 1, 2 heads over 1 of 16", f"torch {torch.__version__.partition('+')[0]}"]
    for text in common:
        assert all(text in found for found in words.values()), text
    assert "times as fast as stock torch" in words["ratio"]
    assert "quartiles" in words["ratio"]
    assert "all scores" in words["memory"]
    assert "MiB" in words["memory"]
    assert str(folder / "ratio.svg") in capsys.readouterr().err


def test_other_calls_make_a_row_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shapes = "1x32x2x16,1x1:64x4/2x16"
    bench(capsys, "--shape", shapes, "--full", "--pictures", str(tmp_path))
    words = drawn(tmp_path)
    assert set(words) == {"ratio"}  # Memory was not measured.
    for shape in shapes.split(","):
        assert f"{shape} f32 full" in words["ratio"]


def test_pictures_need_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", absent("matplotlib"))
    error = refused(capsys, *SMALL, "--pictures", str(tmp_path / "figures"))
    assert "pip install 'mtlflashattn[bench]'" in error
    assert not (tmp_path / "figures").exists()


# Presets


def test_presets_are_listed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    shown = bench(capsys, "--list-presets")
    for preset in presets.PRESETS:
        assert preset.name in shown
        assert preset.source in shown


@pytest.mark.parametrize("preset", presets.PRESETS, ids=lambda preset: preset.name)
def test_every_tier_has_a_plan_for_every_preset(preset: presets.Preset) -> None:
    for problem in preset.problems:
        assert problem.dtype == preset.dtype
        for gpu, tier in (("m5", "tensorops"), ("m5", "tensorops-staged"), ("m1", "simdgroup")):
            machine = {"gpu": gpu, "cores": None, "macos": "26.2", "torch": "2.15"}
            question = {**simulated.question(problem, tier), **machine}
            if problem.lengths:
                rows = sum(problem.lengths)
                shape = f"{rows}x{problem.heads}x{problem.head_dim}"
                sequences = {"sequences": len(problem.lengths)}
                question |= {"q": shape, "k": shape, "v": shape, **sequences}
            with environment(MTLFLASHATTN_KERNEL=tier):
                assert _native._plan_elsewhere(question)["tier"] == tier
        heads = problem.key_heads
        short = Problem(
            *(min(problem.query_len, 64), min(problem.key_len, 64)),
            *(problem.heads // heads, 1, problem.head_dim, problem.value_dim),
            dtype=problem.dtype,
            causal=problem.causal,
            window=problem.window,
            layout=problem.layout,
        )
        result = measure.measure(short, settings("stock", "cpu"), lambda _: None)
        assert result.measurements[1].agrees
