"""`python -m metal_flash_attn bench`: measures, and shows what came out."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from metal_flash_attn import _native
from metal_flash_attn._doctor import environment
from metal_flash_attn._progress import progress_bar

from . import options as command_line
from . import report, simulated
from .contenders import MATH, STOCK, UNMEASURED, UNSIMULATED, tiers
from .machine import Machine
from .measure import Result, Settings, measure_all

_INTERRUPTED = 130
"""The status that shells give a program that Ctrl-C ended: 128 and the number of the signal."""


def run(options: dict[str, Any]) -> int:
    """Runs the command; the status is 1 where results differ by more than rounding.

    Raises:
        ValueError: an argument that is not allowed.
        NotImplementedError: the device is not there.
    """
    command_line.check(options)
    # Settings of the environment would send CPU tensors to the simulator, or all to one tier.
    with environment(MTLFLASHATTN_DEVICE="auto", MTLFLASHATTN_KERNEL="auto"):
        return _run(options)


def _run(options: dict[str, Any]) -> int:
    _check_pictures(options)
    device = _device(options["device"])
    problems = command_line.problems(options, device)
    if not problems:
        raise ValueError("--causal, --full and --preset leave no call; allowed: a call that exists")
    if device == "simulator":
        with progress_bar() as progress:
            counts = simulated.count_all(problems, _tiers(options, device), progress)
        return _show_counts(counts, options)
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    settings = Settings(
        device,
        [STOCK, *([MATH] if options["math"] else []), *_tiers(options, device)],
        torch.get_num_threads(),
        options["seconds"],
        options["rounds"],
        options["limit"],
        not options["no_memory"],
    )
    results: list[Result] = []
    interrupted = False
    with progress_bar() as progress:
        try:
            measure_all(problems, settings, progress, results)
        except KeyboardInterrupt:  # What is there took time, and is worth showing.
            if not results:
                raise
            interrupted = True
    status = _show(results, settings, options)
    if interrupted:
        print(f"interrupted after {len(results)} of {len(problems)} problems", file=sys.stderr)
        return _INTERRUPTED
    return status


def _check_pictures(options: dict[str, Any]) -> None:
    """Refuses pictures that cannot be drawn before anything is measured."""
    if options["pictures"] is None:
        return
    if options["device"] == "simulator":
        raise ValueError("--pictures is given with --device simulator; allowed: devices with times")
    if importlib.util.find_spec("matplotlib") is None:
        raise NotImplementedError(
            "--pictures without matplotlib is not supported; pip install 'mtlflashattn[bench]'"
        )


def _device(asked: str | None) -> str:
    metal = _native._machine()["metal"]
    if asked == "mps" and metal != "mps":
        raise NotImplementedError(
            "--device mps without an MPS device is not supported; "
            "`python -m metal_flash_attn doctor` says what is missing"
        )
    return asked or ("mps" if metal == "mps" else "cpu")


def _tiers(options: dict[str, Any], device: str) -> Sequence[str]:
    known = tiers()
    chosen = [name for name in known if name not in UNMEASURED]
    if device == "simulator":
        chosen = [name for name in chosen if name not in UNSIMULATED]
    if options["tier"] is not None:
        chosen = command_line.several("--tier", options["tier"])
        for name in chosen:
            if name not in known:
                raise ValueError(f"--tier is {name!r}; allowed: {', '.join(known)}")
    return chosen


def _show(results: Sequence[Result], settings: Settings, options: dict[str, Any]) -> int:
    machine = Machine.here(settings.device)
    answer = report.to_json(results, machine, settings)
    _write_json(options["json"], answer)
    if options["json"] != "-":
        report.table(results, machine, settings).show()
        _print_remarks([(result.problem.title, list(report.remarks(result))) for result in results])
    if options["pictures"] is not None:
        _draw(results, machine, settings, Path(options["pictures"]))
    wrong = [found for result in results for found in result.measurements if found.agrees is False]
    return 1 if wrong else 0


def _draw(results: Sequence[Result], machine: Machine, settings: Settings, folder: Path) -> None:
    from . import pictures  # noqa: PLC0415 (needs matplotlib, which is optional)

    for path in pictures.draw(results, machine, settings, folder):
        print(f"drawn {path}", file=sys.stderr)


def _show_counts(counts: Sequence[simulated.Counts], options: dict[str, Any]) -> int:
    _write_json(options["json"], simulated.to_json(counts))
    if options["json"] != "-":
        simulated.table(counts).show()
        absent = [[f"{tier.name}: {tier.reason}" for tier in count.absent] for count in counts]
        titles = [count.problem.title for count in counts]
        _print_remarks(list(zip(titles, absent, strict=True)))
    return 0


def _print_remarks(remarks: Sequence[tuple[str, Sequence[str]]]) -> None:
    for remark in report.collected(remarks):
        print(remark)


def _write_json(target: str | None, answer: dict[str, Any]) -> None:
    if target is None:
        return
    text = json.dumps(answer, indent=2)
    if target == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")
