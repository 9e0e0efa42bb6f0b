"""`python -m metal_flash_attn tune`: measures the planner's tiles and keeps the best ones.

On MPS every tile computes the same call, one after the other in rounds, and medians are compared.
On the simulator, which has no time, tiles are compared by the bytes they move.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _native
from ._bench.timing import gpu_timer
from ._doctor import describe, environment
from .interface import flash_attn_func

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}

MIN_GAIN = 0.02
"""A tile that is better by less than this does not replace the default: times scatter as much."""
_ROUNDS = 9
_FIRST_ROUNDS = 2
_HOPELESS = 1.5
"""After the first rounds, tiles that take this many times as long as the best one are left out."""
_SIMULATED_LENGTH = 256


def queries(tier: str | None, length: int) -> int:
    """Queries of the problem on which `tier` is tuned: one for each key, or one in all."""
    return 1 if tier == "decode" else length


@dataclass(frozen=True)
class Case:
    """A kind of call whose tile is tuned."""

    dtype: str
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        return f"{self.dtype} D{self.head_dim}{' causal' if self.causal else ''}"

    def question(self, length: int, heads: int, tier: str | None) -> dict[str, Any]:
        """The call as the planner is asked about it."""
        machine = dict.fromkeys(["gpu", "cores", "macos", "torch"])
        others = dict.fromkeys(["v", "sequences", "window", "bias", "head_dim", "value_dim"])
        return {
            **machine,
            **others,
            "dtype": self.dtype,
            "q": f"1x{queries(tier, length)}x{heads}x{self.head_dim}",
            "k": f"1x{length}x{heads}x{self.head_dim}",
            "causal": self.causal,
            "softcap": 0.0,
            "alibi": False,
            "sinks": False,
            "lse": False,
            "tier": tier,
        }


@dataclass
class Result:
    """What was found out about one case.

    Attributes:
        key: name of the record.
        unit: of the costs: "nanoseconds" or "weighted bytes".
        costs: of each tile that was measured, by its pattern; less is better.
        failed: tiles that could not be measured, with the reason.
    """

    case: str
    tier: str
    key: str
    default: str
    default_text: str
    best: str
    best_text: str
    unit: str
    costs: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def default_cost(self) -> int:
        """Cost of the planner's own choice."""
        return self.costs[self.default]

    @property
    def best_cost(self) -> int:
        """Cost of the best tile."""
        return self.costs[self.best]

    @property
    def ratio(self) -> float:
        """How many times the default costs what the best tile costs; 1 where it is the best."""
        return self.default_cost / max(self.best_cost, 1)


@dataclass
class Plan:
    """What to tune, and on which problem."""

    cases: list[Case]
    length: int = 4096
    heads: int = 16
    tier: str | None = None
    tile: str | None = None
    most_candidates: int | None = None


Progress = Callable[[str, int, int], None]


def tune(plan: Plan, progress: Progress = lambda _text, _done, _total: None) -> list[Result]:
    """Measures every case of `plan` on the device that takes Metal kernels.

    Raises:
        NotImplementedError: there is no such device, or a tier without tiles is asked for.
        ValueError: an argument that is not allowed.
    """
    answers = []
    for case in plan.cases:
        question = case.question(plan.length, plan.heads, plan.tier)
        answer = _native._tile_candidates(question, plan.tile)
        answer["candidates"] = _chosen(answer["candidates"], plan.most_candidates)
        answers.append(answer)
    total = sum(len(answer["candidates"]) for answer in answers)
    done = 0
    results = []
    for case, answer in zip(plan.cases, answers, strict=True):
        name = f"{answer['tier']} {case}"

        def step(count: int = 1, name: str = name) -> None:
            nonlocal done
            done += count
            progress(name, done, total)

        step(0)
        results.append(_measure(plan, case, answer, step))
    return results


