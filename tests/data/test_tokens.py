"""Captions to token ids: those that the text encoders make, by every tokenizer of a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

from latentdiff.checkpoint import ModelParts
from latentdiff.data.tokens import tokenize, tokenizers_digest
from latentdiff.errors import InputError
from latentdiff.models.text_encoder import TextEncoder, TextEncoders
from latentdiff.tokenizer_files import clip_tokenizer

CAPTIONS = ["short", "a caption of more than thirty letters, by far", "", "ein Füchschen 🦊"]


def tower(tokenizer: CLIPTokenizer) -> TextEncoder:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=8,
        eos_token_id=tokenizer.eos_token_id,
    )
    return TextEncoder(tokenizer, CLIPTextModelWithProjection(config))


def test_the_ids_of_one_tower_are_its_own(tiny_parts: ModelParts) -> None:
    encoder = tiny_parts.text_encoder
    assert isinstance(encoder, TextEncoder)
    ids, cut = tokenize([encoder.tokenizer], CAPTIONS)
    assert (ids.dtype, ids.shape) == (np.int32, (4, 1, 32))
    assert torch.from_numpy(ids[:, 0]).long().equal(encoder.tokenize(CAPTIONS))
    letters = len(CAPTIONS[1].replace(" ", ""))
    assert cut.tolist() == [0, letters + 2 - 32, 0, 0]  # a token a letter, a start and an end


def test_the_ids_of_sdxls_towers_are_theirs() -> None:
    tokenizers = [clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")]
    encoder = TextEncoders([tower(tokenizer) for tokenizer in tokenizers])
    long = " ".join(["fox"] * 100)
    ids, cut = tokenize(tokenizers, [*CAPTIONS, long])
    assert ids.shape == (5, 2, 77)
    assert torch.from_numpy(ids).long().equal(encoder.tokenize([*CAPTIONS, long]))
    assert (ids[0, 0] != ids[0, 1]).any()
    assert cut.tolist() == [0, 0, 0, 0, 100 + 2 - 77]


def test_a_caption_that_fills_the_length_is_not_cut(
    tokenizer_of: Callable[[int], CLIPTokenizer],
) -> None:
    _, cut = tokenize([tokenizer_of(8)], ["sixsix", "seven77"])
    assert cut.tolist() == [0, 1]


def test_the_digest_is_of_what_makes_the_ids(tokenizer_of: Callable[[int], CLIPTokenizer]) -> None:
    one, other = tokenizer_of(32), tokenizer_of(32)
    assert tokenizers_digest([one]) == tokenizers_digest([other])
    other.pad_token = "!"
    clip = clip_tokenizer("<|endoftext|>")
    made = [[one], [other], [one, one], [one, other], [tokenizer_of(31)], [clip]]
    assert len({tokenizers_digest(tokenizers) for tokenizers in made}) == len(made)
    before = tokenizers_digest([one])
    tokenize([one], CAPTIONS)
    assert tokenizers_digest([one]) == before
    with pytest.raises(InputError, match="pad to 32 and 31 tokens"):
        tokenizers_digest([one, tokenizer_of(31)])
