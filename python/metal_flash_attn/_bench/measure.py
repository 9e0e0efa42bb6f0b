"""From problems to results: who can compute them, how fast, in how much memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metal_flash_attn._doctor import describe
from metal_flash_attn._progress import Progress
from metal_flash_attn.sdpa._stock import Call, Defect, Stock, version_of

from . import memory
from .contenders import DTYPES, MATH, STOCK, Absent, Contender, Inputs, contenders, prepare
from .problem import Problem
from .timing import CPU_TIME, WALL_TIME, Spread, Timer, gpu_timer, interleave, paired_ratios

_SAMPLE_QUERIES = 256
"""Queries of the call that tells how long the whole one takes."""
_MANY_FLOPS = 5e10
"""Problems of less are not worth that question."""
_MATH_COPIES = 3
"""Score matrices in float32 that torch's math backend holds at once."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        seconds: for all contenders of a problem together, at least.
        rounds: samples of each contender, at least.
        limit: seconds of one call beyond which a contender is left out.
    """

    device: str
    names: Sequence[str]
    threads: int
    seconds: float = 1.0
    rounds: int = 7
    limit: float = 60.0
    memory: bool = True

    @property
    def home(self) -> str:
        """Where tensors are: what stands in for MPS in tests takes those of the CPU."""
        return "mps" if self.device == "mps" and torch.backends.mps.is_available() else "cpu"

    @property
    def timer(self) -> Timer:
        """The clock that this device can be timed with."""
        if self.device == "mps":
            return gpu_timer()
        clock = CPU_TIME if self.threads == 1 else WALL_TIME
        return replace(clock, sample_seconds=0.002)


@dataclass
class Measurement:
    """One contender on one problem.

    Attributes:
        detail: tile or instruction set that served.
        seconds: of one call.
        samples: how many there were.
        tflops: work on visible keys, in 1e12 multiplications and additions a second.
        gbytes_per_second: inputs read once and outputs written once, in 1e9 bytes a second.
        ratio: stock torch's time over this one's, round by round; None without stock torch.
        memory_bytes: peak beyond inputs and outputs; None where it was not measured.
        difference: from stock torch's result, relative, root mean square.
        agrees: whether that is no more than rounding explains.
    """

    name: str
    detail: str
    seconds: Spread
    samples: int
    tflops: float
    gbytes_per_second: float
    ratio: Spread | None = None
    memory_bytes: int | None = None
    difference: float | None = None
    agrees: bool | None = None


@dataclass
class Result:
    """What was found out about one problem."""

    problem: Problem
    measurements: list[Measurement] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, name: str) -> Measurement | None:
        """The measurement of a contender, if it took part."""
        return next((found for found in self.measurements if found.name == name), None)


def measure(problem: Problem, settings: Settings, progress: Callable[[str], None]) -> Result:
    """Compares the contenders on one problem."""
    result = Result(problem)
    needed = 2 * problem.minimal_bytes
    free = _free_bytes(settings.device)
    if needed > free:
        reason = f"its tensors take {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB"
        result.absent = [Absent(name, reason) for name in settings.names]
        return result
    torch.manual_seed(0)
    try:
        inputs = prepare(problem, settings.home)
    except RuntimeError as error:  # There was less memory than the system said.
        result.absent = [Absent(name, describe(error)) for name in settings.names]
        return result
    left_out = _left_out(problem, settings, free)
    for defect in _known_defects(inputs, settings.device):
        text = f"stock torch of this version: {defect.what} ({defect.source})"
        if defect.ends_process:
            left_out |= dict.fromkeys((STOCK, MATH), text)
        else:
            result.notes.append(text)
    left_out |= _estimates(problem, settings, left_out)
    present = []
    for contender in contenders(inputs, settings.names):
        if isinstance(contender, Absent):
            result.absent.append(contender)
        elif contender.name in left_out:
            result.absent.append(Absent(contender.name, left_out[contender.name]))
        else:
            present.append(contender)
    differences = _first_calls(inputs, present, result, progress)
    if not present:
        return result
    try:
        _time(problem, present, differences, settings, result, progress)
    except RuntimeError as error:
        result.notes.append(f"timing failed: {describe(error)}")
        return result
    if settings.memory:
        _weigh(problem, present, settings, result, progress)
    return result


def _free_bytes(device: str) -> float:
    """What inputs may take: most of the memory that is free."""
    if device == "mps":
        return 0.8 * torch.mps.recommended_max_memory()
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return 0.8 * os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _known_defects(inputs: Inputs, device: str) -> list[Defect]:
    """What stock torch of this version is known to get wrong in such a call."""
    if device != "mps":
        return []
    problem, mask = inputs.problem, inputs.mask
    call = Call(
        DTYPES[problem.dtype],
        inputs.stock[0].shape[0],
        problem.heads,
        problem.query_len,
        problem.key_len,
        problem.head_dim,
        problem.value_dim,
        None if mask is None else mask.dtype,
        inputs.torch_causal,
        contiguous=True,
        same_batch=True,
        gradient=problem.backward,
    )
    stock = Stock(version_of(torch.__version__))
    kernel = stock.kernel(call)
    return [one for one in stock.defects if one.kernel == kernel and one.matches(call)]


def _left_out(problem: Problem, settings: Settings, free: float) -> dict[str, str]:
    """Why contenders cannot be tried at all."""
    scores = _MATH_COPIES * problem.score_bytes * 4 // DTYPES[problem.dtype].itemsize
    if MATH in settings.names and scores > free:
        return {MATH: f"its scores take {scores / 2**30:.1f} GiB of {free / 2**30:.1f} GiB"}
    return {}


def _estimates(problem: Problem, settings: Settings, left_out: Mapping[str, str]) -> dict[str, str]:
    """Why contenders are too slow for the whole problem, by a few of its queries."""
    sample = problem.shortened(_SAMPLE_QUERIES)
    if problem.flops < _MANY_FLOPS or sample == problem:
        return {}
    reasons = {}
    timer = settings.timer
    for contender in contenders(prepare(sample, settings.home), settings.names):
        if isinstance(contender, Absent) or contender.name in left_out:
            continue
        try:
            with contender.settings():
                timer.sample(contender.call)
                seconds = timer.sample(contender.call) * problem.flops / sample.flops
        except (NotImplementedError, RuntimeError):
            continue  # The whole problem says it with more reason.
        if seconds > settings.limit:
            reasons[contender.name] = f"a call would take about {seconds:.0f} s (--limit)"
    return reasons


def _first_calls(
    inputs: Inputs,
    present: list[Contender],
    result: Result,
    progress: Callable[[str], None],
) -> dict[str, tuple[float, bool]]:
    """Calls each once, drops those that fail, and compares the results with the first one's."""
    differences = {}
    expected: list[Tensor] | None = None
    for contender in list(present):
        progress(contender.name)
        try:
            with contender.settings():
                results = contender.call()
        except (NotImplementedError, RuntimeError) as error:
            present.remove(contender)
            result.absent.append(Absent(contender.name, describe(error)))
            continue
        got = list(results) if isinstance(results, tuple) else [results]
        if contender.name in (STOCK, MATH):
            got = [inputs.in_our_order(tensor) for tensor in got]
        if expected is None:
            expected = got
        else:
            differences[contender.name] = _difference(inputs.problem, got, expected)
    return differences


