"""Marker for projects that import the extension module of flash_attn to see whether it is there.

The compiled functions of the real module are not part of any documented API and are not served.
"""

from __future__ import annotations

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    # AttributeError, so that hasattr() gives the true answer.
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise AttributeError(
        f"flash_attn_2_cuda.{name} is a CUDA kernel that mtlflashattn does not have; call the "
        "functions of flash_attn instead, for example flash_attn.flash_attn_func"
    )
