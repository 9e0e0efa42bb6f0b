"""Hides `flash_attn` from the packages named in `MTLFLASHATTN_SHIM_DENY`.

Loaded by `_mtlflashattn_finder`, and only while that variable is set. The finder decides while
flash_attn is not imported. Once somebody has imported it, Python answers from `sys.modules` and
asks no finder, so the three ways to ask are wrapped as well.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.util
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from _mtlflashattn_finder import load_part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType

# Frames of the import system and of metadata look-ups stand between the finder and who asked.
_MACHINERY = frozenset(
    {"importlib", "_frozen_importlib", "_frozen_importlib_external", "importlib_metadata"}
    | {"_mtlflashattn_finder", "_mtlflashattn_serving", __name__}
)
_originals: list[tuple[Any, str, Callable[..., Any]]] = []


def caller_is_denied() -> bool:
    """Whether the nearest frame outside the import system belongs to a denied package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _top_level(frame.f_globals.get("__name__")) in _MACHINERY:
        frame = frame.f_back
    return frame is not None and is_denied(frame.f_globals)


def is_denied(module_globals: Mapping[str, Any]) -> bool:
    """Whether a module with these globals belongs to a package of the deny list.

    An entry `a` or `a.b` names that module and everything below it. The module is known by its
    `__name__`, its `__package__`, and for `python -m` by the name in its `__spec__`.
    """
    spec_name = getattr(module_globals.get("__spec__"), "name", None)
    names = (module_globals.get("__name__"), module_globals.get("__package__"), spec_name)
    entries = load_part("settings").denied_names()
    return any(
        # ComfyUI names the module of a custom node after its whole path: the last part counts.
        f"{PurePath(name).name}.".startswith(f"{entry}.")
        for name in names
        if isinstance(name, str)
        for entry in entries
    )


def guard_imports() -> None:
    """Wrap `__import__`, `import_module` and `find_spec` so that they hide a loaded flash_attn."""
    if _originals:
        return
    _wrap(builtins, "__import__", _guarded_import)
    _wrap(importlib, "import_module", _guarded_import_module)
    _wrap(importlib.util, "find_spec", _guarded_find_spec)


def unguard_imports() -> None:
    """Put back what `guard_imports` replaced, where nobody has replaced it since."""
    while _originals:
        owner, name, original = _originals.pop()
        if getattr(getattr(owner, name), "__wrapped__", None) is original:
            setattr(owner, name, original)


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    _originals.append((owner, name, original))
    setattr(owner, name, functools.wraps(original)(make(original)))


def _guarded_import(original: Callable[..., Any]) -> Callable[..., Any]:
    def guarded_import(
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002
        locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        if level == 0 and _hidden(name, globals):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, globals, locals, fromlist, level)

    return guarded_import


def _guarded_import_module(original: Callable[..., Any]) -> Callable[..., Any]:
    def import_module(name: str, package: str | None = None) -> Any:
        if _hidden(name, sys._getframe(1).f_globals):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, package)

    return import_module


def _guarded_find_spec(original: Callable[..., Any]) -> Callable[..., Any]:
    def find_spec(name: str, package: str | None = None) -> Any:
        if _hidden(name, sys._getframe(1).f_globals):
            return None
        return original(name, package)

    return find_spec


def _hidden(name: str, module_globals: Mapping[str, Any] | None) -> bool:
    """Whether `name` is ours and the module with these globals must not see it."""
    resolution = load_part("resolution")
    loaded = sys.modules.get(_top_level(name))
    if module_globals is None or loaded is None or not resolution.is_ours(loaded):
        return False
    return is_denied(module_globals)


def _top_level(name: Any) -> str:
    return name.partition(".")[0] if isinstance(name, str) else ""
