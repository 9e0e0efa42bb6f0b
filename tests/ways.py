"""The devices and tiers that serve calls: the numerical tests run once for each of them.

`simulator` sends CPU tensors to the simulator. `standin` sends them the way of MPS tensors, to a
stand-in for torch's compiled half. `mps` needs an Apple GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from metal_flash_attn import Trace, trace
from reference import Arithmetic
from standin_mps import installed
from torch import Tensor


@dataclass(frozen=True)
class Way:
    """A device whose tensors, and a tier that must serve."""

    device: str
    tier: str

    def __str__(self) -> str:
        return f"{self.device}-{self.tier}"

    @property
    def is_simulated(self) -> bool:
        """Whether CPU tensors go through Metal kernels, thousands of times slower than a GPU."""
        return self.device in ("simulator", "standin")

    @property
    def is_metal(self) -> bool:
        """Whether a Metal kernel computes."""
        return self.device != "cpu" and self.tier != "torch"

    def put(self, tensor: Tensor) -> Tensor:
        """The same values where this device reads them."""
        return tensor.to("mps") if self.device == "mps" else tensor

    def at_most(self, size: int) -> int:
        """`size`, or less where that would take long."""
        return min(size, 40) if self.is_simulated else size

    def arithmetic(self, dtype: torch.dtype) -> Arithmetic:
        """How the tier computes in `dtype`."""
        weights = dtype if self.tier in ("simdgroup", "decode") else torch.float32
        return Arithmetic(self.is_metal, weights)

    @contextlib.contextmanager
    def serves(self, chunk: int = 2048) -> Iterator[None]:
        """Forces the tier, and requires that it served."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MTLFLASHATTN_KERNEL", self.tier)
            patch.setenv("MTLFLASHATTN_TORCH_CHUNK", str(chunk))
            if self.device == "simulator":
                patch.setenv("MTLFLASHATTN_DEVICE", "simulator")
            device = installed() if self.device == "standin" else contextlib.nullcontext()
            with device, trace() as calls:
                yield
        assert {entry.tier for entry in calls.calls if not entry.backward} == {self.tier}

    @property
    def backward_tier(self) -> str:
        """The tier of the gradients of q, k and v."""
        if self.tier == "cpu":
            return "cpu"
        return "simdgroup" if self.is_metal else "torch"

    def backward_arithmetic(self, dtype: torch.dtype) -> Arithmetic:
        """How that tier computes in `dtype`."""
        return Arithmetic(self.is_metal, dtype if self.is_metal else torch.float32)

    @contextlib.contextmanager
    def backward(self) -> Iterator[Trace]:
        """Lets gradients go the same way, and yields what was called."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MTLFLASHATTN_KERNEL", self.tier)
            if self.device == "simulator":
                patch.setenv("MTLFLASHATTN_DEVICE", "simulator")
            device = installed() if self.device == "standin" else contextlib.nullcontext()
            with device, trace() as calls:
                yield calls


CPU = Way("cpu", "cpu")
WAYS = [
    CPU,
    Way("cpu", "torch"),
    Way("simulator", "simdgroup"),
    Way("simulator", "scalar"),
    Way("standin", "simdgroup"),
    Way("standin", "torch"),
    Way("mps", "simdgroup"),
    Way("mps", "scalar"),
    Way("mps", "torch"),
]


@functools.cache
def has_mps() -> bool:
    """Whether there is an MPS device that computes; a virtual Mac has one that does not."""
    if not torch.backends.mps.is_available():
        return False
    try:
        return bool(torch.ones(4, device="mps").sum().item() == 4)
    except RuntimeError:
        return False


def _parameter(way: Way) -> Any:
    absent = way.device == "mps" and not has_mps()
    marks = [pytest.mark.skip(reason="this machine has no MPS device")] if absent else []
    return pytest.param(way, id=str(way), marks=marks)


def parametrize(which: list[Way]) -> pytest.MarkDecorator:
    """Runs a test once for each of these ways."""
    return pytest.mark.parametrize("way", [_parameter(way) for way in which])


ways = parametrize(WAYS)
gradient_ways = pytest.mark.parametrize(
    "way", [_parameter(way) for way in WAYS if not way.is_simulated or way.tier == "simdgroup"]
)
"""The gradients of the other simulated ways are those of the simdgroup or of the torch tier."""

Example = Callable[[Way, st.DataObject], None]

SIMULATED_EXAMPLES = int(os.environ.get("SIMULATED_EXAMPLES", "6"))


def random_problems(
    test: Example,
    which: pytest.MarkDecorator = ways,
    examples: int | None = None,
    simulated: int = SIMULATED_EXAMPLES,
) -> Callable[[Way], None]:
    """Runs `test` on random problems, each way; fewer where a problem takes long."""

    @which
    @functools.wraps(test)
    def run(way: Way) -> None:
        @hypothesis.given(data=st.data())
        def example(data: st.DataObject) -> None:
            test(way, data)

        example.__name__ = f"{test.__name__}[{way}]"
        if way.is_simulated:
            # Always the same ones: their kernels are compiled once and kept.
            few = hypothesis.settings(max_examples=simulated, derandomize=True)
            few(example)()
        elif examples is not None:
            hypothesis.settings(max_examples=examples)(example)()
        else:
            example()

    del run.__wrapped__
    return run


def random_gradients(test: Example) -> Callable[[Way], None]:
    """Runs `test` on random problems, each way that may compute gradients."""
    # Each has four kernels.
    return random_problems(test, gradient_ways, examples=20, simulated=SIMULATED_EXAMPLES // 2)
