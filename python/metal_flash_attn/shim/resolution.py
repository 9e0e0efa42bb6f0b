"""Which `flash_attn` an import finds: the installed one, ours, or none.

Loaded by `_mtlflashattn_finder`, so it imports the standard library only and never torch.
"""

from __future__ import annotations

import sys
import threading
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from types import ModuleType

_SHIM_DIRECTORY = Path(__file__).absolute().parent
_PACKAGE_DIRECTORY = str(_SHIM_DIRECTORY / "flash_attn")
PACKAGE_FILE = str(_SHIM_DIRECTORY / "flash_attn" / "__init__.py")
MARKER_FILE = str(_SHIM_DIRECTORY / "flash_attn_2_cuda.py")


# Threads in which the finders are being asked on our behalf.
_asking: set[int] = set()


class Resolution(NamedTuple):
    """Which `flash_attn` an import finds, where it lies, and why it is that one."""

    finds: Literal["real", "ours", "none"]
    location: str | None
    reason: str
    spec: ModuleSpec | None = None


def resolve(finder: object) -> Resolution:
    """What `import flash_attn` finds, the settings aside. Nothing is imported."""
    if "flash_attn" in sys.modules:
        return _resolve_loaded(sys.modules["flash_attn"])
    elsewhere = find_elsewhere(finder, "flash_attn")
    if elsewhere is not None and _is_somebodys(elsewhere):
        return Resolution("real", _location(elsewhere), "a flash_attn is installed", elsewhere)
    cute = _flash_attention_4_directories(elsewhere)
    reason = (
        "only FlashAttention-4 (flash_attn.cute) is installed"
        if cute
        else "no other flash_attn is installed"
    )
    return Resolution("ours", PACKAGE_FILE, reason, _package_spec(cute))


def find_spec(finder: object, name: str) -> ModuleSpec | None:
    """The spec of our module `name`; None where the answer is somebody else's."""
    if name == "flash_attn":
        loaded = sys.modules.get(name)
        if loaded is not None and is_ours(loaded):  # importlib.reload
            return loaded.__spec__
    resolution = resolve(finder)
    if resolution.finds != "ours":
        return None
    if name == "flash_attn":
        return resolution.spec
    # The marker goes with our flash_attn, and an installed extension module of that name wins.
    if find_elsewhere(finder, name) is not None:
        return None
    return spec_from_file_location(name, MARKER_FILE)


def find_elsewhere(finder: object, name: str) -> ModuleSpec | None:
    """What `import name` would find if this finder did not exist."""
    thread = threading.get_ident()
    _asking.add(thread)
    try:
        for other in list(sys.meta_path):
            ask = getattr(other, "find_spec", None)
            spec: ModuleSpec | None = None if other is finder or ask is None else ask(name, None)
            if spec is not None:
                return spec
        return None
    finally:
        _asking.discard(thread)


def is_asking() -> bool:
    """Whether the current thread is within `find_elsewhere`."""
    return threading.get_ident() in _asking


def is_ours(module: ModuleType) -> bool:
    """Whether a loaded module is the `flash_attn` or `flash_attn_2_cuda` of this package."""
    spec = getattr(module, "__spec__", None)
    return getattr(spec, "origin", None) in (PACKAGE_FILE, MARKER_FILE)


def _resolve_loaded(module: ModuleType | None) -> Resolution:
    if module is None:
        return Resolution("none", None, "sys.modules blocks the name flash_attn")
    location = getattr(module, "__file__", None)
    kind: Literal["ours", "real"] = "ours" if is_ours(module) else "real"
    return Resolution(kind, location, "flash_attn is imported already")


def _is_somebodys(spec: ModuleSpec) -> bool:
    """Whether a spec is a module that somebody meant to be `flash_attn`.

    That is everything with code of its own, whether or not it can be imported: the error of a
    broken install belongs to its owner. A namespace package has no code, and a package that holds
    `cute` but no `flash_attn_interface` is FlashAttention-4 alone.
    """
    if spec.loader is None or type(spec.loader).__name__.endswith("NamespaceLoader"):
        return False
    locations = list(spec.submodule_search_locations or [])
    if PathFinder.find_spec("flash_attn.flash_attn_interface", locations) is not None:
        return True
    return not _flash_attention_4_directories(spec)


def _flash_attention_4_directories(spec: ModuleSpec | None) -> list[str]:
    locations = [] if spec is None else list(spec.submodule_search_locations or [])
    return [x for x in locations if Path(x, "cute", "__init__.py").is_file()]


def _location(spec: ModuleSpec) -> str | None:
    if spec.origin is not None:
        return spec.origin
    return next(iter(spec.submodule_search_locations or []), None)


def _package_spec(flash_attention_4: list[str]) -> ModuleSpec | None:
    # Our directory comes first, so FlashAttention-4 adds flash_attn.cute and replaces nothing.
    locations = [_PACKAGE_DIRECTORY, *flash_attention_4]
    return spec_from_file_location("flash_attn", PACKAGE_FILE, submodule_search_locations=locations)
