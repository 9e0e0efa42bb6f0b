"""The settings of the `flash_attn` shim, read from the environment anew at every call.

Loaded by `_mtlflashattn_finder`, so it imports the standard library only and never torch.
"""

from __future__ import annotations

import os
import sys

# The words that every MTLFLASHATTN_* switch takes (crates/core/src/settings.rs).
_MODES = dict.fromkeys(["1", "true", "yes", "on"], "on") | dict.fromkeys(
    ["0", "false", "no", "off"], "off"
)


def mode() -> str:
    """`MTLFLASHATTN_SHIM` as "auto", "on" or "off"; any other value counts as "auto"."""
    return _MODES.get(os.environ.get("MTLFLASHATTN_SHIM", "").strip().lower(), "auto")


def denied_names() -> list[str]:
    """The names in `MTLFLASHATTN_SHIM_DENY`: modules from which flash_attn is hidden.

    A value with anything but names counts as none, as in crates/core/src/settings.rs.
    """
    entries = os.environ.get("MTLFLASHATTN_SHIM_DENY", "").split(",")
    names = [entry.strip() for entry in entries if entry.strip()]
    if all(part.isidentifier() for name in names for part in name.split(".")):
        return names
    return []


def is_apple_silicon() -> bool:
    """Whether this is an arm64 interpreter on macOS; one under Rosetta is not."""
    return sys.platform == "darwin" and os.uname().machine == "arm64"
