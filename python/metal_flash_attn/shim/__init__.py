"""What `import flash_attn` finds where no real flash_attn 2 is installed.

`flash_attn/` and `flash_attn_2_cuda.py` hold the modules that are served, laid out as in flash_attn
2.8. The other files belong to the import finder `_mtlflashattn_finder`, which loads them without
importing this package. docs/shim.md describes who wins and which settings there are.
"""

# The finder is installed beside this package, and is imported only by those who ask for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import sys
from dataclasses import dataclass

__all__ = ["ShimStatus", "install", "status", "uninstall"]


@dataclass(frozen=True)
class ShimStatus:
    """State of the `flash_attn` shim in this process.

    Attributes:
        mode: `MTLFLASHATTN_SHIM` as "auto", "on" or "off".
        active: whether the finder is in place and settings and platform let it serve.
        finds: what `import flash_attn` gets in a module that is not on the deny list: "real" for
            an installed flash_attn, "ours", or "none".
        location: file or directory of what is found; None where there is none.
        reason: why it is that one.
    """

    mode: str
    active: bool
    finds: str
    location: str | None
    reason: str


def install() -> ShimStatus:
    """Serve `flash_attn` in this process on any platform, unless `MTLFLASHATTN_SHIM` is off.

    A flash_attn that is installed, or imported already, still comes first: the status that is
    returned says what an import finds from now on.
    """
    import _mtlflashattn_finder

    _mtlflashattn_finder.install()
    finder = _mtlflashattn_finder.installed()
    if finder is not None:
        finder.forced = True
    return status()


def uninstall() -> None:
    """Take the finder away and forget the modules it served; references to them stay valid."""
    import _mtlflashattn_finder

    finder = _mtlflashattn_finder.installed()
    if finder is not None:
        sys.meta_path.remove(finder)
    if "_mtlflashattn_denial" in sys.modules:
        _mtlflashattn_finder.load_part("denial").unguard_imports()
    is_ours = _mtlflashattn_finder.load_part("resolution").is_ours
    for top_level in ("flash_attn", "flash_attn_2_cuda"):
        module = sys.modules.get(top_level)
        if module is None or not is_ours(module):
            continue
        for name in [x for x in sys.modules if f"{x}.".startswith(f"{top_level}.")]:
            del sys.modules[name]


def status() -> ShimStatus:
    """What `import flash_attn` finds in this process, and why. Imports nothing of flash_attn."""
    import _mtlflashattn_finder

    load_part = _mtlflashattn_finder.load_part
    mode = load_part("settings").mode()
    finder = _mtlflashattn_finder.installed()
    active = finder is not None and load_part("serving").is_active(finder)
    found = load_part("resolution").resolve(finder)
    if found.finds == "ours" and not active and "flash_attn" not in sys.modules:
        return ShimStatus(mode, active, "none", None, _why_inactive(mode, finder is not None))
    return ShimStatus(mode, active, found.finds, found.location, found.reason)


def _why_inactive(mode: str, finder_is_installed: bool) -> str:
    if not finder_is_installed:
        return "the import finder is not installed: call metal_flash_attn.shim.install()"
    if mode == "off":
        return "MTLFLASHATTN_SHIM is off"
    return "MTLFLASHATTN_SHIM is auto, which serves on macOS arm64 only; set it to on"
