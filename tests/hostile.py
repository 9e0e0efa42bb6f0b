"""Throws strange arguments at the public functions: a script for a child interpreter.

Every call must be served, or refused with an exception that a caller may expect.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from metal_flash_attn import (
    attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_states,
    plan,
)
from metal_flash_attn.shim.flash_attn.layers import rotary
from torch import Tensor
from torch._subclasses import FakeTensorMode


class Subclass(torch.Tensor):
    """A subclass without opinions."""


def strided(shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return torch.ones(4096).as_strided(shape, stride)


def strange_tensors(plain: Tensor) -> list[Any]:
    freed = plain.clone()
    freed.untyped_storage().resize_(0)
    unaligned = torch.frombuffer(bytearray(2000), dtype=torch.float32, offset=1, count=320)
    return [
        plain,
        *(plain[:, :0], plain[:0], plain[..., :0], plain[:, :, :0]),
        *(
            plain.transpose(1, 3),
            plain.flip(1),
            plain[0],
            plain[0, 0],
            plain.view(1, 2, 5, 2, 2, 8),
        ),
        strided((1, 1, 1, 8), (2**62, 2**61, 2**60, 1)),
        strided((1, 5, 4, 8), (2**62, 32, 8, 1)),
        strided((2, 5, 4, 8), (0, 0, 0, 0)),
        strided((2, 5, 4, 8), (1, 1, 1, 1)),
        strided((2, 0, 4, 8), (2**62, 2**62, 2**62, 2**62)),
        torch.ones(1, device="meta").expand(2**20, 2**20, 2**10, 8),
        torch.ones(1).expand(1, 2**40, 1, 8)[:, :0],
        plain.to("meta"),
        FakeTensorMode().from_tensor(plain),
        plain.as_subclass(Subclass),
        torch.nn.Parameter(plain),
        torch.nn.Parameter(plain, requires_grad=False),
        freed,
        unaligned.view(2, 5, 4, 8),
        torch._efficientzerotensor((2, 5, 4, 8)),
        torch._neg_view(plain),
        *(plain.half(), plain.bfloat16(), plain.double(), plain.int(), plain.bool()),
        *(plain.to(torch.complex64), plain.to(torch.float8_e4m3fn), plain.to_sparse()),
        torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        *(plain * float("nan"), plain * float("inf"), plain * 1e38, plain * 1e-44),
        *(torch.ones(()), torch.ones(0), torch.ones(2, 5, 3, 4, 8), torch.ones(2, 5, 2, 4, 8)),
        *(None, 1, "q", [plain], object(), torch.float32, torch.ones, Subclass),
    ]


def strange_offsets() -> list[Any]:
    values: list[list[int]] = [[0, 10], [0, 5], [1, 4], [5, 5], [0, 4, 5], [0, 2, 2, 5]]
    values += [
        [],
        [0],
        [10, 0],
        [0, 2**31 - 1, 5],
        [-(2**31), 5],
        [0, 4, 4, 11],
        [9, 3, 7],
        [-1, -1],
    ]
    offsets: list[Any] = [torch.tensor(value, dtype=torch.int32) for value in values]
    offsets += [torch.tensor([0, 5]), torch.ones(2), torch.ones(2, 2, dtype=torch.int32)]
    offsets += [torch.ones(1, dtype=torch.int32).expand(3), offsets[4].to("meta"), None, [0, 5]]
    return offsets


def strange_tables() -> list[Any]:
    """What could be a block table of two sequences."""
    most, least = 2**31 - 1, -(2**31)
    values = [
        [[0, 1], [2, 3]],
        [[0, 0], [0, 0]],
        [[3, 4], [-1, 0]],
        [[most, 0], [least, 1]],
        [[0, 1]],
    ]
    tables: list[Any] = [torch.tensor(value, dtype=torch.int32) for value in values]
    tables += [tables[0].long(), tables[0].flip(1), tables[0].to("meta"), tables[0][:, :0]]
    tables += [
        torch.zeros(1, dtype=torch.int32).expand(2, 2**20),
        tables[0].t(),
        tables[0][..., None],
    ]
    return [*tables, None, [[0, 1], [2, 3]], "t"]


def strange_extras() -> list[Any]:
    """What could be slopes, biases, masks or sinks."""
    extras: list[Any] = [torch.ones(shape) for shape in [(4,), (2, 4), (), (5, 5), (2, 4, 5, 5)]]
    extras += [
        torch.ones(5, 5, dtype=torch.bool),
        torch.ones(4).half(),
        torch.ones(4, device="meta"),
    ]
    return [*extras, torch.ones(2**20).expand(4, 2**20), torch.ones(8)[::2], 3, "x"]


NUMBERS = [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64, 0.5, float("nan"), None, "1"]
WINDOWS = [(0, 0), (2**63 - 1, 2**63 - 1), (-(2**63), 2**62), [3, 1], (), None, 7, "ab"]


class Attempts:
    """Makes calls and counts what became of them."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def __call__(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            call(*arguments, **options)
        except (TypeError, ValueError, NotImplementedError):
            self.outcomes["refused"] += 1
        except AssertionError as error:
            # Torch's own answer to plain tensors among fake ones.
            if "FakeTensor" not in str(error):
                raise
            self.outcomes["refused"] += 1
        else:
            self.outcomes["served"] += 1


