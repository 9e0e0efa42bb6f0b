"""The command line: doctor, tune, and plans and kernel texts for GPUs that need not be here."""

# Only doctor has to run where torch or the extension module cannot be imported.
# ruff: noqa: PLC0415

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from . import _doctor, _doctor_text
from ._bench import options as _bench_options
from ._progress import progress_bar

READER_GONE = 128 + 13
"""What shells report of a program that SIGPIPE ends, as in `doctor --json | head -1`."""

_PLAN_EXAMPLE = (
    "example: python -m metal_flash_attn plan --gpu m3-max --macos 26.2 --torch 2.15 --dtype f16 "
    "--q 1x8192x16x64 --k 1x8192x4x64 --causal"
)
_TUNE_EXAMPLE = "example: python -m metal_flash_attn tune --dtype f16 --head-dim 64 --causal"
_MSL_EXAMPLE = (
    "example: python -m metal_flash_attn msl --tier simdgroup --dtype bf16 --head-dim 128 --causal"
)


def _add_call(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine (default: this one, or an M1 where there is none)")
    machine.add_argument("--gpu", help="m1, m3-max, m5-pro, a name that Metal gives, or unknown")
    machine.add_argument(
        "--cores", type=int, help="GPU cores (default: the most that such a GPU has)"
    )
    machine.add_argument("--macos", help="version of macOS, such as 26.2")
    machine.add_argument("--torch", help="version of torch, or none (default: the installed one)")
    call = parser.add_argument_group("call")
    call.add_argument("--dtype", default="f16", help="f16, bf16 or f32 (default: %(default)s)")
    call.add_argument("--q", metavar="SHAPE", help="BATCHxLENGTHxHEADSxHEAD_DIM, or without BATCH")
    call.add_argument("--k", metavar="SHAPE", help="shape of k (default: that of q)")
    call.add_argument("--v", metavar="SHAPE", help="shape of v (default: that of k)")
    call.add_argument("--sequences", type=int, help="sequences in a packed call (default: 1)")
    call.add_argument("--causal", action="store_true", help="hide the keys after the diagonal")
    call.add_argument("--window", metavar="LEFT,RIGHT", help="visible keys beside the diagonal")
    call.add_argument("--softcap", type=float, default=0.0, help="limit of the scores; 0 is off")
    call.add_argument("--alibi", action="store_true", help="ALiBi slopes")
    call.add_argument("--bias", metavar="KIND", help="a bias or mask: bool, f16, bf16 or f32")
    call.add_argument("--sinks", action="store_true", help="attention sinks")
    call.add_argument("--lse", action="store_true", help="return the log-sum-exp as well")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune", help="measure the tiles of the Metal kernels, keep the best", epilog=_TUNE_EXAMPLE
    )
    calls = tune.add_argument_group(
        "calls to tune (default: each dtype at D64 and D128, both masks)"
    )
    calls.add_argument("--dtype", help="f16, bf16, f32, or several separated by commas")
    calls.add_argument("--head-dim", help="columns of q, k and v, or several separated by commas")
    masks = calls.add_mutually_exclusive_group()
    masks.add_argument("--causal", action="store_true", default=None, help="causal calls only")
    masks.add_argument("--full", dest="causal", action="store_false", help="unmasked calls only")
    calls.add_argument("--length", type=int, default=4096, help="of q and k (default: 4096)")
    calls.add_argument("--heads", type=int, default=16, help="heads (default: 16)")
    tiles = tune.add_argument_group("tiles to measure (default: all that could serve)")
    tiles.add_argument("--tier", help="whose tiles (default: the tier that would serve)")
    tiles.add_argument("--tile", help="only those with these fields, such as keys=32,staged=off")
    tiles.add_argument("--candidates", type=int, help="so many at most, in the planner's order")
    tune.add_argument("--device", choices=["simulator"], help="rank by counters, without a GPU")
    tune.add_argument("--dry-run", action="store_true", help="keep nothing")
    tune.add_argument("--clear", action="store_true", help="forget all tuned tiles first")
    tune.add_argument("--json", action="store_true", help="print JSON")
    tune.set_defaults(run=_run_tune)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m metal_flash_attn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what works on this machine, and what does not")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--probe", action="store_true", help="first compile and check the kernels of typical calls"
    )
    doctor.set_defaults(run=_run_doctor)
    _add_tune(commands)
    _bench_options.add(commands).set_defaults(run=_run_bench)
    plan = commands.add_parser(
        "plan", help="what would serve a call, and why", epilog=_PLAN_EXAMPLE
    )
    _add_call(plan)
    plan.set_defaults(run=_run_plan, head_dim=None, value_dim=None, tier=None)
    msl = commands.add_parser("msl", help="the text of a Metal kernel", epilog=_MSL_EXAMPLE)
    msl.add_argument(
        "--tier",
        default="simdgroup",
        help="tensorops, tensorops-staged, simdgroup or scalar (default: %(default)s)",
    )
    msl.add_argument("--head-dim", type=int, help="columns of q and k, where --q is not given")
    msl.add_argument("--value-dim", type=int, help="columns of v (default: those of k)")
    _add_call(msl)
    msl.set_defaults(run=_run_msl)
    return parser


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _machine(gpu: dict[str, Any]) -> str:
    torch = f", torch {gpu['torch']}" if gpu["torch"] else ""
    return f"{gpu['name']}, {gpu['cores']} cores, macOS {gpu['macos']}{torch}"


