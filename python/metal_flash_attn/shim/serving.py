"""The answers of the import finder, once it is asked for flash_attn.

Loaded by `_mtlflashattn_finder`, so it imports the standard library only and never torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from _mtlflashattn_finder import load_part

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution, DistributionFinder


def is_active(finder: Any) -> bool:
    """Whether settings and platform let the finder serve at all."""
    settings = load_part("settings")
    mode = settings.mode()
    if mode == "auto":
        return bool(finder.forced or settings.is_apple_silicon())
    return bool(mode == "on")


def find_spec(finder: Any, name: str) -> ModuleSpec | None:
    """The spec of our module `name`; None where this importer is not to have it from us."""
    if not _may_answer(finder):
        return None
    spec: ModuleSpec | None = load_part("resolution").find_spec(finder, name)
    if spec is not None and load_part("settings").denied_names():
        load_part("denial").guard_imports()
    return spec


def find_distributions(
    finder: Any, context: DistributionFinder.Context | None
) -> list[Distribution]:
    """Our distribution where `import flash_attn` finds ours, else none."""
    if not _may_answer(finder) or load_part("resolution").resolve(finder).finds != "ours":
        return []
    found: list[Distribution] = load_part("distribution").find(context)
    return found


def _may_answer(finder: Any) -> bool:
    # Another finder that asks everybody, as ours does, must not be sent round in circles.
    if not is_active(finder) or load_part("resolution").is_asking():
        return False
    return not (load_part("settings").denied_names() and load_part("denial").caller_is_denied())
