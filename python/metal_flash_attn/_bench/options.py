"""The command line of bench: from arguments to problems. Needs no torch."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .presets import PRESETS, find
from .problem import DTYPES, FORM, Problem

DEVICES = ("cpu", "mps", "simulator")

_EXAMPLE = (
    "examples: bench --length 1024,4096,16384 --dtype f16 --causal --pictures figures; "
    "bench --preset sdxl,flux --json sdxl.json"
)
_SHAPE = "1x1024x8x64"
_LENGTHS = {
    "cpu": (512, 1024, 2048, 4096),
    "mps": (1024, 2048, 4096, 8192, 16384),
    "simulator": (64, 128, 256),
}
_DTYPE = {"cpu": "f32", "mps": "f16", "simulator": "f16"}


def add(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to those of the program."""
    bench: argparse.ArgumentParser = commands.add_parser(
        "bench", help="attention beside stock torch: speed and memory", epilog=_EXAMPLE
    )
    where = bench.add_argument_group("where")
    where.add_argument(
        "--device",
        choices=DEVICES,
        help="default: mps where there is one, else cpu; simulator counts, and times nothing",
    )
    where.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    where.add_argument(
        "--tier", help="tiers to measure, separated by commas (default: all but scalar)"
    )
    where.add_argument("--math", action="store_true", help="also torch's math backend")
    what = bench.add_argument_group("what")
    what.add_argument("--preset", help="calls of a model, or several separated by commas")
    what.add_argument("--list-presets", action="store_true", help="show the presets and stop")
    what.add_argument("--shape", help=f"{FORM}; several separated by commas (default: {_SHAPE})")
    what.add_argument("--length", help="of q and k in each shape, separated by commas")
    what.add_argument("--dtype", help=f"{', '.join(DTYPES)}; several separated by commas")
    what.add_argument("--window", metavar="LEFT,RIGHT", help="visible keys beside the diagonal")
    masks = what.add_mutually_exclusive_group()
    masks.add_argument("--causal", action="store_true", default=None, help="causal calls only")
    masks.add_argument("--full", dest="causal", action="store_false", help="unmasked calls only")
    what.add_argument("--backward", action="store_true", help="forward and gradients")
    how = bench.add_argument_group("how")
    how.add_argument(
        "--seconds", type=float, default=1.0, help="for each problem, at least (default: 1)"
    )
    how.add_argument("--rounds", type=int, default=7, help="samples, at least (default: 7)")
    how.add_argument(
        "--limit", type=float, default=60.0, help="leave out calls of more seconds (default: 60)"
    )
    how.add_argument("--no-memory", action="store_true", help="do not measure memory")
    out = bench.add_argument_group("results besides the table")
    out.add_argument("--json", metavar="FILE", help="write everything to FILE; - for the terminal")
    out.add_argument("--pictures", metavar="DIR", help="draw ratio and memory, as SVG and PNG")
    return bench


def check(options: dict[str, Any]) -> None:
    """Raises ValueError for numbers that make no sense."""
    for option in ("threads", "rounds"):
        if options[option] is not None and options[option] < 1:
            allowed = "a whole number of at least 1"
            raise ValueError(f"--{option} is {options[option]}; allowed: {allowed}")
    for option in ("seconds", "limit"):
        if not options[option] >= 0:
            raise ValueError(f"--{option} is {options[option]}; allowed: a number of at least 0")


def several(option: str, text: str) -> list[str]:
    """Values separated by commas."""
    values = [value.strip().lower() for value in text.split(",")]
    if not all(values):
        raise ValueError(f"{option} is {text!r}; allowed: values separated by commas")
    return values


def problems(options: dict[str, Any], device: str) -> list[Problem]:
    """What the arguments ask for.

    Raises:
        ValueError: an argument that is not allowed.
    """
    dtypes = _dtypes(options["dtype"])
    if options["preset"] is not None:
        found = list(_of_presets(options, dtypes))
    else:
        found = list(_of_shapes(options, dtypes or [_DTYPE[device]], device))
    if options["backward"]:
        found = [replace(problem, backward=True) for problem in found]
    return found


def _dtypes(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = several("--dtype", text)
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"--dtype is {name!r}; allowed: {', '.join(DTYPES)}")
    return names


def _of_presets(options: dict[str, Any], dtypes: list[str] | None) -> Iterator[Problem]:
    for option in ("shape", "length", "window"):
        if options[option] is not None:
            raise ValueError(f"--{option} is given with --preset; allowed: one of the two")
    for name in several("--preset", options["preset"]):
        preset = find(name)
        for problem in preset.problems:
            if options["causal"] is None or options["causal"] == problem.causal:
                for dtype in dtypes or [problem.dtype]:
                    yield replace(problem, dtype=dtype)


def _of_shapes(options: dict[str, Any], dtypes: list[str], device: str) -> Iterator[Problem]:
    shapes = [Problem.parse(text) for text in several("--shape", options["shape"] or _SHAPE)]
    lengths: list[int | None] = [None]
    if options["length"] is not None:
        lengths = [_whole("--length", text) for text in several("--length", options["length"])]
    elif options["shape"] is None:
        lengths = list(_LENGTHS[device])
    masks = [False, True] if options["causal"] is None else [options["causal"]]
    window = _window(options["window"])
    for dtype, causal, shape, length in itertools.product(dtypes, masks, shapes, lengths):
        problem = replace(shape, dtype=dtype, causal=causal, window=window)
        if length is not None:
            problem = replace(problem, query_len=length, key_len=length)
        yield problem


def _whole(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{option} is {text!r}; allowed: whole numbers of at least 1")
    return int(text)


def _window(text: str | None) -> tuple[int, int]:
    if text is None:
        return (-1, -1)
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().lstrip("-").isdecimal() for part in parts):
        raise ValueError(f"--window is {text!r}; allowed: LEFT,RIGHT, two whole numbers")
    left, right = (int(part) for part in parts)
    return (left, right)


def preset_lines() -> Iterator[str]:
    """The presets, each with its source and its calls."""
    for preset in PRESETS:
        yield f"{preset.name:<12}{preset.about}, {preset.dtype}"
        yield f"{'':<12}source: {preset.source}"
        for call in preset.calls:
            packed = f", {len(call.lengths)} packed sequences" if call.lengths else ""
            yield f"{'':<14}{call.name:<18}{call.shape} {call.mask}{packed}"
