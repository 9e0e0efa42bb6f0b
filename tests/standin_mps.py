"""A stand-in for the compiled half of `torch.mps.compile_shader`, which runs on the simulator.

torch's own Python half stays as it is: it inlines headers of torch and calls what this module puts
in the place of `torch._C._mps_compileShader`. The rules are those of torch/csrc/mps/Module.cpp and
aten/src/ATen/native/mps/OperationUtils.mm (torch 2.7 to 2.15):

* The source is handed to Metal as ASCII; anything else is no source at all.
* An error of the compiler is a SyntaxError with its log. Looking a kernel up makes a new object
  each time, or raises RuntimeError, also where no pipeline can be made of it.
* Positional argument n is `[[buffer(n)]]`. A tensor binds its storage from its storage offset on:
  neither device, dtype nor strides are looked at. bool is a kind of int, and ints are int64; floats
  are float32. A list or tuple is packed as its first element says, and must not be empty.
  `arg_casts` changes the element type of numbers. Everything else is refused.
* A kernel that the GPU stops does not raise: its command buffer ends with an error, which torch up
  to 2.15 does not look at, so that nothing was written (pytorch/pytorch#193571). Where it does
  look, the next one who waits gets the driver's words.
* `threads` counts all threads, by default as many as the first tensor has elements; `group_size`
  has as many dimensions, by default as large a first one as the pipeline allows.
"""

from __future__ import annotations

import contextlib
import platform
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from metal_flash_attn import _native
from torch import Tensor

_CASTS = {"fp16": "e", "int32": "i", "int16": "h", "int8": "b", "uint8": "B"}
_BYTES_LIMIT = 4096


@dataclass
class Dispatch:
    """One launch, as it reached the device."""

    kernel: str
    arguments: tuple[Any, ...]
    threads: tuple[int, ...]
    group_size: tuple[int, ...]


@dataclass
class Standin:
    """What the device was asked, and how it misbehaves."""

    compiled: list[str] = field(default_factory=list)
    dispatches: list[Dispatch] = field(default_factory=list)
    refuses_source: Callable[[str], bool] = lambda _: False
    refuses_pipeline: Callable[[str], bool] = lambda _: False
    is_short_of_memory: Callable[[str], bool] = lambda _: False
    is_wrong: Callable[[str], bool] = lambda _: False
    is_nan: Callable[[str], bool] = lambda _: False
    hangs: Callable[[str], bool] = lambda _: False
    hang_message: str | None = None
    max_threads: int = 1024
    reported_threads: int | None = None
    gpu: str = "Apple M1"
    macos: str = "15.0"
    synchronized: int = 0
    pending: str | None = None

    def synchronize(self) -> None:
        """`torch._C._mps_deviceSynchronize`."""
        self.synchronized += 1
        self.wait()

    def wait(self) -> None:
        """Raises what the driver had to say, once."""
        message, self.pending = self.pending, None
        if message is not None:
            raise RuntimeError(message)

    def compile(self, source: str) -> Library:
        if not isinstance(source, str):
            raise TypeError("_mps_compileShader(): incompatible function arguments")
        if not source.isascii():
            # A null NSString: Metal throws, and torch hands that on.
            raise RuntimeError("Failed to create metal library, error: source must not be nil")
        self.compiled.append(source)
        if self.refuses_source(source):
            raise SyntaxError("program_source:1:1: error: refused by the stand-in")
        return Library(self, source, _native._SimulatedLibrary(source))


class Library:
    """`torch._C._mps_ShaderLibrary`."""

    _standin: Standin
    _source: str
    _simulated: Any

    def __init__(self, standin: Standin, source: str, simulated: Any) -> None:
        self._standin, self._source, self._simulated = standin, source, simulated

    def __dir__(self) -> list[str]:
        return re.findall(r"\bkernel\s+void\s+(\w+)", self._source)

    def __getattr__(self, name: str) -> Kernel:
        message = f"Failed to create function state object for: {name}"
        if self._standin.refuses_pipeline(name):
            raise RuntimeError(message)
        try:
            pipeline = self._simulated.pipeline(name)
        except RuntimeError as error:
            raise RuntimeError(f"{message}, error: {error}") from error
        return Kernel(self._standin, self._source, name, pipeline)


