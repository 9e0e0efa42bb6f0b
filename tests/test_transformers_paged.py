"""Generation with paged caches through the transformers adapter, against eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from metal_flash_attn import trace
from metal_flash_attn.integrations import transformers as adapter
from small_models import SMALL, gpt_oss
from torch import Tensor

LENGTHS = (5, 19, 2)
STEPS = 14


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=7))


def gemma2() -> Any:
    config = transformers.Gemma2Config(
        **SMALL, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    )
    return transformers.Gemma2ForCausalLM(config)


def prompts() -> list[list[int]]:
    return [torch.randint(1, 64, (length,)).tolist() for length in LENGTHS]


def eager_tokens(model: Any, texts: list[list[int]]) -> list[list[int]]:
    """What greedy decoding adds to each prompt, one by one, with eager attention."""
    model.set_attn_implementation("eager")
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
    return [
        model.generate(torch.tensor([text]), **options)[0, len(text) :].tolist() for text in texts
    ]


@pytest.mark.parametrize("build", [llama, mistral, gemma2])
def test_continuous_batching_gives_the_tokens_of_eager_attention(build: Any) -> None:
    torch.manual_seed(0)
    model = build().eval()
    texts = prompts()
    expected = eager_tokens(model, texts)
    adapter.use_for_continuous_batching(model)
    options = transformers.GenerationConfig(
        max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    settings = transformers.ContinuousBatchingConfig(
        page_size=16, num_blocks=64, max_batch_tokens=64
    )
    with trace() as calls:
        results = model.generate_batch(
            texts, generation_config=options, continuous_batching_config=settings
        )
    assert [result.generated_tokens for result in results.values()] == expected
    assert calls.calls


class Pages:
    """A cache of pages that hands them out with a block table, as transformers' does on a GPU."""

    def __init__(self, model: Any, requests: int) -> None:
        config = model.config
        shape = (3 * requests, 16, config.num_key_value_heads, config.head_dim)
        self.caches = [
            (torch.full(shape, torch.nan), torch.full(shape, torch.nan))
            for _ in range(config.num_hidden_layers)
        ]
        self.table = torch.randperm(3 * requests).view(requests, 3).int()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        kwargs["k_cache"], kwargs["v_cache"] = self.caches[layer_idx]
        return key_states, value_states


@pytest.mark.parametrize("build", [llama, gpt_oss])
def test_pages_with_a_block_table_give_the_tokens_of_eager_attention(build: Any) -> None:
    """Ragged requests advance by one token together, of the prompt or of their own."""
    torch.manual_seed(0)
    model = build().eval()
    texts = prompts()
    expected = eager_tokens(model, texts)
    adapter.use_for_continuous_batching(model)
    pages = Pages(model, len(texts))
    done = [list(text) for text in texts]
    for step in range(max(LENGTHS) + STEPS - 1):
        ends = torch.arange(len(texts) + 1, dtype=torch.int32) * (step + 1)
        with torch.no_grad():
            logits = model(
                torch.tensor([[text[step] for text in done]]),
                position_ids=torch.full((1, len(texts)), step),
                use_cache=False,
                cache=pages,
                block_table=pages.table,
                cu_seq_lens_q=torch.arange(len(texts) + 1, dtype=torch.int32),
                cu_seq_lens_k=ends,
                max_length_q=1,
                max_length_k=step + 1,
            ).logits[0]
        for text, scores in zip(done, logits, strict=True):
            if len(text) == step + 1:
                text.append(int(scores.argmax()))
    tokens = [text[length : length + STEPS] for text, length in zip(done, LENGTHS, strict=True)]
    assert tokens == expected
