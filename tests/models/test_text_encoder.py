"""The text encoder against StableDiffusionPipeline.encode_prompt and transformers itself."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from latentdiff.checkpoint import ModelParts
from latentdiff.errors import InputError
from latentdiff.models.text_encoder import TextEncoder

TEXTS = ["a fox", "", "A Red  APPLE, ünïcode", "rocket " * 20]


@pytest.fixture
def encoder(tiny_parts: ModelParts) -> TextEncoder:
    return tiny_parts.text_encoder


def test_equals_stable_diffusions_prompt_embeddings(encoder: TextEncoder) -> None:
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    cond, uncond = pipeline.encode_prompt(TEXTS, torch.device("cpu"), 1, True)
    ours = encoder.encode(TEXTS).hidden
    torch.testing.assert_close(ours, cond)
    torch.testing.assert_close(encoder.encode([""] * len(TEXTS)).hidden, uncond)


def test_ids_are_the_tokenizers_padded_to_its_length(encoder: TextEncoder) -> None:
    ids = encoder.tokenize(["ab", ""])
    assert ids.dtype == torch.int64
    begin, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    a, b = encoder.tokenizer.convert_tokens_to_ids(["a", "b</w>"])
    assert ids.tolist() == [[begin, a, b] + [end] * 29, [begin] + [end] * 31]


def test_what_does_not_fit_is_reported(encoder: TextEncoder) -> None:
    fits = "x" * 30  # and the begin and end tokens
    long = "a" * 30 + " Tail is  LOST "
    assert encoder.encode([fits, long, "", fits + "y"]).truncated == ["Tail is  LOST", "y"]
    assert encoder.encode([fits]).truncated == []
    assert encoder.tokenize([long]).shape == (1, 32)


def test_a_text_does_not_depend_on_its_neighbours(encoder: TextEncoder) -> None:
    alone = encoder.encode(["a fox"]).hidden[0]
    torch.testing.assert_close(encoder.encode([*TEXTS, "a fox"]).hidden[-1], alone)


def test_ids_encode_with_gradients(encoder: TextEncoder) -> None:
    hidden = encoder.encode_ids(encoder.tokenize(["a fox"]))
    assert hidden.shape == (1, 32, encoder.hidden_size)
    hidden.square().sum().backward()
    gradient = encoder.model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    encoder.zero_grad()


def test_refuses_a_tokenizer_of_another_model(encoder: TextEncoder) -> None:
    tokenizer, model = encoder.tokenizer, encoder.model
    longer = type(tokenizer)(vocab=tokenizer.get_vocab(), merges=[], model_max_length=33)
    with pytest.raises(InputError, match=r"pads to 33 tokens .* 32 positions"):
        TextEncoder(longer, model)
    vocabulary = {**tokenizer.get_vocab(), "fox</w>": 514}
    larger = type(tokenizer)(vocab=vocabulary, merges=[], model_max_length=32)
    with pytest.raises(InputError, match=r"has 515 tokens .* embeds 514"):
        TextEncoder(larger, model)
