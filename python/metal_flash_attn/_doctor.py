"""`python -m metal_flash_attn doctor`: what works on this machine, what does not, what to do.

`examine` looks at everything and never raises: what cannot be looked at is a finding like any
other. It starts without torch and without the extension module, which may be what is broken.
`_doctor_text` prints a report; docs/tools.md describes its fields.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import itertools
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar

FORMAT = 1
"""Number of the report's shape; a field that goes or changes its meaning makes it another one."""

OLDEST_TORCH = (2, 7)

Device: TypeAlias = Literal["cpu", "mps", "simulator", "any"]

Progress: TypeAlias = Callable[[str, int, int], None]

_T = TypeVar("_T")


@dataclass
class Finding:
    """Something that deserves attention; a problem makes the exit status 1."""

    severity: Literal["problem", "note"]
    about: str
    text: str
    remedy: str | None


@dataclass
class Versions:
    """What is installed; None for what is not."""

    mtlflashattn: str | None
    torch: str | None
    python: str
    executable: str
    system: str
    architecture: str


@dataclass
class Gpu:
    """The device that takes Metal kernels; its fields are None where there is none."""

    device: Literal["mps", "simulator"] | None = None
    name: str | None = None
    cores: int | None = None
    macos: str | None = None
    missing: str | None = None


@dataclass
class Cpu:
    """What the cpu tier computes with."""

    isa: str | None = None
    available: list[str] = field(default_factory=list)
    threads: int | None = None


@dataclass
class Unavailable:
    """Why a tier cannot serve some calls."""

    reason: str
    remedy: str | None
    calls: list[str]


@dataclass
class Tier:
    """A way to compute attention.

    Attributes:
        device: where the tensors lie that it takes: "simulator" are CPU tensors.
        state: "proved" (computed a right answer on this machine), "available" (proves itself when
            it is first used), "demoted" (failed here), "unavailable" (needs something else).
        serves: typical calls that it serves under the present settings, as "float16 D64".
        unavailable: reasons with the typical calls they hold for.
    """

    name: str
    state: Literal["proved", "available", "demoted", "unavailable"]
    device: Device
    detail: str | None
    serves: list[str]
    unavailable: list[Unavailable]


@dataclass
class Cache:
    """What this machine has shown of the Metal kernels, kept between processes.

    Attributes:
        path: the file; None for a user without a folder for caches.
        trouble: why it was not read or not written.
        proved: kernels that compiled and got their probe right.
        failed: kernels that did not, which serve no more.
        first_use_seconds: what compiling and probing all of them took.
        tuned_tiles: tiles that `tune` has found.
    """

    path: str | None
    trouble: str | None
    proved: int
    failed: int
    first_use_seconds: float
    tuned_tiles: int


@dataclass
class Setting:
    """An environment variable; `rejected` says why its value is not used."""

    name: str
    value: str | None
    default: str
    allowed: str
    rejected: str | None


@dataclass
class Shim:
    """What `import flash_attn` finds: "real", "ours" or "none"."""

    mode: str
    active: bool
    finds: str
    location: str | None
    reason: str
    denied: list[str]


@dataclass
class Sdpa:
    """The patch of `scaled_dot_product_attention`."""

    exists: bool
    installed: bool


