"""A character-level transformer whose attention is an argument, and the text that it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

# q, k and v [tokens, heads, head_dim] of sequences one behind the other, and where they begin and
# end; the result has the shape of q.
Attention = Callable[[Tensor, Tensor, Tensor, "Sequences"], Tensor]


def read_documents() -> str:
    """The documentation of this repository, as one text."""
    folder = Path(__file__).parents[1] / "docs"
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md")))


@dataclass(frozen=True)
class Sequences:
    """Sequences of tokens that lie one behind the other."""

    ends: tuple[int, ...]
    """Where each ends; the first begins at 0."""
    offsets: Tensor
    """The same with the leading 0, int32."""

    @classmethod
    def of(cls, lengths: list[int]) -> Sequences:
        """Sequences of these lengths."""
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        return cls(tuple(offsets[1:].tolist()), offsets.int())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [end - start for start, end in zip((0, *self.ends), self.ends, strict=False)]

    @property
    def are_equal(self) -> bool:
        """Whether all sequences have the same length."""
        return len(set(self.lengths)) == 1


class Characters:
    """Batches of pieces of a text; the same seed gives the same batches."""

    def __init__(self, text: str, seed: int) -> None:
        """Numbers the characters of `text`."""
        alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
        self.size = len(alphabet)
        self._text = torch.tensor([alphabet[character] for character in text])
        self._random = torch.Generator().manual_seed(seed)

    def batch(self, tokens: int, longest: int, is_ragged: bool) -> tuple[Tensor, Tensor, Sequences]:
        """Tokens, the token behind each, and sequences: equal ones, or of any length."""
        lengths = [longest] * (tokens // longest)
        if is_ragged:
            lengths = []
            while sum(lengths) < tokens:
                most = min(longest, tokens - sum(lengths))
                lengths.append(int(torch.randint(1, most + 1, (), generator=self._random)))
        most = len(self._text) - longest - 1
        starts = torch.randint(most, (len(lengths),), generator=self._random).tolist()
        pieces = [
            self._text[start : start + length + 1]
            for start, length in zip(starts, lengths, strict=True)
        ]
        inputs = torch.cat([piece[:-1] for piece in pieces])
        targets = torch.cat([piece[1:] for piece in pieces])
        return inputs, targets, Sequences.of(lengths)


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    layers: int = 2
    heads: int = 4
    width: int = 96
    longest: int = 128


class Block(nn.Module):
    """Attention and a layer of its own for each token, both behind a norm."""

    def __init__(self, size: Size, attention: Attention) -> None:
        """Weights as torch draws them."""
        super().__init__()
        self.attention, self.heads = attention, size.heads
        self.norm, self.second_norm = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.up, self.down = (
            nn.Linear(size.width, 4 * size.width),
            nn.Linear(4 * size.width, size.width),
        )

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        """`x` `[tokens, width]`."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        x = x + self.out(self.attention(q, k, v, sequences).flatten(1))
        hidden = functional.gelu(self.up(self.second_norm(x)))
        out: Tensor = x + self.down(hidden)
        return out


class Model(nn.Module):
    """A causal transformer over characters."""

    def __init__(self, characters: int, size: Size, attention: Attention, seed: int) -> None:
        """The same seed gives the same weights, whatever the attention."""
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(characters, size.width)
        self.places = nn.Embedding(size.longest, size.width)
        self.blocks = nn.ModuleList(Block(size, attention) for _ in range(size.layers))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, characters)

    def forward(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """Logits of the token behind each."""
        places = torch.cat([torch.arange(length) for length in sequences.lengths])
        x = self.tokens(tokens) + self.places(places)
        for block in self.blocks:
            x = block(x, sequences)
        logits: Tensor = self.head(self.norm(x))
        return logits
