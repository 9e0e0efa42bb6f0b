"""Interleaved timing: every contender once a round, medians and quartiles over the rounds.

One thread is timed by its CPU time, which other processes cannot stretch by preempting it. Several
threads, and a GPU, can only be timed by the wall clock, so that only ratios within one run mean
anything there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Settings = Callable[[], contextlib.AbstractContextManager[object]]


_MOST_REPEATS = 1000


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Timer:
    """A clock, and what has to be waited for before it is read.

    Attributes:
        clock: seconds since some moment.
        wait: returns when the device has done what it was asked.
        name: what the clock measures, for people.
        sample_seconds: how long a sample should last, so that neither the clock's grain nor the
            wait matters; shorter calls are repeated.
    """

    clock: Callable[[], float]
    wait: Callable[[], None] = _nothing
    name: str = ""
    sample_seconds: float = 0.0

    def sample(self, call: Call, calls: int = 1) -> float:
        """Seconds of one call, as the mean of `calls` of them without a pause."""
        self.wait()
        start = self.clock()
        for _ in itertools.repeat(None, calls):
            call()
        self.wait()
        return (self.clock() - start) / calls

    def repeats(self, call: Call) -> int:
        """How often a call is repeated within a sample; asks by calling it."""
        if not self.sample_seconds:
            return 1
        wanted = math.ceil(self.sample_seconds / max(self.sample(call), 1e-9))
        return max(1, min(_MOST_REPEATS, wanted))


CPU_TIME = Timer(time.thread_time, name="CPU time")
WALL_TIME = Timer(time.perf_counter, name="wall time")


def gpu_timer() -> Timer:
    """The wall clock, around calls that MPS has completed."""
    return Timer(time.perf_counter, torch.mps.synchronize, "wall time", sample_seconds=0.01)


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and the quartiles below and above it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Quartiles are interpolated between the numbers themselves; one number is all three."""
        if len(numbers) < 2:
            (only,) = numbers
            return cls(only, only, only)
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return cls(median, low, high)

    @property
    def relative(self) -> float:
        """Half the distance of the quartiles, in parts of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The ratios of samples of the same round: what slows a round down slows both."""
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def interleave(
    contenders: Sequence[Call],
    timer: Timer,
    seconds: float,
    rounds: int = 7,
    step: Callable[[], None] = _nothing,
    settings: Sequence[Settings] | None = None,
) -> list[list[float]]:
    """Samples of each contender, one a round: at least `rounds`, for about `seconds`.

    Each is called once before, unmeasured, and another one comes first in each round. `step` is
    called after each round. `settings` holds for each contender what is entered around its samples.
    """
    entered = settings or [contextlib.nullcontext] * len(contenders)
    repeats = []
    for call, enter in zip(contenders, entered, strict=True):
        with enter():
            call()
            repeats.append(timer.repeats(call))
    samples: list[list[float]] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    begin = time.perf_counter()
    while len(samples[0]) < rounds or time.perf_counter() - begin < seconds:
        for index in order:
            with entered[index]():
                if repeats[index] > 1:
                    contenders[index]()  # Reads the settings, and finds its data in the caches.
                samples[index].append(timer.sample(contenders[index], repeats[index]))
        order = [*order[1:], order[0]]
        step()
    return samples


def medians(samples: Sequence[Sequence[float]]) -> list[float]:
    """The median of each contender's samples."""
    return [statistics.median(taken) for taken in samples]