def _chosen(candidates: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
    return candidates if most is None else candidates[: max(most, 1)]


def _measure(plan: Plan, case: Case, answer: dict[str, Any], step: Callable[[], None]) -> Result:
    candidates = answer["candidates"]
    if not candidates:
        raise ValueError(f"--tile is {plan.tile!r}; allowed: what a tile for {case} has")
    texts = {candidate["pattern"]: candidate["text"] for candidate in candidates}
    default = candidates[0]["pattern"]
    unit = "weighted bytes" if answer["device"] == "simulator" else "nanoseconds"
    result = Result(
        str(case), answer["tier"], answer["key"], default, texts[default], default, "", unit
    )
    if answer["device"] == "simulator":
        _count(case, answer["tier"], texts, result, step)
    else:
        _time(plan, case, answer["tier"], texts, result, step)
    if default not in result.costs:
        reason = result.failed.get(default, "it was not measured")
        raise NotImplementedError(f"the planner's tile for {case} failed: {reason}")
    best = min(result.costs, key=lambda pattern: result.costs[pattern])
    if result.costs[best] > (1 - MIN_GAIN) * result.default_cost:
        best = default
    result.best, result.best_text = best, texts[best]
    return result


def _count(
    case: Case, tier: str, texts: dict[str, str], result: Result, step: Callable[[], None]
) -> None:
    question = case.question(_SIMULATED_LENGTH, 1, tier)
    for pattern in texts:
        try:
            result.costs[pattern] = _native._count_tile(question, pattern)["cost"]
        except NotImplementedError as error:
            result.failed[pattern] = str(error)
        step()


def _time(
    plan: Plan,
    case: Case,
    tier: str,
    texts: dict[str, str],
    result: Result,
    step: Callable[[], None],
) -> None:
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    q, k, v = (
        torch.randn(1, rows, plan.heads, case.head_dim, dtype=DTYPES[case.dtype], device=device)
        for rows in (queries(tier, plan.length), plan.length, plan.length)
    )

    def call() -> None:
        flash_attn_func(q, k, v, causal=case.causal)

    timer = gpu_timer()
    calls: dict[str, int] = {}
    for pattern in texts:
        with _forced(tier, pattern):
            try:
                call()  # Compiles and proves the kernel.
                calls[pattern] = timer.repeats(call)
            except Exception as error:
                result.failed[pattern] = describe(error)
        step()
    samples: dict[str, list[float]] = {pattern: [] for pattern in calls}
    for pattern in _in_rounds(samples):
        with _forced(tier, pattern):
            call()  # Reads the settings and plans.
            samples[pattern].append(timer.sample(call, calls[pattern]))
    for pattern, taken in samples.items():
        result.costs[pattern] = max(1, round(1e9 * statistics.median(taken)))


def _in_rounds(samples: dict[str, list[float]]) -> Iterator[str]:
    """Every pattern once a round, each time in another order; later rounds without the slowest."""
    patterns = list(samples)
    for index in range(_ROUNDS):
        if index == _FIRST_ROUNDS:
            medians = {pattern: statistics.median(samples[pattern]) for pattern in patterns}
            limit = _HOPELESS * min(medians.values(), default=0.0)
            # The default stays, because it is what the best one is compared with.
            patterns = [p for p in patterns if medians[p] <= limit or p == next(iter(samples))]
        yield from patterns[index % max(len(patterns), 1) :]
        yield from patterns[: index % max(len(patterns), 1)]


def _forced(tier: str, pattern: str) -> Any:
    return environment(MTLFLASHATTN_KERNEL=tier, MTLFLASHATTN_TILE=pattern)


def store(results: Iterable[Result], *, replace: bool) -> str:
    """Puts the best tiles into the record of this machine; returns its file.

    Raises:
        NotImplementedError: the file cannot be written.
    """
    winners = [
        {
            "key": result.key,
            "pattern": result.best,
            "cost": result.best_cost,
            "default_cost": result.default_cost,
            "unit": result.unit,
        }
        for result in results
    ]
    return _native._store_tiles(winners, replace)


def table(results: Sequence[Result]) -> Iterator[str]:
    """The results as lines: each case with its default tile, its best tile and their ratio."""
    for result in results:
        default, best = (
            _cost(cost, result.unit) for cost in (result.default_cost, result.best_cost)
        )
        yield f"{result.tier} {result.case}  ({result.key})"
        yield f"  default  {default:>12}  {result.default_text}"
        if result.best == result.default:
            yield f"  best     {'the same':>12}"
        else:
            yield f"  best     {best:>12}  {result.best_text}"
            yield f"  ratio    {result.ratio:>11.2f}x"
        measured = f"{len(result.costs)} tiles measured"
        failed = f", {len(result.failed)} failed" if result.failed else ""
        yield f"  {measured}{failed}"
        for pattern, reason in list(result.failed.items())[:3]:
            yield f"    {pattern}: {reason}"


def _cost(cost: int, unit: str) -> str:
    return f"{cost / 1e6:.3f} ms" if unit == "nanoseconds" else f"{cost / 1e6:.2f} MB"