def _launch_lines(answer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "machine", _machine(answer["gpu"])
    yield "tier", answer["tier"]
    if tile := answer["tile"]:
        yield "tile", tile["text"]
        if tile["products"]:
            yield "products", tile["products"]
        sources = {"default": "the planner's choice", "tuned": "measured on this machine"}
        yield "source", sources.get(tile["source"], "MTLFLASHATTN_TILE")
        if tile["ignored"]:
            yield "", tile["ignored"]
        if tile["passes"] > 1:
            yield "passes", f"{tile['passes']}, each over {tile['value_chunk']} columns of v"
    if launch := answer["launch"]:
        yield "kernel", launch["entry"]
        group = f"{_by(launch['group'])} threads, {launch['rows']} query rows each"
        if launch["splits"] > 1:
            group += f", keys split in {launch['splits']}"
        yield "grid", f"{_by(launch['threadgroups'])} threadgroups of {group}"


def _prediction_lines(predicted: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "registers", f"{predicted['registers']} of {predicted['most_registers']} of 16 bits"
    threads = f"{predicted['threads_of_core']} of {predicted['most_threads_of_core']} threads"
    threadgroups = f"{predicted['threadgroups_of_core']} whole threadgroups"
    yield "occupancy", f"{threads} of a core, {threadgroups}"
    memory = f"{predicted['threadgroup_bytes']} of {predicted['most_threadgroup_bytes']} bytes"
    yield "memory", f"{memory} of threadgroup memory"
    device = f"{predicted['device_bytes']:g} bytes from device memory"
    threadgroup = f"{predicted['threadgroup_traffic_bytes']:g} from and to threadgroup memory"
    yield "traffic", f"{device}, {threadgroup}, for a row and a key"
    intensity = f"{predicted['flops_per_device_byte']:.4g} flops"
    yield "intensity", f"{intensity} for a byte from device memory"
    yield "model", predicted["validity"]
    judged = f"{predicted['judged']} tiles judged, {predicted['spilling']} would spill"
    yield "choice", f"{judged}, {predicted['oversized']} are too large for threadgroup memory"
    if predicted["rival"]:
        yield "rival", f"{predicted['rival']}; decided by {predicted['decided_by']}"


def _print_plan(answer: dict[str, Any]) -> None:
    lines = list(_launch_lines(answer))
    if answer["predicted"]:
        lines += _prediction_lines(answer["predicted"])
    for name, text in lines:
        print(f"{name:<11}{text}")
    print("passed over")
    for entry in answer["passed_over"]:
        print(f"  {entry['tier']:<18}{entry['reason']}")


def _print_kernel(answer: dict[str, Any]) -> None:
    for name, text in _launch_lines(answer):
        print(f"// {name:<9}{text}")
    print()
    sys.stdout.write(answer["source"])


def _run_doctor(options: dict[str, Any]) -> int:
    with progress_bar() as progress:
        report = _doctor.examine(probe=options["probe"], progress=progress)
    if options["json"]:
        print(json.dumps(report.to_json(), indent=2))
    else:
        sys.stdout.write(_doctor_text.render(report))
    return 0 if report.ok else 1


def _tuning_cases(options: dict[str, Any]) -> list[Any]:
    from ._tune import DTYPES, Case

    dtypes = list(DTYPES)
    if options["dtype"] is not None:
        dtypes = _bench_options.several("--dtype", options["dtype"])
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    dims = ["64", "128"]
    if options["head_dim"] is not None:
        dims = _bench_options.several("--head-dim", options["head_dim"])
    for dim in dims:
        if not dim.isdecimal() or int(dim) < 1:
            raise ValueError(f"--head-dim is {dim!r}; allowed: whole numbers of at least 1")
    masks = [False, True] if options["causal"] is None else [options["causal"]]
    return [Case(dtype, int(dim), mask) for dtype in dtypes for dim in dims for mask in masks]


def _run_tune(options: dict[str, Any]) -> int:
    from . import _tune

    if options["device"] is not None:
        os.environ["MTLFLASHATTN_DEVICE"] = options["device"]
    for option in ("length", "heads", "candidates"):
        if options[option] is not None and options[option] < 1:
            allowed = "a whole number of at least 1"
            raise ValueError(f"--{option} is {options[option]}; allowed: {allowed}")
    plan = _tune.Plan(
        _tuning_cases(options),
        options["length"],
        options["heads"],
        options["tier"],
        options["tile"],
        options["candidates"],
    )
    with progress_bar() as progress:
        results = _tune.tune(plan, progress)
    file = None if options["dry_run"] else _tune.store(results, replace=options["clear"])
    if options["json"]:
        answer = {"file": file, "results": [asdict(result) for result in results]}
        print(json.dumps(answer, indent=2))
        return 0
    for line in _tune.table(results):
        print(line)
    if file is not None:
        print(f"kept in {file}")
    return 0


def _run_bench(options: dict[str, Any]) -> int:
    if options["list_presets"]:
        for line in _bench_options.preset_lines():
            print(line)
        return 0
    from ._bench import command

    return command.run(options)


def _run_plan(options: dict[str, Any]) -> int:
    from ._native import _plan_elsewhere

    return _answer(_plan_elsewhere(options), options, _print_plan)


def _run_msl(options: dict[str, Any]) -> int:
    from ._native import _kernel_text

    return _answer(_kernel_text(options), options, _print_kernel)


def _answer(
    answer: dict[str, Any], options: dict[str, Any], show: Callable[[dict[str, Any]], None]
) -> int:
    if options["json"]:
        print(json.dumps(answer, indent=2))
    else:
        show(answer)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; wrong arguments end the process with status 2, as argparse does.

    Returns:
        The status of the command; `READER_GONE` where nobody reads the output any more.
    """
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would say that it could not.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    return status


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    command, run = options["command"], options["run"]
    try:
        status: int = run(options)
    except (ValueError, TypeError, NotImplementedError) as error:
        parser.exit(2, f"{parser.prog} {command}: error: {error}\n")
    except ImportError as error:
        advice = f"`{parser.prog} doctor` says what is wrong"
        parser.exit(1, f"{parser.prog} {command}: error: {error}; {advice}\n")
    return status
