"""Dropout: random states, and which weights one drops, in torch operations.

The rule is that of crates/core/src/dropout.rs, to the bit: Philox 4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011) turns (group of 8 keys, query, head, offset) and the seed
into 16 bits for each key.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

GROUP = 8
"""Keys that one call of the generator serves."""

_RANGE = 1 << 16
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# What a call adds to the offset of a Philox generator, which torch wants to be a multiple of 4.
_STEP = 4


class Dropout(NamedTuple):
    """What a call drops."""

    threshold: int
    """The 16 bits of a dropped key are below this."""
    factor: float
    """What kept weights are multiplied by."""
    seed: int | Tensor
    """64 bits."""
    offset: int | Tensor
    """64 bits."""


def drops(dropout_p: float) -> bool:
    """Whether any weight is dropped; also for what is no probability, which others refuse."""
    return not 0 <= dropout_p * _RANGE < 0.5


def threshold(dropout_p: float) -> int:
    """`dropout_p` in steps of 2^-16, below 1; 0 where nothing is dropped."""
    return min(int(dropout_p * _RANGE + 0.5), _RANGE - 1)


def draw(device: torch.device) -> Tensor:
    """A random state, int64 `[2]` on the CPU: seed and offset, each read as 64 bits.

    A Philox generator (MPS, CUDA) gives its seed and its offset, which advances. Other devices, and
    devices without a generator, take both numbers from the CPU's.
    """
    generator = _generator(device)
    if generator is None:
        return torch.empty(2, dtype=torch.int64, device="cpu").random_()
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + _STEP)
    return torch.tensor([_signed(seed), _signed(offset)], dtype=torch.int64, device="cpu")


def _generator(device: torch.device) -> torch.Generator | None:
    """The default generator of a device if it counts calls."""
    if device.type == "mps" and torch.backends.mps.is_available():
        return torch.mps._get_default_mps_generator()
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return None


def _signed(number: int) -> int:
    number %= 1 << 64
    return number - (1 << 64) if number >> 63 else number


def factors(
    dropout: Dropout, heads: range, rows: slice, keys: slice, device: torch.device
) -> Tensor:
    """What weights are multiplied by, float32 `[heads, rows, keys]`.

    Args:
        dropout: what is dropped.
        heads: `sequence * query_heads + head` of each.
        rows, keys: positions in the sequence.
        device: where the result is made.
    """
    first, last = keys.start // GROUP, -(-keys.stop // GROUP)
    groups = torch.arange(first, last, device=device)
    queries = torch.arange(rows.start, rows.stop, device=device)[:, None]
    all_heads = torch.arange(heads.start, heads.stop, device=device)[:, None, None] & _WORD
    seed, offset = dropout.seed, dropout.offset
    key = (seed & _WORD, ((seed >> 32) ^ (offset >> 32)) & _WORD)
    shape = (len(heads), rows.stop - rows.start, last - first)
    words = _philox(
        (groups.expand(shape), queries.expand(shape), all_heads.expand(shape), offset & _WORD), key
    )
    halves = [half for word in words for half in (word & (_RANGE - 1), word >> 16)]
    bits = torch.stack(halves, -1).flatten(-2)
    bits = bits[..., keys.start - first * GROUP : keys.stop - first * GROUP]
    return (bits >= dropout.threshold).float() * dropout.factor


def _philox(
    counter: tuple[Tensor, Tensor, Tensor, Any], key: tuple[Any, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words; all words are int64 below 2^32."""
    zero, one, two, three = counter
    for _ in range(_ROUNDS):
        # Products wrap around in 64 bits, of which both halves are as if unsigned.
        left, right = _MULTIPLIERS[0] * zero, _MULTIPLIERS[1] * two
        zero, one, two, three = (
            ((right >> 32) & _WORD) ^ one ^ key[0],
            right & _WORD,
            ((left >> 32) & _WORD) ^ three ^ key[1],
            left & _WORD,
        )
        key = ((key[0] + _INCREMENTS[0]) & _WORD, (key[1] + _INCREMENTS[1]) & _WORD)
    return zero, one, two, three
