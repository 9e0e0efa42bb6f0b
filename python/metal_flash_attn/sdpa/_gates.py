"""Which calls the patch serves: a gate opens for a reason, and the first one that opens decides."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from metal_flash_attn import _native
from metal_flash_attn.interface import plan

from ._operator import STOCK
from ._stock import GRAPH, HALF, LONG_HALF, MASKED_CAUSAL_ABORTS, MATH, Call, Stock, Version

MOST_FORMS = 4096
"""Lengths that never come again must not fill the memory."""

_FAST_TIERS: Final = ("tensorops", "tensorops-staged")


@dataclass(frozen=True)
class Decision:
    """Whether a call is served, and why.

    Attributes:
        serves: whether the patch computes the call; torch does otherwise.
        gate: the gate that opened, or what keeps the call from being served.
        reason: the same as a sentence.
        source: the upstream issue or pull request behind it, where there is one.
    """

    serves: bool
    gate: str
    reason: str
    source: str | None = None


@dataclass(frozen=True)
class Thresholds:
    """From where on the gates open.

    Attributes:
        min_score_gb: GiB of scores in q's dtype, for the memory gate.
        min_seq: longest of query and key length, for the length gate.
        fast_min_seq: the same, for the speed gate.
    """

    min_score_gb: float
    min_seq: int
    fast_min_seq: int


class Gates(Protocol):
    """The gates of one device."""

    masked_causal_aborts: bool
    """Whether stock torch ends the process where it should raise an error."""
    shut: _native.ShutForms
    """Forms of calls that are known not to be served."""

    def decide(self, call: Call) -> Decision:
        """Whether `call` is served."""

    def out_layout(self, call: Call, is_plain: bool) -> str:
        """How stock torch lays out the result, named as for `_native.sdpa`.

        `is_plain`: rows of q, k and v are contiguous, a mask has two or four dimensions and needs
        no gradient.
        """


class AlwaysOpen:
    """The gates of a device when every call is asked for."""

    def __init__(self, device: Gates) -> None:
        """Leaves everything but the decision to the gates of `device`."""
        self.masked_causal_aborts = device.masked_causal_aborts
        self.shut = _native.ShutForms(MOST_FORMS)
        self.out_layout = device.out_layout

    def decide(self, call: Call) -> Decision:
        """Opens."""
        del call
        return _FORCED


_FORCED: Final = Decision(
    True, "forced", "MTLFLASHATTN_SDPA is on: every call that can be served is"
)


class MpsGates:
    """The gates for MPS tensors, where stock torch depends on its version."""

    def __init__(self, thresholds: Thresholds, version: Version) -> None:
        """Prepares the decisions, which calls only hand out."""
        self.masked_causal_aborts = version < MASKED_CAUSAL_ABORTS
        self.shut = _native.ShutForms(MOST_FORMS)
        self._stock = Stock(version)
        self._thresholds = thresholds
        self._min_score_bytes = int(thresholds.min_score_gb * 2**30)
        self._open = _open_decisions(thresholds)
        self._closed = Decision(
            False,
            "thresholds",
            "stock torch is not known to be wrong, slow or wasteful here: it has a fused kernel, "
            f"or the call has less than {thresholds.min_seq} rows and keys, less than "
            f"{thresholds.min_score_gb:g} GiB of scores, and no tensorops tier for "
            f"{thresholds.fast_min_seq} or more",
        )
        self._defects = {
            defect: Decision(
                True, "correctness", f"stock torch of this version: {defect.what}", defect.source
            )
            for defect in self._stock.defects
        }

    def decide(self, call: Call) -> Decision:
        """The first gate that opens, in the order of correctness, length, speed, memory."""
        kernel = self._stock.kernel(call)
        defect = self._stock.defect(call, kernel)
        if defect is not None:
            return self._defects[defect]
        if call.head_dim != call.value_dim and kernel == GRAPH:
            return self._open["uneven-v"]
        if kernel not in {GRAPH, MATH}:
            return self._closed
        if call.longest >= self._thresholds.min_seq:
            is_rounded = kernel == GRAPH and call.dtype in HALF
            return self._open["length, half" if is_rounded else "length"]
        # Nobody has measured a backward pass.
        may_be_fast = kernel == GRAPH and call.longest >= self._thresholds.fast_min_seq
        if may_be_fast and _is_fast(call.dtype, call.head_dim, call.value_dim):
            return self._open["speed"]
        if call.scores * call.dtype.itemsize >= self._min_score_bytes:
            return self._open["memory"]
        return self._closed

    def out_layout(self, call: Call, is_plain: bool) -> str:
        """Prefill kernels return `torch.empty_like(q)`, all else is contiguous."""
        del is_plain
        return "like_query" if self._stock.kernel(call) == "prefill" else "contiguous"


def _open_decisions(thresholds: Thresholds) -> dict[str, Decision]:
    graph = "stock torch holds the whole score matrix for this call"
    return {
        "uneven-v": Decision(
            True, "uneven-v", "v is wider or narrower than q, which some versions get wrong"
        ),
        "length": Decision(True, "length", f"{graph}, with {thresholds.min_seq} rows or more"),
        "length, half": Decision(
            True,
            "length",
            f"{graph}, with {thresholds.min_seq} rows or more in a 16-bit type",
            LONG_HALF,
        ),
        "speed": Decision(True, "speed", f"{graph}, and a tensorops tier serves it here"),
        "memory": Decision(
            True, "memory", f"{graph}: {thresholds.min_score_gb:g} GiB of scores or more"
        ),
    }


@torch.compiler.assume_constant_result
def _is_fast(dtype: torch.dtype, head_dim: int, value_dim: int) -> bool:
    return _fast_tier(dtype, head_dim, value_dim)


@functools.cache
def _fast_tier(dtype: torch.dtype, head_dim: int, value_dim: int) -> bool:
    """Whether a tensorops tier serves long calls of these sizes on this machine."""
    q = torch.empty((1, 1, 1, head_dim), dtype=dtype, device="mps").expand(1, 4096, 1, head_dim)
    v = torch.empty((1, 1, 1, value_dim), dtype=dtype, device="mps").expand(1, 4096, 1, value_dim)
    return plan(q, q, v).tier in _FAST_TIERS


SMALL_CPU_CALL: Final = 2**16
"""Least product of score elements and head dimension: below it the patch itself costs too much."""


SMALL_CPU_FLOAT32_CALL: Final = 2**20
"""The same for float32, where stock torch is faster than in the other dtypes."""


SMALL_CPU_TRAINING: Final = 2**23
"""The same for calls that need gradients, whose backward pass costs more to call."""


class CpuGates:
    """The gates for CPU tensors: what was measured to be faster than stock torch (docs/sdpa.md)."""

    def __init__(self) -> None:
        """Finds out whether this machine is like those that were measured."""
        self.masked_causal_aborts = False
        self.shut = _native.ShutForms(MOST_FORMS)
        self._flash_layout = _flash_layout()
        self._is_measured = _native.instruction_sets()[-1] in ("avx2", "avx512")
        self._in_matrix_unit = _matrix_unit_dtypes()

    def decide(self, call: Call) -> Decision:
        """The speed gate, or what keeps it closed."""
        if not self._is_measured:
            return _UNMEASURED
        work = call.scores * call.head_dim
        if work < SMALL_CPU_CALL:
            return _SMALL
        if call.dtype == torch.float32 and work < SMALL_CPU_FLOAT32_CALL:
            return _SMALL_FLOAT32
        if call.gradient and work < SMALL_CPU_TRAINING:
            return _SMALL_TRAINING
        if call.dtype in self._in_matrix_unit and call.query_len > 1:
            return _MATRIX_UNIT
        is_additive = call.mask is not None and call.mask != torch.bool
        if is_additive and call.dtype != torch.float16 and call.head_dim == call.value_dim:
            return _ADDITIVE
        return _FASTER

    def out_layout(self, call: Call, is_plain: bool) -> str:
        """What the flash kernel returns, where it serves; else the result is contiguous."""
        by_flash = is_plain and call.same_batch and call.head_dim == call.value_dim
        return self._flash_layout if by_flash else "contiguous"


_FASTER: Final = Decision(True, "speed", "measured to be faster than stock torch on such CPUs")
_UNMEASURED: Final = Decision(
    False, "thresholds", "nothing was measured on CPUs without AVX2 or AVX-512"
)
_SMALL: Final = Decision(
    False,
    "thresholds",
    f"scores times head dimension are less than {SMALL_CPU_CALL:,}: too little work",
)
_SMALL_FLOAT32: Final = Decision(
    False,
    "thresholds",
    f"scores times head dimension are less than {SMALL_CPU_FLOAT32_CALL:,}: too little work in "
    "float32",
)
_SMALL_TRAINING: Final = Decision(
    False,
    "thresholds",
    f"scores times head dimension are less than {SMALL_CPU_TRAINING:,}: too little work for a call "
    "that needs gradients",
)
_MATRIX_UNIT: Final = Decision(
    False, "thresholds", "stock torch uses the matrix unit that this CPU has for the dtype"
)
_ADDITIVE: Final = Decision(
    False, "thresholds", "additive masks were not measured to be faster in this dtype"
)


@functools.cache
def _flash_layout() -> str:
    """How the flash kernel of this torch lays out the result of a contiguous q: it has changed."""
    q = torch.zeros(1, 2, 3, 8)
    with torch.no_grad():
        out: Tensor = STOCK(q, q, q)
    return "like_query" if out.stride() == q.stride() else "tokens_first"


def _matrix_unit_dtypes() -> frozenset[torch.dtype]:
    """The dtypes that stock torch multiplies in AMX tiles, where it is hard to beat."""
    found = set()
    if torch.cpu._is_amx_tile_supported():
        found.add(torch.bfloat16)
    if getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)():
        found.add(torch.float16)
    return frozenset(found)