def survive(seed: int, rounds: int = 1000) -> None:
    """Makes hundreds of calls, and `rounds` times three after `seed`; says so at the end."""
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    chance = random.Random(seed)  # noqa: S311
    attempt = Attempts()
    plain = torch.randn(2, 5, 4, 8)
    tensors = strange_tensors(plain)
    for tensor in tensors:
        attempt(flash_attn_func, tensor, tensor, tensor)
        attempt(flash_attn_func, plain, tensor, tensor)
        attempt(flash_attn_func, tensor, plain, plain)
        attempt(flash_attn_func, plain, plain, tensor, causal=True)
        attempt(flash_attn_qkvpacked_func, tensor)
        attempt(flash_attn_kvpacked_func, plain, tensor)
        attempt(plan, tensor, tensor, tensor)
    for _ in range(rounds):
        attempt(flash_attn_func, *_mixed(chance, tensors), **_options(chance))
        extras = [_sometimes(chance, strange_extras()) for _ in range(3)]
        names = ("bias", "mask", "sinks")
        attempt(attention, *_mixed(chance, tensors), **dict(zip(names, extras, strict=True)))
        q, k, v = (_first_sequence(tensor) for tensor in _mixed(chance, tensors))
        lengths: list[Any] = [*chance.choices(strange_offsets()[:6], k=2), 10, 10]
        lengths[chance.randrange(4)] = chance.choice([*strange_offsets(), *NUMBERS])
        attempt(flash_attn_varlen_func, q, k, v, *lengths, **_options(chance))
        _call_caches(chance, attempt, tensors)
        _call_rotary(chance, attempt, tensors)
        _call_merge(chance, attempt, tensors)
    assert min(attempt.outcomes.values()) > 0.3 * rounds, attempt.outcomes
    print("survived", dict(attempt.outcomes))


def _call_caches(chance: random.Random, attempt: Attempts, tensors: Sequence[Any]) -> None:
    """Calls with a cache, mostly with one strange argument. What is refused writes nothing."""
    paged = chance.random() < 0.5
    k_cache, v_cache = torch.ones(2, 5 if paged else 4, 20 - 4 * paged, 2, 8)
    new = torch.randn(2, 2, 2, 8) if chance.random() < 0.7 else None
    angles = torch.randn(40, 4) if new is not None and chance.random() < 0.5 else None
    arguments: dict[str, Any] = {"q": torch.randn(2, 3, 4, 8)}
    arguments |= {"k_cache": k_cache, "v_cache": v_cache, "k": new, "v": new}
    arguments |= {"rotary_cos": angles, "rotary_sin": angles, "causal": chance.random() < 0.5}
    arguments["cache_seqlens"] = torch.tensor([5, 9], dtype=torch.int32)
    which = "block_table" if paged else "cache_batch_idx"
    arguments[which] = torch.tensor([[0, 1], [2, 3]] if paged else [3, 1], dtype=torch.int32)
    integers = [*strange_offsets(), *NUMBERS]
    strange: dict[str, Sequence[Any]] = {
        **dict.fromkeys(("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin"), tensors),
        **dict.fromkeys(("cache_seqlens", "cache_batch_idx", "cache_leftpad"), integers),
        "block_table": strange_tables(),
        "alibi_slopes": strange_extras(),
        "window_size": WINDOWS,
        **dict.fromkeys(("num_splits", "softcap", "softmax_scale"), NUMBERS),
    }
    for name in chance.choices(list(strange), k=chance.choice([0, 1, 1, 1, 2])):
        arguments[name] = chance.choice(strange[name])
    refused = attempt.outcomes["refused"]
    attempt(flash_attn_with_kvcache, **arguments)
    if attempt.outcomes["refused"] > refused:
        assert torch.cat([k_cache, v_cache]).eq(1).all(), arguments
    q, k, v = _first_sequence(arguments["q"]), arguments["k_cache"], arguments["v_cache"]
    lengths: list[Any] = [
        torch.tensor(value, dtype=torch.int32) for value in ([0, 2, 3], [0, 20, 32])
    ]
    lengths += [3, 20]
    if chance.random() < 0.3:
        lengths[chance.randrange(4)] = chance.choice(integers)
    table = arguments.get("block_table", chance.choice(strange_tables()))
    attempt(flash_attn_varlen_func, q, k, v, *lengths, block_table=table, **_options(chance))