class Kernel:
    """`torch._C._mps_MetalKernel`."""

    def __init__(self, standin: Standin, source: str, name: str, pipeline: Any) -> None:
        self._standin, self._source, self._name = standin, source, name
        self._pipeline = pipeline
        self._calls = 0

    @property
    def max_threads_per_threadgroup(self) -> int:
        most = min(self._standin.max_threads, int(self._pipeline.max_threads))
        return self._standin.reported_threads or most

    @property
    def thread_execution_width(self) -> int:
        return 32

    def __call__(
        self,
        *args: Any,
        threads: Any = None,
        group_size: Any = None,
        arg_casts: Any = None,
        error_buf_idx: Any = None,
    ) -> None:
        assert error_buf_idx is None, "exists from torch 2.11 on only"
        assert self._calls == 0, "one kernel object called by two threads at once"
        self._calls += 1
        try:
            self._call(args, _dimensions(threads), _dimensions(group_size), _casts(arg_casts))
        finally:
            self._calls -= 1

    def _call(
        self,
        args: tuple[Any, ...],
        threads: tuple[int, ...] | None,
        group_size: tuple[int, ...] | None,
        casts: Callable[[int], str],
    ) -> None:
        bound: list[Any] = []
        for index, argument in enumerate(args):
            if isinstance(argument, Tensor):
                bound.append(_memory(argument))
                threads = (argument.numel(),) if threads is None else threads
            else:
                bound.append(_pack(argument, casts(index)))
        if threads is None:
            raise RuntimeError("Number of threads is undefined or has wrong dimension")
        if group_size is not None and len(threads) != len(group_size):
            raise RuntimeError("Expected threads->size() == group_size->size() to be true")
        limit = self.max_threads_per_threadgroup
        if group_size is None:
            group_size = (min(threads[0], limit) if len(threads) == 1 else limit, 1, 1)
        threads, group = ((*sizes, 1, 1)[:3] for sizes in (threads, group_size))
        if group[0] * group[1] * group[2] > limit:
            raise ValueError(f"Threadgroup size exceeds {limit} limit")
        assert all(threads), "Metal's validation layer refuses an empty grid"
        self._standin.dispatches.append(Dispatch(self._name, args, threads, group))
        if self._standin.is_short_of_memory(self._source):
            raise RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GiB)")
        self._run(args, bound, threads, group)

    def _run(
        self,
        args: tuple[Any, ...],
        bound: list[Any],
        threads: tuple[int, ...],
        group: tuple[int, ...],
    ) -> None:
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        wrong = self._standin.is_wrong(self._source)
        nan = self._standin.is_nan(self._source)
        before = [tensor.clone() for tensor in tensors] if wrong or nan else []
        if self._standin.hangs(self._source):
            self._standin.pending = self._standin.hang_message
            return
        self._pipeline.dispatch(bound, threads, group)
        for tensor, old in zip(tensors, before, strict=False):
            if not torch.equal(tensor.nan_to_num(7.0), old.nan_to_num(7.0)):
                # Two per cent off: what a lost key of fifty does to a row. Or one NaN.
                if wrong:
                    tensor.mul_(1.02)
                else:
                    tensor[(-1,) * tensor.dim()] = torch.nan


def _dimensions(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, int):
        return (value,)
    sizes = tuple(value)
    if not 0 < len(sizes) < 4:
        raise RuntimeError("Expected vec.size() > 0 && vec.size() < 4 to be true")
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise RuntimeError("Unable to cast Python instance to C++ type")
    return sizes


