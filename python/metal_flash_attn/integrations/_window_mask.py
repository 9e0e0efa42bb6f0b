"""Masks of transformers: a window that nothing else restricts is not made into a matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from typing_extensions import Self


class WindowMask(Tensor):
    """A boolean mask `[B, 1, Lq, Lk]` that is a window, causal or on both sides, and nothing else.

    Attributes:
        window: visible keys on the left and on the right of the diagonal, as flash_attn counts.

    It holds no elements. Whoever computes with it gets them, so that models which cut a mask, and
    attention functions which do not know this class, see what `sdpa_mask` would have made.
    """

    window: tuple[int, int]
    _make: Callable[[], Tensor]

    def __new__(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        window: tuple[int, int],
        make: Callable[[], Tensor],
    ) -> Self:
        """A mask of this shape; `make` makes its elements."""
        mask: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.window, mask._make = window, make
        return mask

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Computes with the elements."""
        del types
        args, kwargs = tree_map_only(cls, lambda mask: mask._make(), (args, kwargs or {}))
        return func(*args, **kwargs)


def window_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **rest: Any,
) -> Tensor | None:
    """`sdpa_mask` of transformers, but a `WindowMask` where that says all.

    The arguments are those of `sdpa_mask`. Chunks are local, too: a window is what the model's
    config calls one.
    """
    make: Callable[..., Any] = partial(
        sdpa_mask, batch_size, q_length, kv_length, config=config, device=device, **rest
    )
    skips = {
        "allow_is_causal_skip": allow_is_causal_skip,
        "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
    }
    is_window = (
        local_size is not None
        and kv_length >= local_size
        and local_size == getattr(config, "sliding_window", None)
        and local_size != getattr(config, "attention_chunk_size", None)
    )
    mask: Tensor | None
    if local_size is None or not is_window or is_compiling():
        mask = make(local_size=local_size, **skips)
        return mask
    # Without its local size it says None where nothing but the window hides a key.
    mask = make(local_size=None, **skips)
    if mask is not None:
        return mask
    # transformers counts the query itself in a causal window, and not in one of both sides.
    window = (local_size - 1, 0) if allow_is_causal_skip else (local_size, local_size)
    elements = partial(make, local_size=local_size, **dict.fromkeys(skips, False))
    shape = (batch_size, 1, q_length, kv_length)
    return WindowMask(shape, torch.device(device), window, elements)