def _call_rotary(chance: random.Random, attempt: Attempts, tensors: Sequence[Any]) -> None:
    """Rotations with mostly one strange argument."""
    table = torch.randn(16, 4)
    shape = chance.choice([(2, 5, 4, 8), (2, 5, 3, 4, 8), (2, 5, 2, 4, 8)])
    packed: dict[int, Callable[..., Any]]
    packed = {3: rotary.apply_rotary_emb_qkv_, 2: rotary.apply_rotary_emb_kv_}
    call = packed.get(shape[2], rotary.apply_rotary_emb)
    arguments: list[Any] = [torch.randn(shape), table, table]
    options: dict[str, Any] = {"interleaved": chance.choice([True, False, None])}
    if chance.random() < 0.7:
        arguments[chance.randrange(3)] = chance.choice(tensors)
    if chance.random() < 0.3:
        options["seqlen_offsets"] = chance.choice([*strange_offsets(), *NUMBERS])
    if shape[2] not in packed:
        options["inplace"] = chance.choice([True, False])
        if chance.random() < 0.3:
            arguments[0] = _first_sequence(arguments[0])
            options["cu_seqlens"] = chance.choice(strange_offsets())
            options["max_seqlen"] = chance.choice([5, 5, *NUMBERS])
    attempt(call, *arguments, **options)
    module = rotary.RotaryEmbedding(chance.choice([8, 4, 16]), interleaved=chance.random() < 0.5)
    attempt(module, arguments[0], max_seqlen=chance.choice([None, 5, *NUMBERS[:3], 0.5]))


def _call_merge(chance: random.Random, attempt: Attempts, tensors: Sequence[Any]) -> None:
    """Merges with mostly one strange argument."""
    parts = zip(torch.randn(2, 2, 5, 4, 8), torch.randn(2, 2, 4, 5), strict=True)
    arguments: list[Any] = [tensor for part in parts for tensor in part]
    if chance.random() < 0.7:
        arguments[chance.randrange(4)] = chance.choice([*tensors, *strange_extras()])
    attempt(merge_states, *arguments)


def _mixed(chance: random.Random, tensors: Sequence[Any]) -> list[Any]:
    """q, k and v that fit together more often than not."""
    first = chance.choice(tensors)
    return [first, *(first if chance.random() < 0.8 else chance.choice(tensors) for _ in "kv")]


def _options(chance: random.Random) -> dict[str, Any]:
    """Mostly one strange option at a time: of many, only the first would matter."""
    options: dict[str, Any] = {"causal": chance.choice([True, False])}
    strange: dict[str, Sequence[Any]] = {
        "causal": [None, 2, "x"],
        "window_size": WINDOWS,
        "softcap": NUMBERS,
        "softmax_scale": NUMBERS,
        "alibi_slopes": strange_extras(),
        "dropout_p": NUMBERS,
        "return_attn_probs": [True, 1, None],
    }
    for name, values in strange.items():
        if chance.random() < 0.07:
            options[name] = chance.choice(values)
    return options


def _sometimes(chance: random.Random, values: Sequence[Any]) -> Any:
    return chance.choice(values) if chance.random() < 0.2 else None


def _first_sequence(tensor: Any) -> Any:
    try:
        return tensor[0] if tensor.dim() == 4 else tensor
    except Exception:
        return tensor
