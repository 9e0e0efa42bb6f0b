"""The flash_attn functions for PyTorch on devices that the CUDA package leaves out.

The functions have the signatures, defaults and results of flash_attn 2.8. CPU tensors are served by
an engine in Rust, tensors of any other device by chunked torch operations. `attention` offers the
same with biases, masks and attention sinks; `plan` and `trace` say what serves a call and why.
"""

import sys
from importlib.metadata import version

_import_error: Exception | None = None
try:
    from ._merge import merge_states
    from ._native import Plan, Trace, TraceEntry
    from .interface import (
        attention,
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
        plan,
        trace,
    )
except Exception as error:
    # `python -m metal_flash_attn doctor` tells what is broken, so the command line must start.
    # While Python looks for its module, sys.argv[0] is "-m" (documentation of sys.argv).
    if sys.argv[:1] != ["-m"] or "metal_flash_attn" not in sys.orig_argv:
        raise
    _import_error = error

__version__ = version("mtlflashattn")

__all__ = [
    "Plan",
    "Trace",
    "TraceEntry",
    "__version__",
    "attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "merge_states",
    "plan",
    "trace",
]
