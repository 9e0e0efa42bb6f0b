"""A BERT encoder written against the flash_attn package, as projects on CUDA write theirs.

It knows nothing of metal_flash_attn: whatever `import flash_attn` finds serves its attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from flash_attn import flash_attn_varlen_qkvpacked_func
from flash_attn.bert_padding import pad_input, unpad_input
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Config:
    """Sizes of the network, under the names of BERT's config.json."""

    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    layer_norm_eps: float


class Layer(nn.Module):
    """Self-attention and a two-layer perceptron, each followed by residual and LayerNorm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.head_count = config.num_attention_heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.projection = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.up = nn.Linear(hidden, intermediate)
        self.down = nn.Linear(intermediate, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
        """x: `[tokens, hidden]`, the sequences end to end."""
        qkv = self.qkv(x).unflatten(-1, (3, self.head_count, -1))
        attention = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest)
        x = self.attention_norm(x + self.projection(attention.flatten(1)))
        output: torch.Tensor = self.output_norm(x + self.down(nn.functional.gelu(self.up(x))))
        return output


class FlashBert(nn.Module):
    """BERT without its pooler; padding is taken out before the first layer, put back at the end."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segments = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids and padding mask `[batch, tokens]` -> hidden states `[batch, tokens, hidden]`.

        Every token counts as part of the first segment.
        """
        batch, token_count = input_ids.shape
        positions = self.positions.weight[:token_count]
        x = self.norm(self.words(input_ids) + positions + self.segments.weight[0])
        x, indices, cu_seqlens, longest, *_ = unpad_input(x, attention_mask)
        for layer in self.layers:
            x = layer(x, cu_seqlens, longest)
        padded: torch.Tensor = pad_input(x, indices, batch, token_count)
        return padded


_EMBEDDING_NAMES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
_LAYER_NAMES = {
    "projection": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}


def load(config: Config, checkpoint: Mapping[str, torch.Tensor]) -> FlashBert:
    """The encoder with a BERT checkpoint's weights; query, key and value become one projection."""
    model = FlashBert(config).eval()
    weights = {}
    for name in model.state_dict():
        module, _, parameter = name.rpartition(".")
        if module in _EMBEDDING_NAMES:
            weights[name] = checkpoint[f"{_EMBEDDING_NAMES[module]}.{parameter}"]
            continue
        _, index, part = module.split(".")
        layer = f"encoder.layer.{index}"
        if part == "qkv":
            parts = [f"{layer}.attention.self.{x}.{parameter}" for x in ("query", "key", "value")]
            weights[name] = torch.cat([checkpoint[x] for x in parts])
        else:
            weights[name] = checkpoint[f"{layer}.{_LAYER_NAMES[part]}.{parameter}"]
    model.load_state_dict(weights)
    return model
