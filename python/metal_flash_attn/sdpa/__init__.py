"""A patch of torch's `scaled_dot_product_attention` that serves calls where it pays.

`install()` puts `scaled_dot_product_attention` of this module in the place of the function in
`torch.nn.functional`. Calls that a gate opens for are computed by this package, all others by torch
as before; `explain` tells which, and why. Values, shapes, strides, dtypes and errors are torch's.

docs/sdpa.md describes the gates and what falls through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional

from metal_flash_attn import _native

from ._call import attend, examine, raise_masked_causal
from ._gates import AlwaysOpen, CpuGates, Decision, Gates, MpsGates, Thresholds
from ._operator import STOCK, warn_of_fallback
from ._stock import version_of

__all__ = [
    "Decision",
    "explain",
    "install",
    "installed",
    "patched",
    "scaled_dot_product_attention",
    "uninstall",
]


class _Patch(NamedTuple):
    """The gates of the devices that are served."""

    mps: Gates | None
    cpu: Gates | None


class _State:
    """What is installed in this process."""

    patch: _Patch | None = None
    """None while the patch is not installed."""
    next: Any = STOCK
    """What serves the other calls: torch's function, or who patched it before."""
    wrapper: Any = None
    """Who had put a function over ours when it was uninstalled, and so still calls it."""


_state = _State()


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, *options: Any, **named: Any
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, served by this package where it pays.

    Takes its arguments, and hands those that it does not understand on to torch, for torch's error.
    """
    patch = _state.patch
    # Not one call more than needed: most calls fall through here.
    if patch is not None and type(query) is Tensor:
        gates = patch.mps if query.is_mps else patch.cpu if query.is_cpu else None
        # Tracing must not see the memory of forms: what it compiles holds for other lengths, too.
        if gates is not None and (
            is_dynamo_compiling() or not gates.shut.holds(query, key, value, options, named)
        ):
            served = _serve(gates, query, key, value, *options, **named)
            if served is not None:
                return served
    out: Tensor = _state.next(query, key, value, *options, **named)
    return out


def _serve(
    gates: Gates,
    query: Tensor,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *surplus: Any,
    scale: Any = None,
    enable_gqa: Any = False,
    **unknown: Any,
) -> Tensor | None:
    """The result of a call that is served, None for one that is not."""
    if surplus or unknown or type(key) is not Tensor or type(value) is not Tensor:
        return None
    raise_masked_causal(gates, attn_mask, is_causal)
    # fmt: off
    if is_dynamo_compiling():
        return _attend(
            gates, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    try:
        return _attend(
            gates, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    except Exception as error:  # Whatever it is, torch must serve.
        warn_of_fallback(error)
        return None
    # fmt: on


_OF_THE_FORM = frozenset({"shape", "dtype", "thresholds"})
"""Gates that decide by what `_native.ShutForms` takes for the form of a call, and nothing else."""


def _attend(
    gates: Gates,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """Like `_serve`, and may raise; remembers forms that are not served."""
    # fmt: off
    decision, call = examine(
        gates, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    # fmt: on
    if call is None:
        if decision.gate in _OF_THE_FORM and not is_dynamo_compiling():
            options = (attn_mask, dropout_p, is_causal)
            gates.shut.add(query, key, value, options, {"enable_gqa": enable_gqa})
        return None
    return attend(gates, query, key, value, attn_mask, is_causal, scale, call)


scaled_dot_product_attention.__doc__ = STOCK.__doc__


# TorchScript looks functions up by identity: a script compiled now calls torch's operator.
with contextlib.suppress(AttributeError):
    torch.jit._builtins._register_builtin(
        scaled_dot_product_attention, "aten::scaled_dot_product_attention"
    )


def install(
    min_score_gb: float | None = None,
    min_seq: int | None = None,
    fast_min_seq: int | None = None,
    *,
    cpu: bool = False,
) -> bool:
    """Puts the patch in place, for the whole process.

    Args:
        min_score_gb: GiB of scores from which the memory gate opens; `MTLFLASHATTN_SDPA_MIN_GB`
            if None.
        min_seq: longest of query and key length from which the length gate opens;
            `MTLFLASHATTN_SDPA_MIN_SEQ` if None.
        fast_min_seq: the same for the speed gate; `MTLFLASHATTN_SDPA_FAST_MIN_SEQ` if None.
        cpu: serve CPU tensors, too.

    Returns:
        Whether the patch was put in place: not if it was before, nor if `MTLFLASHATTN_SDPA` is off.
        The variables are read here and not again.
    """
    if _state.patch is not None:
        return False
    patch = _new_patch(min_score_gb, min_seq, fast_min_seq, cpu)
    if patch is None:
        return False
    current = functional.scaled_dot_product_attention
    if current is not scaled_dot_product_attention and current is not _state.wrapper:
        _state.next, _state.wrapper = current, None
        _put(scaled_dot_product_attention)
    _state.patch = patch
    return True


def uninstall() -> bool:
    """Takes the patch away.

    Returns:
        Whether there was one. If somebody has wrapped the patch since, the wrapper stays and our
        part of it hands every call on.
    """
    was_installed = _state.patch is not None
    _state.patch = None
    current = functional.scaled_dot_product_attention
    if current is scaled_dot_product_attention:
        _put(_state.next)
        _state.next = STOCK
    elif was_installed:
        _state.wrapper = current
    return was_installed


def installed() -> bool:
    """Whether the patch is in place."""
    return _state.patch is not None


@contextlib.contextmanager
def patched(
    min_score_gb: float | None = None,
    min_seq: int | None = None,
    fast_min_seq: int | None = None,
    *,
    cpu: bool = False,
) -> Iterator[None]:
    """`install` for the length of a `with` block, in all threads; see there for the arguments.

    A patch that was installed before comes back at the end of the block.
    """
    before = _state.patch
    uninstall()
    try:
        install(min_score_gb, min_seq, fast_min_seq, cpu=cpu)
        yield
    finally:
        uninstall()
        if before is not None:
            _reinstall(before)


def _reinstall(patch: _Patch) -> None:
    install()
    _state.patch = patch


def _put(function: Any) -> None:
    functional.scaled_dot_product_attention = function


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Decision:
    """What the patch would do with a call, and why.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as for
            `torch.nn.functional.scaled_dot_product_attention`.

    Returns:
        The decision of the patch that is installed, or of the one that `install()` would put in
        place. Nothing is computed.
    """
    patch = _state.patch or _new_patch(None, None, None, cpu=False)
    if patch is None:
        return Decision(False, "settings", "MTLFLASHATTN_SDPA is off")
    gates = None
    if isinstance(query, Tensor):
        gates = patch.mps if query.is_mps else patch.cpu if query.is_cpu else None
    # fmt: off
    decision, _ = examine(
        gates, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    # fmt: on
    return decision


def _new_patch(
    min_score_gb: float | None, min_seq: int | None, fast_min_seq: int | None, cpu: bool
) -> _Patch | None:
    """Gates after arguments and environment; None where the environment forbids them."""
    mode, env_min_gb, env_min_seq, env_fast_min_seq = _native.sdpa_settings()
    if mode == "off":
        return None
    thresholds = Thresholds(
        env_min_gb if min_score_gb is None else float(min_score_gb),
        env_min_seq if min_seq is None else int(min_seq),
        env_fast_min_seq if fast_min_seq is None else int(fast_min_seq),
    )
    mps = MpsGates(thresholds, version_of(torch.__version__))
    if mode == "on":
        return _Patch(AlwaysOpen(mps), AlwaysOpen(CpuGates()))
    return _Patch(mps, CpuGates() if cpu else None)
