"""`python -m metal_flash_attn`: plans and kernel texts for machines that are not here."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from metal_flash_attn._cli import READER_GONE, main

M3_MAX = shlex.split("plan --gpu m3-max --macos 26.2 --torch 2.15")
CALL = shlex.split("--dtype f16 --q 1x8192x16x64 --k 1x8192x4x64 --causal")


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def ask_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(ask(capsys, *arguments, "--json"))
    return answer


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def reasons(answer: dict[str, Any]) -> dict[str, str]:
    return {entry["tier"]: entry["reason"] for entry in answer["passed_over"]}


def test_a_plan_names_tile_grid_prediction_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask_json(capsys, *M3_MAX, *CALL)
    assert answer["gpu"] == {
        "name": "Apple M3 Max",
        "cores": 40,
        "macos": "26.2",
        "torch": "2.15",
    }
    assert answer["tier"] == "simdgroup"
    tile, launch, predicted = answer["tile"], answer["launch"], answer["predicted"]
    assert launch["rows"] == tile["simdgroups"] * tile["row_fragments"] * 8
    assert launch["threadgroups"] == [8192 // launch["rows"], 16 * tile["passes"], 1]
    assert launch["group"] == [32, tile["simdgroups"], 1]
    assert 0 < predicted["registers"] <= predicted["most_registers"] == 256
    assert "outside the model" in predicted["validity"]
    text = ask(capsys, *M3_MAX, *CALL)
    for shown in [
        tile["text"],
        f"{predicted['registers']} of 256 of 16 bits",
        " x ".join(map(str, launch["threadgroups"])),
        predicted["rival"],
        *reasons(answer).values(),
    ]:
        assert shown in text
    assert set(reasons(answer)) == {
        "decode",
        "tensorops",
        "tensorops-staged",
        "cpu",
        "torch",
        "scalar",
    }


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ("--gpu m4 --macos 15.1 --torch 2.10", "needs an M5 or later; this is Apple M4"),
        ("--gpu m5 --macos 26.1 --torch 2.10", "needs macOS >= 26.2; this is macOS 26.1"),
        (
            "--gpu m5 --macos 26.2 --torch 2.10.1",
            "needs torch >= 2.11, the first that compiles Metal 4.0; this is torch 2.10",
        ),
    ],
)
def test_the_first_missing_requirement_is_the_reason(
    capsys: pytest.CaptureFixture[str], machine: str, reason: str
) -> None:
    answer = ask_json(capsys, "plan", *machine.split(), *CALL)
    assert reasons(answer)["tensorops"] == reason
    assert reasons(answer)["tensorops-staged"] == reason


@pytest.mark.parametrize("torch_version", ["2.11.0", "none"])
def test_an_m5_has_the_tensorops_tiers(
    capsys: pytest.CaptureFixture[str], torch_version: str
) -> None:
    machine = ["--gpu", "m5-pro", "--macos", "26.2", "--torch", torch_version]
    answer = ask_json(capsys, "plan", *machine, *CALL)
    assert answer["tier"] == "tensorops"
    assert answer["predicted"] is None
    assert answer["launch"]["entry"] == "attention_tensorops"
    products = "products of 64 and 64 columns, k and v from memory, p in registers"
    assert answer["tile"]["products"].startswith(products)
    assert products in ask(capsys, "plan", *machine, *CALL)
    staged = "tensorops comes before it and serves this call"
    assert reasons(answer)["tensorops-staged"] == staged
    text = ask_json(capsys, "msl", "--tier", "tensorops-staged", *machine, *CALL)
    assert text["source"].isascii()
    assert "#define STAGED 1" in text["source"]
    assert "needs an M5 or later" in refused(
        capsys, "msl", "--tier", "v2r", "--gpu", "m4", "--head-dim", "64"
    )


def test_bfloat16_on_an_old_macos_is_left_to_torch(capsys: pytest.CaptureFixture[str]) -> None:
    old = shlex.split("plan --gpu m1 --macos 13.6 --torch 2.7 --dtype bf16")
    answer = ask_json(capsys, *old)
    assert answer["tier"] == "torch"
    assert answer["tile"] is answer["launch"] is answer["predicted"] is None
    missing = "needs macOS >= 14.0 for bfloat16, a type of Metal 3.1; this is macOS 13.6"
    assert reasons(answer)["simdgroup"] == reasons(answer)["scalar"] == missing
    assert missing in ask(capsys, *old)


def test_the_kernel_variable_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "v0")
    answer = ask_json(capsys, *M3_MAX, *CALL)
    assert answer["tier"] == "scalar"
    assert answer["launch"]["entry"] == "attention_scalar"
    assert reasons(answer)["simdgroup"] == "MTLFLASHATTN_KERNEL is v0"
    monkeypatch.setenv("MTLFLASHATTN_KERNEL", "v2r")
    assert "tensorops: needs an M5 or later" in refused(capsys, *M3_MAX, *CALL)


def test_a_text_is_what_the_device_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split("msl --tier simdgroup --dtype bf16 --head-dim 128 --causal")
    answer = ask_json(capsys, *arguments)
    source = answer["source"]
    assert source.isascii()
    for line in ["#define HEAD_DIM 128", "#define WINDOW_RIGHT 1", "#define LSE 0"]:
        assert line in source.splitlines()
    assert f"kernel void {answer['launch']['entry']}(" in source
    header, separator, text = ask(capsys, *arguments).partition("\n\n")
    assert separator
    assert text == source
    assert all(line.startswith("// ") for line in header.splitlines())
    assert answer["tile"]["text"] in header


@pytest.mark.parametrize("name", ["scalar", "v0", "SIMDGROUP", "v1"])
def test_tiers_go_by_the_names_of_the_variable(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    answer = ask_json(capsys, "msl", "--tier", name)
    assert answer["tier"] == {"v0": "scalar", "v1": "simdgroup"}.get(name, name.lower())


def test_every_option_reaches_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    def defines(*arguments: str) -> set[str]:
        lines = ask_json(capsys, "msl", *arguments)["source"].splitlines()
        return {line for line in lines if line.startswith(("#define", "typedef"))}

    plain = defines()
    for arguments, line in [
        (["--causal"], "#define WINDOW_RIGHT 1"),
        (["--window", "5,-1"], "#define WINDOW_LEFT 1"),
        (["--softcap", "30"], "#define SOFTCAP 1"),
        (["--alibi"], "#define ALIBI 1"),
        (["--bias", "bool"], "#define BIAS_BOOLEAN 1"),
        (["--bias", "bf16"], "#define BIAS_BFLOAT 1"),
        (["--sinks"], "#define SINKS 1"),
        (["--lse"], "#define LSE 1"),
        (["--value-dim", "24"], "#define VALUE_DIM 24"),
        (["--head-dim", "80"], "#define HEAD_DIM 80"),
        (["--q", "100x4x64", "--sequences", "3"], "#define PACKED 1"),
        (["--dtype", "f32"], "typedef float scalar;  // of q, k, v and out"),
    ]:
        assert line not in plain
        assert line in defines(*arguments), arguments


WRONG = [
    (["plan", "--gpu", "m3-mux"], '--gpu is "m3-mux"; allowed: m1, m2'),
    (["plan", "--cores", "0"], "--cores is 0; allowed: a whole number of at least 1"),
    (["plan", "--macos", "tahoe"], '--macos is "tahoe"; allowed: a version such as'),
    (["plan", "--torch", ""], '--torch is ""; allowed: a version such as'),
    (["plan", "--dtype", "f8"], '--dtype is "f8"; allowed: f16, bf16, f32'),
    (["plan", "--q", "1x8192"], '--q is "1x8192"; allowed: BATCHxLENGTHxHEADSxHEAD_DIM'),
    (["plan", "--q", "1x-2x3x4"], '--q is "1x-2x3x4"; allowed: '),
    (["plan", "--q", "1x2x3x4", "--k", "2x3x4"], "--k is 3 sizes; allowed: 4 sizes, as in --q"),
    (["plan", "--q", "1x2x3x4", "--k", "1x2x2x4"], "--k has shape (1, 2, 2, 4); allowed: "),
    (["plan", "--q", "1x2x3x4", "--k", "1x2x3x5"], "allowed: head_dim = 4, as in q"),
    (["plan", "--q", "1x2x3x0"], "--head-dim is 0; allowed: a whole number of at least 1"),
    (["plan", "--q", "1x2x0x4"], "--q has shape (1, 2, 0, 4); allowed: at least one head"),
    (["plan", "--q", f"{2**62}x2x3x4"], "allowed: tensors that span at most 2**56 bytes"),
    (["plan", "--sequences", "2"], "--sequences is given; allowed: left out"),
    (["plan", "--q", "9x3x4", "--sequences", "0"], "--sequences is 0; allowed: a whole number"),
    (["plan", "--q", "9x3x4", "--bias", "f16"], "--bias: a bias over packed sequences is not"),
    (["plan", "--window", "7"], '--window is "7"; allowed: LEFT,RIGHT'),
    (["plan", "--softcap", "-1"], "--softcap is -1; allowed: 0 (off) or a positive number"),
    (["plan", "--bias", "int8"], '--bias is "int8"; allowed: bool, f16, bf16, f32'),
    (
        ["msl", "--tier", "torch"],
        '--tier is "torch"; allowed: decode, tensorops (or v2r), tensorops-staged, simdgroup',
    ),
    (["msl", "--tier", "v9"], '--tier is "v9"; allowed: decode'),
    (["msl", "--tier", "v2", "--gpu", "m1"], "--tier: tensorops for this call is not supported"),
    (["msl", "--value-dim", "0"], "--value-dim is 0; allowed: a whole number of at least 1"),
    (["msl", "--head-dim", "many"], "argument --head-dim: invalid int value: 'many'"),
    (["sing"], "argument command: invalid choice: 'sing'"),
    ([], "the following arguments are required: command"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_bad_arguments_say_what_is_allowed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, *arguments)


SIZES = st.integers(1, 3000)
FLAGS = st.sets(
    st.sampled_from(["--causal", "--alibi", "--sinks", "--lse", "--window=9,9", "--softcap=5"])
)


@given(
    gpu=st.sampled_from(["m1", "m2-ultra", "m3", "m4-pro", "m5-max", "unknown"]),
    dtype=st.sampled_from(["f16", "bf16", "f32"]),
    lengths=st.tuples(SIZES, SIZES),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dims=st.tuples(st.integers(1, 512), st.integers(1, 512)),
    flags=FLAGS,
)
def test_any_call_has_a_tile_that_fits(
    gpu: str,
    dtype: str,
    lengths: tuple[int, int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    flags: set[str],
) -> None:
    (query_len, key_len), (key_heads, group), (head_dim, value_dim) = lengths, heads, dims
    arguments = [
        "plan",
        f"--gpu={gpu}",
        "--macos=15.0",
        f"--dtype={dtype}",
        f"--q=2x{query_len}x{key_heads * group}x{head_dim}",
        f"--k=2x{key_len}x{key_heads}x{head_dim}",
        f"--v=2x{key_len}x{key_heads}x{value_dim}",
        *sorted(flags),
        "--json",
    ]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", printed.append)
        assert main(arguments) == 0
    answer = json.loads("".join(printed))
    predicted, launch = answer["predicted"], answer["launch"]
    if answer["tier"] == "decode":
        # Its rows are those of all heads of a group, its threadgroups also splits of the keys.
        assert launch["threadgroup_bytes"] <= 32768
        covered = launch["threadgroups"][0] // launch["splits"] * launch["rows"]
        assert covered - launch["rows"] < query_len * group <= covered
        return
    assert answer["tier"] == "simdgroup"
    assert predicted["registers"] <= 256
    # What the kernel declares is what was predicted, in units of 256 bytes.
    assert predicted["threadgroup_bytes"] == -(-launch["threadgroup_bytes"] // 256) * 256 <= 32768
    assert launch["group"][1] * 32 <= predicted["threads_of_core"]
    covered = launch["threadgroups"][0] * launch["rows"]
    assert covered - launch["rows"] < query_len <= covered


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "metal_flash_attn", *M3_MAX, *CALL]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert process.stdout.startswith("machine    Apple M3 Max, 40 cores, macOS 26.2, torch 2.15\n")
    assert process.stderr == ""
    wrong = subprocess.run(
        [*command, "--dtype", "f8"], capture_output=True, text=True, check=False, timeout=120
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert '--dtype is "f8"; allowed: f16, bf16, f32' in wrong.stderr


def test_a_reader_that_leaves_gets_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "metal_flash_attn", *M3_MAX, *CALL, "--json"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (READER_GONE, "")
