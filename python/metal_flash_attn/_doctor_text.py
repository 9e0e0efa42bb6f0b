"""A report of `_doctor` as lines for a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator

from ._doctor import Cache, Finding, Report, Setting, Shim, Tier

_MARKS = {"proved": "ok", "available": "ok", "demoted": "!!", "unavailable": "--"}
_COLOURS = {"ok": "32", "!!": "31", "--": "2", "->": "36"}
_TENSORS = {
    "cpu": "CPU tensors",
    "mps": "MPS tensors",
    "simulator": "CPU tensors, on the simulator",
    "any": "all tensors",
}
_LABEL = 13
_TIER = 18
_MOST_WIDTH = 120


def render(report: Report, *, width: int | None = None, colour: bool | None = None) -> str:
    """The report as text; width and colour are those of the terminal unless they are given."""
    if width is None:
        width = min(shutil.get_terminal_size((100, 40)).columns, _MOST_WIDTH)
    if colour is None:
        colour = _has_colours()
    return "\n".join(_Page(width, colour).lines(report)) + "\n"


def _has_colours() -> bool:
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and sys.stdout.isatty()


class _Page:
    def __init__(self, width: int, colour: bool) -> None:
        self._width = max(width, 60)
        self._colour = colour

    def lines(self, report: Report) -> Iterator[str]:
        yield from self._title(report)
        yield ""
        yield from self._labelled("versions", _versions(report))
        yield from self._labelled("GPU", _gpu(report))
        yield from self._labelled("CPU", _cpu(report))
        yield ""
        yield from self._tiers(report.tiers)
        yield ""
        if report.cache is not None:
            yield from self._labelled("cache", _cache(report.cache))
        yield from self._labelled("settings", _settings(report.settings))
        yield from self._labelled("flash_attn", _shim(report.shim))
        yield from self._labelled("SDPA patch", _sdpa(report))
        for severity, heading in (("problem", "problems"), ("note", "notes")):
            chosen = [finding for finding in report.findings if finding.severity == severity]
            if chosen:
                yield ""
                yield from self._findings(heading, chosen)

    def _title(self, report: Report) -> Iterator[str]:
        problems = sum(finding.severity == "problem" for finding in report.findings)
        plural = "" if problems == 1 else "s"
        verdict = "all well" if report.ok else f"{problems} problem{plural}, listed below"
        mark = self._mark("ok" if report.ok else "!!")
        yield f"{mark}  mtlflashattn {report.versions.mtlflashattn or '(not installed)'}: {verdict}"

    def _labelled(self, label: str, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            yield from self._wrapped(f"{label:<{_LABEL}}", text)
            label = ""

    def _tiers(self, tiers: list[Tier] | None) -> Iterator[str]:
        if tiers is None:
            yield from self._labelled("tiers", ["unknown, see the problems"])
            return
        yield from self._labelled("tiers", ["in the order in which they are tried"])
        for tier in tiers:
            start = f"  {self._mark(_MARKS[tier.state])}  {tier.name:<{_TIER}}"
            for text, remedy in _tier(tier):
                yield from self._wrapped(start, text)
                start = " " * (6 + _TIER)
                if remedy is not None:
                    yield from self._wrapped(f"{start}{self._mark('->')} ", remedy)

    def _findings(self, heading: str, findings: list[Finding]) -> Iterator[str]:
        yield heading
        for finding in findings:
            mark = self._mark("!!" if finding.severity == "problem" else "--")
            yield from self._wrapped(f"  {mark}  ", f"{finding.about}: {finding.text}")
            if finding.remedy is not None:
                yield from self._wrapped(f"      {self._mark('->')} ", finding.remedy)

    def _wrapped(self, start: str, text: str) -> Iterator[str]:
        """`text` behind `start`, continued below its own beginning."""
        indent = len(start) if "\x1b" not in start else len(_without_colour(start))
        lines = textwrap.wrap(
            text,
            max(self._width - indent, 30),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines or [""]:
            yield (start + line).rstrip()
            start = " " * indent

    def _mark(self, mark: str) -> str:
        return f"\x1b[{_COLOURS[mark]}m{mark}\x1b[0m" if self._colour else mark


def _without_colour(text: str) -> str:
    for code in _COLOURS.values():
        text = text.replace(f"\x1b[{code}m", "")
    return text.replace("\x1b[0m", "")


def _versions(report: Report) -> Iterator[str]:
    versions = report.versions
    torch = f"torch {versions.torch}" if versions.torch else "no torch"
    yield f"{torch}, Python {versions.python}, {versions.system}, {versions.architecture}"
    yield versions.executable


def _gpu(report: Report) -> Iterator[str]:
    gpu = report.gpu
    if gpu is None:
        yield "unknown"
    elif gpu.name is None:
        yield f"none: {gpu.missing}"
    elif gpu.device == "simulator":
        yield f"none; the simulator stands for {gpu.name} with {gpu.cores} cores"
    else:
        yield f"{gpu.name}, {gpu.cores} cores, macOS {gpu.macos}"


def _cpu(report: Report) -> Iterator[str]:
    cpu = report.cpu
    if cpu is None:
        yield "unknown"
        return
    others = [name for name in cpu.available if name != cpu.isa]
    also = f" (also here: {', '.join(others)})" if others else ""
    yield f"{cpu.isa or 'no instruction set'}{also}, {cpu.threads} threads"


def _tier(tier: Tier) -> Iterator[tuple[str, str | None]]:
    if tier.state != "unavailable":
        parts = [tier.state, *([tier.detail] if tier.detail else [])]
        yield f"{_TENSORS[tier.device]}: {': '.join(parts)}", None
        if tier.serves:
            yield f"serves {_calls(tier.serves)}", None
    for reason in tier.unavailable:
        where = (
            ""
            if tier.state == "unavailable" and len(tier.unavailable) == 1
            else (f"not {_calls(reason.calls)}: ")
        )
        yield f"{where}{reason.reason}", reason.remedy


def _calls(calls: list[str]) -> str:
    """Calls such as "float16 D64", those of one head dimension together."""
    by_dim: dict[str, list[str]] = {}
    for call in calls:
        dtype, _, dim = call.rpartition(" ")
        by_dim.setdefault(dim, []).append(dtype)
    groups: dict[tuple[str, ...], list[str]] = {}
    for dim, dtypes in by_dim.items():
        groups.setdefault(tuple(dtypes), []).append(dim)
    return "; ".join(
        f"{', '.join(dtypes)} at {' and '.join(dims)}" for dtypes, dims in groups.items()
    )


def _cache(cache: Cache) -> Iterator[str]:
    yield cache.path or "none: there is no folder for caches"
    seconds = f"{cache.first_use_seconds:.1f} s for their first use"
    tiles = f"{cache.tuned_tiles} tuned tiles"
    yield f"{cache.proved} kernels proved, {cache.failed} failed, {seconds} in all; {tiles}"


def _settings(settings: list[Setting] | None) -> Iterator[str]:
    if settings is None:
        yield "unknown"
        return
    chosen = [setting for setting in settings if setting.value is not None]
    for setting in chosen:
        state = "  (not used, see the problems)" if setting.rejected else ""
        yield f"{setting.name}={setting.value}{state}"
    yield "all others have their defaults" if chosen else "all have their defaults"


def _shim(shim: Shim | None) -> Iterator[str]:
    if shim is None:
        yield "unknown"
        return
    what = {"real": "an installed one", "ours": "ours", "none": "nothing"}[shim.finds]
    yield f"import flash_attn finds {what}: {shim.reason}"
    if shim.location is not None:
        yield shim.location
    if shim.denied:
        yield f"hidden from {', '.join(shim.denied)}"


def _sdpa(report: Report) -> Iterator[str]:
    sdpa = report.sdpa
    if sdpa is None:
        yield "unknown"
    elif not sdpa.exists:
        yield "not part of this version"
    else:
        yield "installed in this process" if sdpa.installed else "not installed in this process"
