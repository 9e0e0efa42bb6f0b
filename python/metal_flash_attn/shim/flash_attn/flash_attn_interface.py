"""The functions of `flash_attn.flash_attn_interface` 2.8.3.

Besides the public functions these are the ones that other projects import from here: the forward
and backward passes as single steps, their `_wrapped_` names, small helpers, and the names of 1.x.
"""

# ruff: noqa: ARG001 (the arguments are flash_attn's, whether they are used here or not)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from metal_flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from metal_flash_attn._dropout import drops
from metal_flash_attn._native import backward_into, forward
from metal_flash_attn._ops import traced
from metal_flash_attn._probabilities import s_dmask

from ._version_1 import (
    flash_attn_unpadded_func,
    flash_attn_unpadded_kvpacked_func,
    flash_attn_unpadded_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_unpadded_func",
    "flash_attn_unpadded_kvpacked_func",
    "flash_attn_unpadded_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, copied unless the elements of its last dimension lie side by side; None stays None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """`x` rounded up to a multiple of `m`."""
    return -(-x // m) * m


def _get_block_size_n(
    device: torch.device | str, head_dim: int, is_dropout: bool, is_causal: bool
) -> int:
    """Keys per tile of flash_attn's CUDA kernels on an A100 or H100.

    Callers lay out dropout masks by it. Kernels here have tiles of their own.

    Raises:
        ValueError: `head_dim` exceeds 256.
    """
    if head_dim > 256:
        raise ValueError(f"head_dim must be at most 256, got {head_dim}")
    if head_dim <= 32:
        return 128
    if head_dim <= 64:
        return 64 if is_dropout else 128
    return 32 if is_dropout and 96 < head_dim <= 128 else 64


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_attn_func` as a single step that returns what a backward pass needs.

    The arguments mean what they mean there, the two halves of the window apart. `return_softmax`
    asks for the third result, which there is only with dropout.

    Returns:
        out `[batch, query_len, heads, head_dim]`; the log-sum-exp, fp32 `[batch, heads,
        query_len]`; S_dmask, or an empty tensor; and the state of the random numbers for the
        backward pass, int64 `[2]`: zero without dropout, else on the CPU.

    Raises:
        Whatever `flash_attn_func` raises.
    """
    # fmt: off
    call = (None, None, 0, 0, dropout_p, softmax_scale, causal,
            (window_size_left, window_size_right))
    # fmt: on
    return _forward(q, k, v, call, softcap, alibi_slopes, return_softmax)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` as a single step that returns what a backward pass needs.

    The arguments mean what they mean there, the two halves of the window apart. `return_softmax`
    asks for the third result, which there is only with dropout. `leftpad_k` and `seqused_k` must be
    None. `zero_tensors` gives queries beyond the last sequence output 0 and log-sum-exp -inf.

    Returns:
        out `[tokens, heads, head_dim]`; the log-sum-exp, fp32 `[heads, tokens]`; S_dmask, or an
        empty tensor; and the state of the random numbers, see `_flash_attn_forward`.

    Raises:
        NotImplementedError: `leftpad_k` or `seqused_k` is given.
        Whatever `flash_attn_varlen_func` raises.
    """
    for name, value in {"leftpad_k": leftpad_k, "seqused_k": seqused_k}.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} is not supported by _flash_attn_varlen_forward; pass {name}=None with "
                "keys and values packed sequence by sequence"
            )
    # fmt: off
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
            causal, (window_size_left, window_size_right))
    # fmt: on
    if block_table is not None:
        results = flash_attn_varlen_func(
            q, k, v, *call, softcap, alibi_slopes, False, True, block_table
        )
        out, softmax_lse, probabilities = results
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
    else:
        out, softmax_lse, probabilities, rng_state = _forward(
            q, k, v, call, softcap, alibi_slopes, return_softmax
        )
    if zero_tensors:
        end = int(cu_seqlens_q[-1])
        out[end:] = 0
        softmax_lse[:, end:] = -torch.inf
    return out, softmax_lse, probabilities, rng_state


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Gradients of `_flash_attn_forward`.

    out and softmax_lse may be those of more keys than k has: then the gradients are what these
    keys contribute, which is how sequence-parallel attention adds them up.

    Args:
        dout: gradient of out, `[batch, query_len, heads, head_dim]`.
        q, k, v: see `flash_attn_func`.
        out, softmax_lse: what `_flash_attn_forward` returned.
        dq, dk, dv: receive the gradients: shapes and dtypes of q, k and v, any strides whose last
            one is 1. None for one that is not wanted.
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
            alibi_slopes: as in `_flash_attn_forward`.
        deterministic: accepted; gradients are always reproducible.
        rng_state: with dropout what `_flash_attn_forward` returned last.

    Returns:
        `sum(dout * out)` of each row, fp32 `[batch, heads, query_len rounded up to 128]`, 0 behind
        the last.

    Raises:
        ValueError, TypeError: a tensor does not fit the others, or dropout has no `rng_state`.
    """
    # fmt: off
    _backward_into(
        (dq, dk, dv), (dropout_p, rng_state), dout, out, softmax_lse, q, k, v, None, None, 0, 0,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    )
    # fmt: on
    query_len = q.shape[1]
    return torch.nn.functional.pad(
        _row_sums(dout, out), (0, round_multiple(query_len, 128) - query_len)
    )


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Gradients of `_flash_attn_varlen_forward`; see `_flash_attn_backward`.

    Args:
        dout: gradient of out, `[tokens, heads, head_dim]`.
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: see
            `flash_attn_varlen_func`.
        out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
            window_size_right, softcap, alibi_slopes, deterministic, rng_state: see
            `_flash_attn_backward`. Rows of no sequence get gradients of 0.
        zero_tensors: accepted.

    Returns:
        `sum(dout * out)` of each row, fp32 `[heads, tokens + 128 * batch]`: the rows of sequence b
        begin at `cu_seqlens_q[b] + 128 * b`; 0 elsewhere.

    Raises:
        What `_flash_attn_backward` raises.
    """
    # fmt: off
    _backward_into(
        (dq, dk, dv), (dropout_p, rng_state), dout, out, softmax_lse, q, k, v, cu_seqlens_q,
        cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes,
    )
    # fmt: on
    tokens, batch = q.shape[0], cu_seqlens_q.shape[0] - 1
    token = torch.arange(tokens, device=q.device)
    begun = torch.searchsorted(cu_seqlens_q.long(), token, right=True).clamp(1, max(batch, 1))
    softmax_d = q.new_zeros((q.shape[1], tokens + 128 * batch), dtype=torch.float32)
    if batch > 0:
        softmax_d[:, token + 128 * (begun - 1)] = _row_sums(dout, out)
    return softmax_d


# flash_attn registers these as torch operators; here the public functions compile by themselves.
_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: tuple[Any, ...],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out, log-sum-exp, S_dmask and random state; `call` is what stands between v and softcap."""
    attend: Any = traced if is_dynamo_compiling() else forward
    # fmt: off
    result = attend(
        1, call[0] is not None, q, k, v, *call, softcap, alibi_slopes, None, None, None, False,
        True,
    )
    # fmt: on
    out, softmax_lse, *drawn = result
    if not drawn:
        state = torch.zeros(2, dtype=torch.int64, device=q.device)
        return out, softmax_lse, q.new_empty((0,)), state
    arguments: Any = (result, 1, q, k, *call, alibi_slopes)
    mask = s_dmask(*arguments) if return_softmax else q.new_empty((0,))
    return out, softmax_lse, mask, drawn[0]


def _backward_into(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    dropout: tuple[float, Tensor | None],
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *arguments: Any,
) -> None:
    """Writes the gradients that are given; `arguments` are the operator's up to the slopes."""
    dropout_p, rng_state = dropout
    if not drops(dropout_p):
        dropout_p, rng_state = 0.0, None
    elif rng_state is None:
        raise ValueError("rng_state is None; allowed: with dropout, what the forward pass returned")
    call = (dout, None, out, softmax_lse, *arguments, None, None, False, dropout_p, rng_state)
    if not is_dynamo_compiling():
        return backward_into(*gradients, None, None, *call)
    wanted = [gradient is not None for gradient in gradients]
    results = torch.ops.mtlflashattn.backward(*call, [*wanted, False, False])
    for gradient, result in zip(gradients, results[:3], strict=True):
        if gradient is not None:
            gradient.copy_(result)
    return None


def _row_sums(dout: Tensor, out: Tensor) -> Tensor:
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2)