@dataclass
class Report:
    """Everything that doctor found; a part that could not be looked at is None."""

    format: int
    ok: bool
    versions: Versions
    gpu: Gpu | None
    cpu: Cpu | None
    tiers: list[Tier] | None
    cache: Cache | None
    settings: list[Setting] | None
    shim: Shim | None
    sdpa: Sdpa | None
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings, numbers, booleans and None."""
        return asdict(self)


class Findings(list[Finding]):
    """What was found so far."""

    def problem(self, about: str, text: str, remedy: str | None = None) -> None:
        """Adds something that should work and does not."""
        self.append(Finding("problem", about, text, remedy))

    def note(self, about: str, text: str, remedy: str | None = None) -> None:
        """Adds something that works, but not as well as it could."""
        self.append(Finding("note", about, text, remedy))

    def look(self, about: str, part: Callable[[], _T]) -> _T | None:
        """What `part` returns; an exception becomes a problem."""
        try:
            with warnings.catch_warnings():
                # The settings are reported on their own.
                warnings.simplefilter("ignore")
                return part()
        except Exception as error:
            self.problem(about, f"could not be examined: {describe(error)}")
            return None


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def examine(*, probe: bool = False, progress: Progress = lambda *_: None) -> Report:
    """Looks at this machine and this process.

    Args:
        probe: first compile and check the kernels that typical calls use.
        progress: is told what is being probed, and how much of it is done.
    """
    findings = Findings()
    look = findings.look
    versions = _versions()
    torch = _torch(findings, versions)
    native = _native(findings)
    settings = cpu = gpu = tiers = cache = None
    if native is not None:
        settings = look("settings", lambda: _settings(findings, native))
    machine = None
    if native is not None and torch is not None:
        machine = look("devices", native._machine)
    if machine is not None and torch is not None:
        gpu = look("gpu", lambda: _gpu(findings, torch, machine))
        cpu = look("cpu", lambda: _cpu(findings, native, machine))
        if probe:
            look("probes", lambda: probe_kernels(torch, machine, progress))
        known = look("cache", native._probes)
        verdicts = [] if known is None else known["verdicts"]
        cache = look("cache", lambda: _cache(findings, known))
        tiers = look("tiers", lambda: _tiers(findings, torch, machine, gpu, verdicts))
    shim = look("shim", lambda: _shim(findings))
    sdpa = look("sdpa", _sdpa) if torch is not None else None
    ok = all(finding.severity != "problem" for finding in findings)
    return Report(
        FORMAT, ok, versions, gpu, cpu, tiers, cache, settings, shim, sdpa, list(findings)
    )


def _versions() -> Versions:
    system = f"{platform.system()} {platform.release()}"
    if platform.system() == "Darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    return Versions(
        mtlflashattn=_installed("mtlflashattn"),
        torch=_installed("torch"),
        python=platform.python_version(),
        executable=sys.executable,
        system=system,
        architecture=platform.machine(),
    )


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _torch(findings: Findings, versions: Versions) -> ModuleType | None:
    """Torch, if it can be imported and is recent enough to be used."""
    try:
        torch = importlib.import_module("torch")
        version = str(torch.__version__)
    except Exception as error:
        # A second import of a broken torch can fail for another reason than the first.
        first = _first_import_error() or error
        if versions.torch is None:
            findings.problem("torch", f"is not installed ({describe(first)})", "pip install torch")
        else:
            remedy = "pip install --force-reinstall torch"
            findings.problem("torch", f"cannot be imported: {describe(first)}", remedy)
        return None
    versions.torch = version
    numbers = version.split(".")[:2]
    if all(x.isdecimal() for x in numbers) and tuple(map(int, numbers)) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        text = f"{version} is older than {oldest}, the oldest that this package works with"
        findings.problem("torch", text, "pip install --upgrade torch")
    return torch


def _first_import_error() -> Exception | None:
    from . import _import_error  # noqa: PLC0415

    return _import_error


def _native(findings: Findings) -> Any:
    """The extension module, whose private functions doctor asks."""
    try:
        return importlib.import_module("metal_flash_attn._native")
    except Exception as error:
        text = f"the extension module cannot be imported: {describe(error)}"
        remedy = (
            f"pip install --force-reinstall mtlflashattn, with an interpreter of this machine's "
            f"architecture (this one is {platform.machine()})"
        )
        findings.problem("installation", text, remedy)
        return None


def _settings(findings: Findings, native: Any) -> list[Setting]:
    settings = []
    for answer in native._settings():
        name, rejected = answer["name"], answer["rejected"]
        value, default, allowed = answer["value"], answer["default"], answer["allowed"]
        settings.append(Setting(name, value, default, allowed, rejected))
        if rejected is not None:
            findings.problem("settings", rejected, f"unset {name}, or set it to what is allowed")
    known = {setting.name for setting in settings} | {
        "MTLFLASHATTN_CLANG",
        "MTLFLASHATTN_SIMULATOR_CACHE",
    }
    for name in sorted(os.environ):
        if name.startswith("MTLFLASHATTN_") and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {near[0]}?" if near else f"unset {name}"
            findings.note("settings", f"{name} is no setting of this version", remedy)
    return settings


def _gpu(findings: Findings, torch: Any, machine: dict[str, Any]) -> Gpu:
    found = machine["gpu"]
    if found is not None:
        return Gpu(machine["metal"], found["name"], found["cores"], found["macos"])
    missing, remedy, is_problem = _why_no_gpu(torch)
    if is_problem:
        findings.problem("gpu", missing, remedy)
    return Gpu(missing=missing)


def _why_no_gpu(torch: Any) -> tuple[str, str | None, bool]:
    """Why there is no MPS device, what to do, and whether there should be one."""
    here = f"{platform.system()} {platform.machine()}"
    if platform.system() != "Darwin":
        return f"needs a Mac with Apple silicon; this is {here}", None, False
    if platform.machine() != "arm64":
        if "Apple" in platform.processor() or os.uname().version.endswith("ARM64"):
            text = "this Python is built for Intel processors and runs under Rosetta"
            return text, "install an arm64 Python, and torch in it", True
        return f"needs a Mac with Apple silicon; this is {here}", None, False
    if not torch.backends.mps.is_built():
        text = "this torch is built without MPS"
        return text, "pip install --force-reinstall torch, from PyPI", True
    return "torch finds no MPS device", "update macOS: torch needs at least macOS 14", True


def _cpu(findings: Findings, native: Any, machine: dict[str, Any]) -> Cpu:
    if machine["isa_error"] is not None:
        findings.problem("cpu", machine["isa_error"], "unset MTLFLASHATTN_CPU_ISA")
    return Cpu(machine["isa"], native.instruction_sets(), machine["threads"])


def probe_kernels(torch: Any, machine: dict[str, Any], progress: Progress) -> None:
    """Compiles and checks the kernels of typical calls; what becomes of them is in the record."""
    from .interface import flash_attn_func  # noqa: PLC0415

    metal = machine["metal"]
    calls = [call for call in machine["calls"] if call["device"] == metal and call["tier"]]
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    for index, (call, causal) in enumerate(itertools.product(calls, (False, True))):
        progress(f"{_call_name(call)}{' causal' if causal else ''}", index, 2 * len(calls))
        dtype = getattr(torch, call["dtype"])
        q = torch.zeros((1, 40, 2, call["head_dim"]), dtype=dtype, device=device)
        # The kernel is that of long sequences, because its tile is forced.
        forced = environment(MTLFLASHATTN_KERNEL=call["tier"], MTLFLASHATTN_TILE=call["tile"] or "")
        with forced, contextlib.suppress(NotImplementedError):
            flash_attn_func(q, q, q, causal=causal)


def _cache(findings: Findings, known: dict[str, Any] | None) -> Cache | None:
    if known is None:
        return None
    if known["trouble"] is not None:
        remedy = "make it readable and writable, or set MTLFLASHATTN_CACHE to another folder"
        findings.note("cache", known["trouble"], remedy)
    elif known["path"] is None:
        text = "there is no folder for caches, so kernels prove themselves in every process"
        findings.note("cache", text, "set MTLFLASHATTN_CACHE to a folder")
    failed = sum(not verdict["proved"] for verdict in known["verdicts"])
    return Cache(
        path=known["path"],
        trouble=known["trouble"],
        proved=len(known["verdicts"]) - failed,
        failed=failed,
        first_use_seconds=known["first_use_seconds"],
        tuned_tiles=known["tuned_tiles"],
    )


def _tiers(
    findings: Findings,
    torch: Any,
    machine: dict[str, Any],
    gpu: Gpu | None,
    verdicts: list[dict[str, Any]],
) -> list[Tier]:
    calls = machine["calls"]
    if calls and all(call["tier"] is None for call in calls):
        findings.problem("tiers", calls[0]["error"], "unset MTLFLASHATTN_KERNEL")
    tiers = [_tier(findings, torch, machine, gpu, name) for name in machine["tiers"]]
    for tier in tiers:
        if tier.state == "available":
            _judge(findings, tier, [x for x in verdicts if x["tier"] == tier.name])
    return tiers


def _judge(findings: Findings, tier: Tier, verdicts: list[dict[str, Any]]) -> None:
    """Changes the state of a Metal tier to what its kernels have shown."""
    failures = [verdict for verdict in verdicts if not verdict["proved"]]
    proved = len(verdicts) - len(failures)
    if proved:
        tier.state = "proved"
        tier.detail = f"{_count(proved, 'kernel')} got their probe right on this machine"
    if not failures:
        return
    first = failures[0]
    tier.state = "demoted"
    tier.detail = (
        f"{len(failures)} of {_count(len(verdicts), 'kernel')} failed here and serve no more; "
        f"{first['dtype']} D{first['head_dim']}: {first['failure']}"
    )
    findings.problem(
        "tiers",
        f"the {tier.name} tier: {tier.detail}",
        "after an update of macOS or torch they get another chance by themselves, and now with "
        "MTLFLASHATTN_PROBE=force; please report it with the output of doctor --json",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _tier(
    findings: Findings, torch: Any, machine: dict[str, Any], gpu: Gpu | None, name: str
) -> Tier:
    metal = machine["metal"]
    device: Device = metal or "mps"
    if name in {"cpu", "torch"}:
        device = "cpu" if name == "cpu" else "any"
    # With the simulator there are no calls of CPU tensors: their reasons stand with its calls.
    devices = {call["device"] for call in machine["calls"]}
    asked = "cpu" if "cpu" in devices and (device in {"cpu", "any"} or metal is None) else metal
    calls = [call for call in machine["calls"] if call["device"] == asked]
    unavailable = _unavailable(calls, name)
    if device == "mps" and metal is None and gpu is not None:
        everything = [_call_name(call) for call in calls]
        unavailable = [Unavailable(f"no GPU: {gpu.missing}", None, everything)]
    serves = [_call_name(call) for call in calls if call["tier"] == name]
    tier = Tier(name, "available", device, None, serves, unavailable)
    if sum(len(reason.calls) for reason in unavailable) == len(calls):
        tier.state = "unavailable"
    elif device in {"cpu", "any"}:
        _prove_on_cpu(findings, torch, tier)
    else:
        tier.detail = "each kernel proves itself when it is first used"
    return tier


def _call_name(call: dict[str, Any]) -> str:
    return f"{call['dtype']} D{call['head_dim']}"


def _unavailable(calls: list[dict[str, Any]], tier: str) -> list[Unavailable]:
    """The reasons for `tier`, each once."""
    found: dict[str, Unavailable] = {}
    for call in calls:
        for entry in call["unavailable"]:
            if entry["tier"] == tier:
                reason, remedy = entry["reason"], entry["remedy"]
                one = found.setdefault(reason, Unavailable(reason, remedy, []))
                one.calls.append(_call_name(call))
    return list(found.values())


def _prove_on_cpu(findings: Findings, torch: Any, tier: Tier) -> None:
    """Computes a small problem by the tier, as any call would, and compares."""
    try:
        worst = _error_of(torch, tier.name)
    except Exception as error:
        tier.state, tier.detail = "demoted", describe(error)
    else:
        if worst <= 1.0:
            tier.state, tier.detail = "proved", "right on a small problem, just now"
            return
        tier.state = "demoted"
        tier.detail = f"off by {worst:.1f} times what rounding explains, on a small problem"
    findings.problem(
        "tiers",
        f"the {tier.name} tier fails: {tier.detail}",
        "pip install --force-reinstall mtlflashattn; if it stays, please report it with the "
        "output of: python -m metal_flash_attn doctor --json",
    )


def _error_of(torch: Any, tier: str) -> float:
    """The largest error of `tier` on a causal problem, in units of what rounding explains."""
    from .interface import flash_attn_func  # noqa: PLC0415

    queries, keys, heads, dim = 37, 53, 2, 16
    generator = torch.Generator().manual_seed(1)
    q = torch.rand(1, queries, heads, dim, generator=generator) - 0.5
    k = torch.rand(1, keys, heads, dim, generator=generator) - 0.5
    v = torch.rand(1, keys, heads, dim, generator=generator) - 0.5
    with environment(MTLFLASHATTN_KERNEL=tier, MTLFLASHATTN_DEVICE="auto"):
        got = flash_attn_func(q, k, v, causal=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * dim**-0.5
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    exact = torch.einsum("bhqk,bkhd->bqhd", weights, v.double())
    # |q|, |k| and |v| are at most 1/2, so a score is at most sqrt(dim)/4 and off by at most dim + 3
    # roundings of that; a weight is off by twice as much and the few roundings of exp and the
    # division; each sum over the keys adds one rounding a key.
    rounding = 2.0**-24
    score = (dim + 3) * dim**0.5 / 4
    bound = (2 * score + 2 * keys + 16) * rounding / 2
    return float((got.double() - exact).abs().max().item() / bound)


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets variables for a while; only this thread must be at work."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _shim(findings: Findings) -> Shim:
    try:
        finder = importlib.import_module("_mtlflashattn_finder")
    except ModuleNotFoundError:
        text = "the import finder is not installed beside the package, so import flash_attn fails"
        findings.problem("shim", text, "pip install --force-reinstall mtlflashattn")
        return Shim("auto", active=False, finds="none", location=None, reason=text, denied=[])
    from .shim import status  # noqa: PLC0415

    found = status()
    settings = finder.load_part("settings")
    should_serve = found.mode == "on" or (found.mode == "auto" and settings.is_apple_silicon())
    if should_serve and not found.active:
        remedy = (
            "pip install --force-reinstall mtlflashattn, and start Python without -S; or call "
            "metal_flash_attn.shim.install() before the first import of flash_attn"
        )
        findings.problem("shim", found.reason, remedy)
    return Shim(**asdict(found), denied=settings.denied_names())


def _sdpa() -> Sdpa:
    try:
        sdpa = importlib.import_module("metal_flash_attn.sdpa")
    except ModuleNotFoundError as error:
        if error.name != "metal_flash_attn.sdpa":
            raise
        return Sdpa(exists=False, installed=False)
    return Sdpa(exists=True, installed=bool(sdpa.installed()))
