"""The same training with stock attention and with ours, step by step in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from characters import Attention, Characters, Model, Sequences, Size
from metal_flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

MOST_NOISE = 4.0
"""Our largest difference from stock, in units of the largest between stock's two: all three are one
draw each from the same distribution, whose scale one draw tells to within a small factor."""


def stock(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Stock attention, one call for equal sequences, one for each of ragged ones."""
    attend = functional.scaled_dot_product_attention
    if sequences.are_equal:
        q, k, v = (t.unflatten(0, (-1, sequences.lengths[0])).transpose(1, 2) for t in (q, k, v))
        return attend(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    parts = zip(*(t.split(sequences.lengths, 1) for t in (q, k, v)), strict=True)
    out = torch.cat([attend(q, k, v, is_causal=True) for q, k, v in parts], 1)
    return out.transpose(0, 1)


def stock_math(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """The same as single operations of torch."""
    with sdpa_kernel(SDPBackend.MATH):
        return stock(q, k, v, sequences)


def ours(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """One call for all sequences."""
    out: Tensor
    if sequences.are_equal:
        q, k, v = (t.unflatten(0, (-1, sequences.lengths[0])) for t in (q, k, v))
        out = flash_attn_func(q, k, v, causal=True)
        return out.flatten(0, 1)
    longest, offsets = max(sequences.lengths), sequences.offsets
    out = flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=True)
    return out


ATTENTIONS: dict[str, Attention] = {"stock": stock, "stock, math": stock_math, "ours": ours}


@dataclass(frozen=True)
class Setting:
    """What the models of one comparison share."""

    dtype: torch.dtype
    is_ragged: bool

    def __str__(self) -> str:
        kind = "varlen, packed" if self.is_ragged else "dense"
        return f"{str(self.dtype).removeprefix('torch.')}, {kind}"


SETTINGS = [
    Setting(dtype, ragged) for dtype in (torch.float32, torch.bfloat16) for ragged in (False, True)
]


@dataclass
class Curve:
    """What became of one model."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def distances(self, other: Curve) -> list[float]:
        """How far the losses are apart, step by step."""
        return [abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)]


@dataclass(frozen=True)
class Plan:
    """How much is trained."""

    steps: int
    tokens: int = 1024
    size: Size = field(default_factory=Size)
    seed: int = 0


class Learner:
    """A model with its optimiser."""

    def __init__(self, model: Model, steps: int) -> None:
        """Adam with a learning rate that rises, then falls."""
        self.model = model
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
        warm_up = max(1, steps // 10)

        def rate(step: int) -> float:
            return min((step + 1) / warm_up, max(0.1, 1 - step / steps))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, rate)
        self.curve = Curve()

    def step(
        self, dtype: torch.dtype, inputs: Tensor, targets: Tensor, sequences: Sequences
    ) -> None:
        """One step, timed. In bfloat16 autocast rounds what linear layers and attention take."""
        since = time.perf_counter()
        rounded = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
        with rounded:
            logits = self.model(inputs, sequences)
        loss = functional.cross_entropy(logits.float(), targets)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.curve.losses.append(loss.item())
        self.curve.seconds.append(time.perf_counter() - since)


def compare(
    setting: Setting,
    plan: Plan,
    text: str,
    attentions: dict[str, Attention] = ATTENTIONS,
    after_step: Callable[[], object] = lambda: None,
) -> dict[str, Curve]:
    """Trains a model with each attention; all see the same batches, in turn."""
    characters = Characters(text, plan.seed)
    learners = {
        name: Learner(Model(characters.size, plan.size, attention, plan.seed), plan.steps)
        for name, attention in attentions.items()
    }
    for _ in range(plan.steps):
        batch = characters.batch(plan.tokens, plan.size.longest, setting.is_ragged)
        for learner in learners.values():
            learner.step(setting.dtype, *batch)
        after_step()
    return {name: learner.curve for name, learner in learners.items()}


def noise_ratio(curves: dict[str, Curve]) -> float:
    """Our largest distance from stock in units of that between stock's two implementations.

    That one is not taken for less than a few roundings of the loss, a mean in float32.
    """
    roundings = 4 * torch.finfo(torch.float32).eps * max(curves["stock"].losses)
    noise = max(roundings, *curves["stock, math"].distances(curves["stock"]))
    return max(curves["ours"].distances(curves["stock"])) / noise