def _difference(
    problem: Problem, got: Sequence[Tensor], expected: Sequence[Tensor]
) -> tuple[float, bool]:
    """The largest relative difference of a result, and whether rounding can explain it.

    This only shows that both compute the same thing. Both round q, k, v's dtype a few times, and
    float32 sums over head dimension and keys besides; as errors of either sign they grow with the
    square root of the terms, and gradients pass five products.
    """
    worst = 0.0
    for mine, other in zip(got, expected, strict=True):
        other_norm = torch.linalg.vector_norm(other, dtype=torch.float32)
        norm = torch.linalg.vector_norm(mine.float() - other.float())
        worst = max(worst, (norm / other_norm).nan_to_num(torch.inf).item())
    few = 16 * torch.finfo(DTYPES[problem.dtype]).eps
    sums = (problem.head_dim + problem.key_len**0.5) * torch.finfo(torch.float32).eps
    return worst, worst <= (few + sums) * (5 if problem.backward else 1)


def _time(
    problem: Problem,
    present: list[Contender],
    differences: dict[str, tuple[float, bool]],
    settings: Settings,
    result: Result,
    progress: Callable[[str], None],
) -> None:
    samples = interleave(
        [contender.call for contender in present],
        settings.timer,
        settings.seconds,
        settings.rounds,
        step=functools.partial(progress, "timing"),
        settings=[contender.settings for contender in present],
    )
    of_stock = next(
        (taken for one, taken in zip(present, samples, strict=True) if one.name == STOCK), None
    )
    for contender, taken in zip(present, samples, strict=True):
        seconds = Spread.of(taken)
        difference, agrees = differences.get(contender.name, (None, None))
        result.measurements.append(
            Measurement(
                contender.name,
                contender.detail,
                seconds,
                len(taken),
                problem.flops / seconds.median / 1e12,
                problem.minimal_bytes / seconds.median / 1e9,
                None if of_stock is None else paired_ratios(of_stock, taken),
                difference=difference,
                agrees=agrees,
            )
        )


def _weigh(
    problem: Problem,
    present: list[Contender],
    settings: Settings,
    result: Result,
    progress: Callable[[str], None],
) -> None:
    for contender, measurement in zip(present, result.measurements, strict=True):
        progress(f"memory of {contender.name}")
        try:
            if settings.device == "mps":
                peak = memory.beyond_output_on_mps(problem, contender)
            else:
                peak = memory.beyond_output(problem, contender.name, settings.threads)
        except RuntimeError as error:
            result.notes.append(f"memory of {contender.name} was not measured: {describe(error)}")
        else:
            measurement.memory_bytes = round(peak)


def measure_all(
    problems: Sequence[Problem], settings: Settings, progress: Progress, results: list[Result]
) -> None:
    """Measures one problem after the other; `results` outlives an interruption."""
    for index, problem in enumerate(problems):

        def step(text: str = "", index: int = index, problem: Problem = problem) -> None:
            progress(f"{problem.title}: {text}", index, len(problems))

        step("inputs")
        results.append(measure(problem, settings, step))
