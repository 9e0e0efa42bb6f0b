"""The settings of the `flash_attn` shim, read from the environment anew at every call.

Loaded by `_mtlflashattn_finder`, so it imports the standard library only and never torch.
"""

from __future__ import annotations

import os
import sys

_MODES = {"on": "on", "1": "on", "true": "on", "off": "off", "0": "off", "false": "off"}


def mode() -> str:
    """`MTLFLASHATTN_SHIM` as "auto", "on" or "off"; any other value counts as "auto"."""
    return _MODES.get(os.environ.get("MTLFLASHATTN_SHIM", "").strip().lower(), "auto")


def denied_names() -> list[str]:
    """The names in `MTLFLASHATTN_SHIM_DENY`: modules from which flash_attn is hidden."""
    entries = os.environ.get("MTLFLASHATTN_SHIM_DENY", "").split(",")
    return [entry.strip() for entry in entries if entry.strip()]


def is_apple_silicon() -> bool:
    """Whether this is an arm64 interpreter on macOS; one under Rosetta is not."""
    return sys.platform == "darwin" and os.uname().machine == "arm64"
