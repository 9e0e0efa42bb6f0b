"""Models of Hugging Face transformers through the adapter, against their eager attention."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from metal_flash_attn import attention, trace
from metal_flash_attn.integrations import transformers as adapter
from metal_flash_attn.integrations._window_mask import WindowMask, window_mask
from small_models import SMALL, gpt_oss
from torch import Tensor


@pytest.fixture(autouse=True)
def registered() -> None:
    assert adapter.register() == adapter.NAME


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL))


def gemma2() -> Any:
    config = transformers.Gemma2Config(
        **SMALL, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    )
    return transformers.Gemma2ForCausalLM(config)


def gemma3() -> Any:
    config = transformers.Gemma3TextConfig(
        **SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    )
    return transformers.Gemma3ForCausalLM(config)


def mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=5))


CAUSAL = [llama, qwen3, gemma2, gemma3, mistral, gpt_oss]


def with_attention(build: Callable[[], Any], name: str) -> Any:
    """The same random weights whatever the attention."""
    torch.manual_seed(0)
    model = build().eval()
    # Weights that make attention matter: the initial ones are too small to tell patterns apart.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.set_attn_implementation(name)
    return model


def padded_prompts() -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    lengths = (11, 4, 8)
    ids = torch.randint(2, 64, (3, 11))
    mask = torch.stack([torch.arange(11) >= 11 - length for length in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def assert_close(got: Tensor, expected: Tensor, where: Tensor | None = None) -> None:
    """Equal up to float32 rounding through two layers of random weights."""
    if where is not None:
        got, expected = got[where.bool()], expected[where.bool()]
    scale = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("build", CAUSAL)
@torch.no_grad()
def test_logits_are_those_of_eager_attention(build: Callable[[], Any]) -> None:
    inputs = padded_prompts()
    expected = with_attention(build, "eager")(**inputs).logits
    with trace() as calls:
        got = with_attention(build, adapter.NAME)(**inputs).logits
    assert sum(entry.calls for entry in calls.calls) == 2
    assert_close(got, expected, inputs["attention_mask"])
    alone = {"input_ids": inputs["input_ids"][:1]}
    assert_close(
        with_attention(build, adapter.NAME)(**alone).logits,
        with_attention(build, "eager")(**alone).logits,
    )


@pytest.mark.parametrize(
    ("build", "cache"),
    [*((build, "dynamic") for build in CAUSAL), (llama, "static"), (gemma2, "static")],
)
@torch.no_grad()
def test_generation_gives_the_tokens_of_eager_attention(
    build: Callable[[], Any], cache: str
) -> None:
    steps = 64 if build is llama and cache == "dynamic" else 8
    options = {"max_new_tokens": steps, "do_sample": False, "cache_implementation": cache}
    inputs = padded_prompts()
    generate = {
        name: with_attention(build, name).generate(**inputs, **options, disable_compile=True)
        for name in ("eager", adapter.NAME)
    }
    assert generate["eager"].shape == (3, 11 + steps)
    assert len(set(generate["eager"][:, 11:].flatten().tolist())) > 3, (
        "the test would prove nothing"
    )
    assert torch.equal(generate["eager"], generate[adapter.NAME])


@torch.no_grad()
def test_an_encoder_with_windows_of_both_sides() -> None:
    def modernbert() -> Any:
        sizes = {k: v for k, v in SMALL.items() if k not in {"num_key_value_heads", "head_dim"}}
        kinds = ["full_attention", "sliding_attention"]
        config = transformers.ModernBertConfig(
            **sizes, local_attention=4, layer_types=kinds, cls_token_id=1, sep_token_id=1
        )
        return transformers.ModernBertModel(config)

    ids = torch.randint(2, 64, (2, 12))
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = with_attention(modernbert, "eager")(**inputs).last_hidden_state
    with trace() as calls:
        got = with_attention(modernbert, adapter.NAME)(**inputs).last_hidden_state
    assert calls.calls
    assert_close(got, expected, mask)


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SMALL), image_token_index=63,
        vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


@torch.no_grad()
def test_a_vision_language_model() -> None:
    ids = torch.cat([torch.full((1, 4), 63), torch.randint(2, 60, (1, 6))], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    models = {name: with_attention(llava, name) for name in ("eager", adapter.NAME)}
    with trace() as calls:
        got = models[adapter.NAME](**inputs).logits
    assert sum(entry.calls for entry in calls.calls) >= 3, "text and vision layers"
    assert_close(got, models["eager"](**inputs).logits)
    tokens = [
        model.generate(**inputs, max_new_tokens=8, do_sample=False) for model in models.values()
    ]
    assert torch.equal(*tokens)


@torch.no_grad()
def test_on_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = padded_prompts()
    expected = with_attention(gemma2, "eager")(**inputs).logits
    monkeypatch.setenv("MTLFLASHATTN_DEVICE", "simulator")
    with trace() as calls:
        got = with_attention(gemma2, adapter.NAME)(**inputs).logits
    assert {entry.tier for entry in calls.calls} == {"simdgroup"}
    assert_close(got, expected, inputs["attention_mask"])


@torch.no_grad()
def test_bfloat16() -> None:
    inputs = padded_prompts()
    exact = with_attention(llama, "eager")(**inputs).logits
    near = with_attention(llama, "eager").bfloat16()(**inputs).logits.float()
    got = with_attention(llama, adapter.NAME).bfloat16()(**inputs).logits.float()
    where = inputs["attention_mask"].bool()
    error, peer = ((x - exact)[where].abs().mean() for x in (got, near))
    assert error <= 1.5 * peer, "no further from float32 than eager attention is"


@pytest.mark.parametrize("build", [llama, gemma2, gpt_oss])
def test_training_gives_the_gradients_of_eager_attention(build: Callable[[], Any]) -> None:
    inputs = padded_prompts()
    # A row of padding sees other keys in eager attention: what follows it is not predicted from it.
    seen = inputs["attention_mask"]
    follows_padding = torch.nn.functional.pad(seen, (1, 0))[:, :-1] == 0
    labels = inputs["input_ids"].masked_fill((seen == 0) | follows_padding, -100)
    grads = []
    for name in ("eager", adapter.NAME):
        model = with_attention(build, name).train()
        with trace() as calls:
            model(**inputs, labels=labels).loss.backward()
        grads.append({key: x.grad for key, x in model.named_parameters() if x.grad is not None})
    assert sum(entry.calls for entry in calls.calls if entry.backward) == 2
    assert set(grads[0]) == set(grads[1])
    for key, expected in grads[0].items():
        assert_close(grads[1][key], expected)


def test_dropout_is_torchs() -> None:
    q = torch.randn(1, 4, 6, 8, requires_grad=True)
    module = torch.nn.Module()
    with trace() as calls:
        out, _ = adapter.attention_forward(module, q, q, q, None, dropout=0.5)
        out.sum().backward()
    assert not calls.calls
    with pytest.raises(NotImplementedError, match="attn_implementation='eager'"):
        adapter.attention_forward(module, q, q, q, None, dropout=0.5, softcap=2.0)


@torch.no_grad()
def test_a_position_bias_and_additive_masks() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    module = torch.nn.Module()
    bias = torch.randn(1, 4, 6, 6)
    mask = torch.rand(2, 1, 6, 6) < 0.7
    mask[..., 0] = True
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~mask, -torch.inf)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    cases: list[tuple[Any, Any, bool, Any]] = [
        (mask, bias, False, additive + bias),
        (additive, bias, False, additive + bias),
        (additive, None, False, additive),
        (None, bias, False, bias),
        (None, bias, True, bias.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)),
    ]
    for given, position_bias, causal, whole in cases:
        out, weights = adapter.attention_forward(
            module, q, k, v, given, is_causal=causal, position_bias=position_bias
        )
        assert weights is None
        torch.testing.assert_close(out.transpose(1, 2), sdpa(q, k, v, whole))


def test_what_is_not_supported_says_so() -> None:
    with pytest.raises(ValueError, match='without "flash"'):
        adapter.register("metal_flash")


@torch.no_grad()
def test_compiled_models() -> None:
    inputs = padded_prompts()
    model = with_attention(llama, adapter.NAME)
    expected = model(**inputs).logits
    torch._dynamo.reset()
    got = torch.compile(model, backend="eager")(**inputs).logits
    assert_close(got, expected, inputs["attention_mask"])


@pytest.mark.parametrize("build", [gemma2, gemma3, mistral, gpt_oss])
@torch.no_grad()
def test_windows_are_no_matrices_where_nothing_else_hides_a_key(
    build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(2, 64, (2, 13))
    expected = with_attention(build, "eager")(ids).logits
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["mask"], kwargs["window_size"]))
        return attention(*args, **kwargs)

    monkeypatch.setattr(adapter, "attention", spy)
    assert_close(with_attention(build, adapter.NAME)(ids).logits, expected)
    assert all(mask is None for mask, _ in seen)
    assert any(0 < left < 12 for _, (left, _) in seen)


@pytest.mark.parametrize("both_sides", [False, True])
def test_a_window_mask_has_the_elements_of_sdpa_mask(both_sides: bool) -> None:
    from transformers import masking_utils

    function = (
        masking_utils.sliding_window_bidirectional_mask_function(3)
        if both_sides
        else masking_utils.sliding_window_causal_mask_function(3)
    )
    options: dict[str, Any] = {
        "mask_function": function,
        "local_size": 3,
        "allow_is_causal_skip": not both_sides,
        "allow_is_bidirectional_skip": both_sides,
    }
    has_window = types.SimpleNamespace(sliding_window=3)
    mask = window_mask(2, 7, 7, config=has_window, **options)
    expected = masking_utils.sdpa_mask(2, 7, 7, **options)
    assert isinstance(mask, WindowMask)
    assert expected is not None
    assert mask.shape == expected.shape
    assert mask.dtype == torch.bool
    assert torch.equal(mask[:, :, 2:], expected[:, :, 2:])
    zeros = torch.zeros(2, 7, 1, 4)
    q = torch.randn(2, 7, 1, 4)
    one_hot = torch.eye(7).view(1, 7, 1, 7).expand(2, -1, -1, -1)
    weights = attention(q, zeros, one_hot, window_size=mask.window)
    assert torch.equal(weights[:, :, 0] > 0, expected[:, 0])
    # What is not a window and nothing else is a mask.
    padding = torch.tensor([[True] * 7, [False] + [True] * 6])
    chunked = types.SimpleNamespace(sliding_window=3, attention_chunk_size=3)
    for other in (
        window_mask(2, 7, 7, config=has_window, attention_mask=padding, **options),
        window_mask(2, 7, 7, config=chunked, **options),
        window_mask(2, 7, 7, config=has_window, **{**options, "allow_is_causal_skip": False,
                                                  "allow_is_bidirectional_skip": False}),
    ):  # fmt: skip
        assert type(other) is Tensor


@torch.no_grad()
def test_models_that_do_not_name_their_window_have_it_nevertheless() -> None:
    """Qwen2-MoE makes masks with windows and does not pass the window to its attention."""

    def qwen2_moe() -> Any:
        config = transformers.Qwen2MoeConfig(
            **{**SMALL, "num_hidden_layers": 2},
            use_sliding_window=True, sliding_window=4, max_window_layers=0, num_experts=2,
            moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=1,
        )  # fmt: skip
        return transformers.Qwen2MoeForCausalLM(config)

    ids = torch.randint(2, 64, (1, 12))
    near = with_attention(qwen2_moe, "eager")(ids).logits
    assert_close(with_attention(qwen2_moe, adapter.NAME)(ids).logits, near)


@torch.no_grad()
def test_generation_on_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = padded_prompts()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = with_attention(llama, "eager").generate(**inputs, **options)
    model = with_attention(llama, adapter.NAME)
    monkeypatch.setenv("MTLFLASHATTN_DEVICE", "simulator")
    with trace() as calls:
        got = model.generate(**inputs, **options)
    assert torch.equal(got, expected)
    assert "cpu" not in {entry.tier for entry in calls.calls}
