"""llama.cpp's CPU flash attention, from a ggml library that the user has built.

Nothing of ggml is part of this project: the library is loaded from the path that `--llama` names,
and called by its public interface (ggml.h, ggml-backend.h and ggml-cpu.h of llama.cpp).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""Numbers of `enum ggml_type`."""
SUCCESS = 0
OBJECTS_BYTES = 1 << 20
"""Room for the descriptions of a few tensors and one graph; the data stays where it is."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_new_tensor_4d": (c_void_p, [c_void_p, c_int] + 4 * [c_int64]),
    "ggml_permute": (c_void_p, 2 * [c_void_p] + 4 * [c_int]),
    "ggml_flash_attn_ext": (c_void_p, 5 * [c_void_p] + 3 * [c_float]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, 2 * [c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_tensor_alloc": (c_int, 3 * [c_void_p]),
    "ggml_backend_graph_compute": (c_int, 2 * [c_void_p]),
}


class Ggml:
    """A loaded ggml library and its CPU backend, on one thread."""

    def __init__(self, path: str) -> None:
        """Loads `path`.

        Raises:
            ValueError: there is no such file, or it is no ggml library with a CPU backend.
        """
        if not Path(path).is_file():
            raise ValueError(f"--llama: no file {path!r}; expected libggml.so of a build")
        library = ctypes.CDLL(str(Path(path).resolve()))
        for name, (result, parameters) in SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise ValueError(
                    f"--llama: {path!r} has no {name}; expected libggml.so with a CPU backend"
                ) from None
            function.restype, function.argtypes = result, parameters
        self._library = library
        self._backend = library.ggml_backend_cpu_init()
        library.ggml_backend_cpu_set_n_threads(self._backend, 1)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Callable[[], Tensor]:
        """A call of `ggml_flash_attn_ext` for one query against the first `length` keys.

        Args:
            q: `[1, 1, query_heads, head_dim]`; ggml takes it in float32.
            k: `[1, length or more, key_heads, head_dim]`, float32, float16 or bfloat16, contiguous.
            v: like `k`.
            length: keys to attend to.

        Returns:
            A function that computes attention and returns `[1, 1, query_heads, head_dim]`, float32.
        """
        library = self._library
        context = library.ggml_init(_InitParams(OBJECTS_BYTES, None, True))
        query = q.float().contiguous()
        out = torch.empty_like(query)

        def place(tensor: int, data: Tensor) -> int:
            size = data.numel() * data.element_size()
            buffer = library.ggml_backend_cpu_buffer_from_ptr(data.data_ptr(), size)
            if library.ggml_backend_tensor_alloc(buffer, tensor, data.data_ptr()) != SUCCESS:
                raise RuntimeError("ggml did not accept a tensor's memory")
            return tensor

        def described(data: Tensor, rows: int) -> int:
            # ggml counts dimensions from the innermost; attention wants rows before heads.
            heads, dim = data.shape[2:]
            kind = TYPES[data.dtype]
            tensor = library.ggml_new_tensor_4d(context, kind, dim, heads, rows, 1)
            view: int = library.ggml_permute(context, place(tensor, data), 0, 2, 1, 3)
            return view

        inputs = [described(query, 1), described(k, length), described(v, length)]
        scale = 1 / math.sqrt(q.shape[-1])
        result = library.ggml_flash_attn_ext(context, *inputs, None, scale, 0.0, 0.0)
        place(result, out)
        graph = library.ggml_new_graph(context)
        library.ggml_build_forward_expand(graph, result)
        kept = (query, k, v)

        def call() -> Tensor:
            assert kept
            if library.ggml_backend_graph_compute(self._backend, graph) != SUCCESS:
                raise RuntimeError("ggml did not compute the graph")
            return out

        return call


def largest_error(q: Tensor, k: Tensor, v: Tensor, theirs: Tensor, ours: Tensor) -> float:
    """The largest distance of the two outputs as a share of what rounding can account for.

    Both sum products of length `head_dim` and `keys` in any order, so that a score is off by
    `gamma(head_dim)` of its absolute products and a sum of values by `gamma(keys)` of theirs
    (Higham 2002, section 3.1). An error of the scores is a relative error of the weights. The unit
    roundoff is that of float32, but ggml gathers values of float16 in float16, and ours are rounded
    to the dtype once.

    Args:
        q: `[1, 1, query_heads, head_dim]`.
        k: `[1, keys, key_heads, head_dim]`.
        v: like `k`.
        theirs: `[1, 1, query_heads, head_dim]`.
        ours: like `theirs`.
    """
    keys, group = k.shape[1], q.shape[2] // k.shape[2]
    queries = q[0, 0].double().unsqueeze(1)
    key, value = (x[0].double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))

    def gamma(length: int, unit: float) -> float:
        return length * unit / (1 - length * unit)

    unit = 2.0**-24
    scale = q.shape[-1] ** -0.5
    weights = torch.softmax(scale * queries @ key.mT, -1)
    out = weights @ value
    products = scale * queries.abs() @ key.abs().mT
    # The scale, the multiplication by log2(e) and the subtraction of the maximum round, too; exp
    # and exp2 are good to 2**-21.
    score_error = gamma(q.shape[-1] + 4, unit) * products.amax(-1, keepdim=True) * 2
    weight_error = torch.expm1(2 * score_error) + 2.0**-20
    spread = weights @ value.abs() + out.abs()
    gathered = 2.0**-11 if v.dtype == torch.float16 else unit
    bound = 2 * weight_error * spread
    bound += (gamma(keys + 2, unit) + gamma(keys + 2, gathered)) * (weights @ value.abs())
    bound += torch.finfo(ours.dtype).eps / 2 * (out.abs() + bound)
    distance = (theirs[0, 0].double() - ours[0, 0].double()).abs().unsqueeze(1)
    return float((distance / bound).max())
