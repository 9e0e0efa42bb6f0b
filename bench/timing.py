"""Interleaved timing: every contender once a round, medians over the rounds.

One thread is timed by its CPU time, which other processes cannot stretch by preempting it. Several
threads can only be timed by the wall clock, so that only ratios within one run mean anything.
"""

import statistics
import time
from collections.abc import Callable, Sequence

Clock = Callable[[], float]


def interleave(
    contenders: Sequence[Callable[[], object]], clock: Clock, seconds: float, rounds: int = 7
) -> list[float]:
    """Median seconds of each contender over at least `rounds` rounds and about `seconds`."""
    for run in contenders:
        run()
    times: list[list[float]] = [[] for _ in contenders]
    begin = time.perf_counter()
    while len(times[0]) < rounds or time.perf_counter() - begin < seconds:
        for run, measured in zip(contenders, times, strict=True):
            start = clock()
            run()
            measured.append(clock() - start)
    return [statistics.median(measured) for measured in times]