def _casts(arg_casts: Any) -> Callable[[int], str]:
    if arg_casts is None:
        return lambda _: ""
    if isinstance(arg_casts, str):
        return lambda _: arg_casts
    if isinstance(arg_casts, dict):
        return lambda index: arg_casts.get(index, "")
    raise RuntimeError(f"Unexpected caster arg type {type(arg_casts).__name__}")


def unwrap(tensor: Tensor) -> Tensor:
    """The tensor with the memory: a test of wrapped tensors replaces this."""
    return tensor


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Address and size of what a kernel can reach: the storage, from the first element on."""
    tensor = unwrap(tensor)
    storage = tensor.untyped_storage()
    start = int(tensor.storage_offset()) * tensor.element_size()
    return storage.data_ptr() + start, storage.nbytes() - start


def _pack(argument: Any, cast: str) -> bytes:
    if isinstance(argument, list | tuple):
        if not argument:
            raise RuntimeError("Empty list/tuple can not be an argument to metal kernel")
        return _pack_numbers(argument, cast)
    if not isinstance(argument, int | float):
        raise RuntimeError("Unsupported argument type")  # noqa: TRY004
    return _pack_numbers([argument], cast)


def _pack_numbers(numbers: Sequence[Any], cast: str) -> bytes:
    if isinstance(numbers[0], int):
        if not all(isinstance(number, int) for number in numbers):
            raise RuntimeError("Unable to cast Python instance to C++ type")
        code = "q"
    elif isinstance(numbers[0], float):
        code = "f"
    else:
        raise RuntimeError("Unexpected argument types")  # noqa: TRY004
    if cast == "bf16":
        return bytes(torch.tensor(numbers).bfloat16().view(torch.uint8).tolist())
    if cast:
        if cast not in _CASTS:
            raise RuntimeError(f"Unsupported cast instruction {cast}")
        code = _CASTS[cast]
        numbers = [float(n) if code == "e" else int(n) for n in numbers]
    packed = struct.pack(f"<{len(numbers)}{code}", *numbers)
    assert len(packed) <= _BYTES_LIMIT, "setBytes takes at most 4 KB"
    return packed


HANG = "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)"


def faults_of(is_text: Callable[[str], bool], entry: str) -> dict[str, dict[str, Any]]:
    """Devices that fail on one kernel, by what must be said about it.

    Args:
        is_text: whether a text is the kernel's.
        entry: a word in the name of its entry point.
    """
    return {
        "refused by the stand-in": {"refuses_source": is_text},
        "Failed to create function state": {"refuses_pipeline": lambda name: entry in name},
        "results are off by": {"is_wrong": is_text},
        "1 of .* results are NaN": {"is_nan": is_text},
        "results are NaN or were never written": {"hangs": is_text},
        "no results came back: .*GPU Hang Error": {"hangs": is_text, "hang_message": HANG},
    }


@contextlib.contextmanager
def installed(**faults: Any) -> Iterator[Standin]:
    """Lets CPU tensors be served as MPS tensors are, by a device with the given faults."""
    if torch.backends.mps.is_available():
        pytest.skip("a stand-in would take the place of a real MPS device")
    standin = Standin(**faults)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_mps_compileShader", standin.compile, raising=False)
        patch.setattr(torch._C, "_mps_deviceSynchronize", standin.synchronize, raising=False)
        to = Tensor.to

        def copy(*args: Any, **kwargs: Any) -> Tensor:
            standin.wait()  # As copying between devices waits for the GPU.
            return to(*args, **kwargs)

        patch.setattr(Tensor, "to", copy)
        patch.setattr(torch._C, "_mps_get_name", lambda: standin.gpu, raising=False)
        patch.setattr(torch._C, "_mps_get_core_count", lambda: 8, raising=False)
        patch.setattr(platform, "mac_ver", lambda: (standin.macos, ("", "", ""), "arm64"))
        torch.backends.mps.get_name.cache_clear()
        torch.backends.mps.get_core_count.cache_clear()
        _native._forget_kernels()
        _native._pretend_mps(True)
        try:
            yield standin
        finally:
            _native._pretend_mps(False)
            _native._forget_kernels()
