"""CLIP's bundled tokenizer against OpenAI's own code, and tokenizers of other classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import pre_tokenizers
from transformers.models.bert.tokenization_bert import BertTokenizer
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from latentdiff.checkpoint import ModelParts
from latentdiff.errors import InputError
from latentdiff.tokenizer_files import (
    check_tokenizer,
    clip_tokenizer,
    pack_tokenizer,
    read_tokenizer,
    unpack_tokenizer,
    write_tokenizer,
)

START, END = 49406, 49407
TEXTS = [
    "a photo of a cat",
    "",
    "An astronaut riding a horse, in the style of Käthe Kollwitz — 4k; it's 1920!",
    "日本の山 🏔️ don't\tstop\n\nme now",
    "<|weird|> [brackets] (weights:1.3) under_score #tag @artstation",
]


@pytest.fixture(scope="module")
def clip() -> Any:
    return clip_tokenizer("<|endoftext|>")


class TestClip:
    def test_known_ids(self, clip: Any) -> None:
        assert clip("a photo of a cat").input_ids == [START, 320, 1125, 539, 320, 2368, END]
        assert len(clip) == 49408
        assert clip.model_max_length == 77
        padded = clip(["", "cat"], padding="max_length").input_ids
        assert padded == [[START] + [END] * 76, [START, 2368] + [END] * 75]

    def test_like_openais_own(self, clip: Any) -> None:
        original = SimpleTokenizer()
        for text in TEXTS:
            assert clip(text).input_ids == [START, *original.encode(text), END]

    def test_pads_with_id_0_for_openclip(self) -> None:
        tokenizer = clip_tokenizer("!")
        ids = tokenizer("cat", padding="max_length").input_ids
        assert ids == [START, 2368, END] + [0] * 74
        assert pack_tokenizer(tokenizer) == {"pad_token": "!"}

    def test_packed_in_a_word_and_written_whole(self, clip: Any, tmp_path: Path) -> None:
        assert pack_tokenizer(clip) == {"pad_token": "<|endoftext|>"}
        write_tokenizer(clip, tmp_path / "tokenizer")
        check_tokenizer(tmp_path / "tokenizer")
        again = read_tokenizer(tmp_path / "tokenizer", "CLIPTokenizer")
        assert pack_tokenizer(again) == {"pad_token": "<|endoftext|>"}
        assert again(TEXTS).input_ids == clip(TEXTS).input_ids


def others() -> list[Any]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    bytes_ = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    return [
        T5Tokenizer(
            vocab=[*pieces, *((c, -2.0) for c in letters)], extra_ids=0, model_max_length=8
        ),
        BertTokenizer(vocab={word: n for n, word in enumerate(words)}, model_max_length=8),
        GPT2Tokenizer(
            vocab={b: n for n, b in enumerate(bytes_)},
            pad_token="<|endoftext|>",
            model_max_length=8,
        ),
    ]


@pytest.mark.parametrize("tokenizer", others(), ids=lambda tokenizer: type(tokenizer).__name__)
def test_other_classes_come_back(tokenizer: Any, tmp_path: Path) -> None:
    name = type(tokenizer).__name__
    texts = ["a fox", "", "no ends to it"]
    expected = tokenizer(texts, padding="max_length", truncation=True).input_ids
    assert len({tuple(ids) for ids in expected}) == 3
    write_tokenizer(tokenizer, tmp_path / "tokenizer")
    check_tokenizer(tmp_path / "tokenizer")
    for again in (
        read_tokenizer(tmp_path / "tokenizer", name),
        unpack_tokenizer(pack_tokenizer(tokenizer), name),
    ):
        assert type(again).__name__ == name
        assert again(texts, padding="max_length", truncation=True).input_ids == expected


def test_a_tokenizer_of_its_own_is_packed_whole(tiny_parts: ModelParts) -> None:
    packed = pack_tokenizer(tiny_parts.text_encoder.tokenizer)
    assert packed.keys() == {"tokenizer.json", "tokenizer_config.json"}
    ids = unpack_tokenizer(packed, "CLIPTokenizer")("Ünï 42").input_ids
    assert ids == tiny_parts.text_encoder.tokenizer("Ünï 42").input_ids
    with pytest.raises(InputError, match="holds no CLIPTokenizer that can be read"):
        unpack_tokenizer({**packed, "tokenizer.json": "{}"}, "CLIPTokenizer")
