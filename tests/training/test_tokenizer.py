"""The tokenizer: every caption comes back, and any text at all can be encoded."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from latentdiff.config import load_yaml
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from training.tokenizer import train_tokenizer

LENGTH, SIZE = 32, 1024
SCENES = load_yaml(ScenesConfig, Path(__file__).parents[2] / "configs/emoji/scenes.yaml")
CAPTIONS = [EmojiScenes(SCENES).scene(index).caption for index in range(3000)]
TOKENIZER = train_tokenizer(CAPTIONS, SIZE, LENGTH)
BEGIN, END = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def encode(text: str, tokenizer: CLIPTokenizer = TOKENIZER) -> list[int]:
    ids: list[int] = tokenizer(text, padding="max_length", truncation=True)["input_ids"]
    return ids


def test_captions_come_back() -> None:
    for caption in CAPTIONS:
        ids = encode(caption)
        assert TOKENIZER.decode(ids, skip_special_tokens=True).strip() == caption.replace(",", " ,")


def test_the_layout_is_clips() -> None:
    """Begin, the text, end, and padding with the end: the two highest numbers, as in CLIP."""
    assert [len(TOKENIZER) - 2, len(TOKENIZER) - 1] == [BEGIN, END]
    assert TOKENIZER.pad_token_id == END
    assert TOKENIZER.model_max_length == LENGTH
    for caption in CAPTIONS[:200]:
        ids = encode(caption)
        words = ids[1 : ids.index(END)]
        assert ids == [BEGIN, *words, *[END] * (LENGTH - 1 - len(words))]
        assert words
        assert max(words) < BEGIN
    assert encode("") == [BEGIN, *[END] * (LENGTH - 1)]


def test_long_texts_are_cut_and_still_end() -> None:
    ids = encode("fox " * 100)
    assert len(ids) == LENGTH
    assert (ids[0], ids[-1]) == (BEGIN, END)
    assert END not in ids[:-1]


def test_every_caption_fits() -> None:
    assert all(encode(caption)[-1] == END for caption in CAPTIONS)
    assert max(encode(caption).index(END) for caption in CAPTIONS) < LENGTH - 1


def test_words_of_captions_are_single_tokens() -> None:
    words = [word for concept in SCENES.concepts for noun in concept.nouns for word in noun.split()]
    for word in {*words, *SCENES.backgrounds, "background", "left"} - {"jack-o-lantern"}:
        assert encode(word).index(END) == 2, word


@settings(deadline=None)
@given(TEXTS)
def test_any_text_can_be_encoded(text: str) -> None:
    ids = encode(text)
    assert len(ids) == LENGTH
    assert all(0 <= number < len(TOKENIZER) for number in ids)
    # The end token is also the unknown one: inside a text it would mean that bytes were lost.
    assert set(ids[ids.index(END) :]) == {END}


@pytest.mark.parametrize("text", ["quokka", "ünïcödé", "狐", "🦊", "zyx123!?", "a 🦊 on blue"])
def test_unknown_words_come_back(text: str) -> None:
    ids = encode(text)
    decoded = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_merges_are_byte_pair_encoding() -> None:
    """Sennrich et al. (2016), algorithm 1, applied by hand to each word."""
    model = json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    vocabulary = TOKENIZER.get_vocab()
    words = {word for caption in CAPTIONS for word in caption.replace(",", "").split()}
    words = {word for word in words if word.isalpha()} | {"foxglove", "backgrounds", "pandapanda"}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while pairs := [p for p in itertools.pairwise(symbols) if p in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            place = next(n for n, p in enumerate(itertools.pairwise(symbols)) if p == best)
            symbols[place : place + 2] = ["".join(best)]
        assert encode(word)[1 : 1 + len(symbols)] == [vocabulary[symbol] for symbol in symbols]
        assert encode(word)[1 + len(symbols)] == END


def test_the_size_is_bounded_and_every_byte_has_its_tokens() -> None:
    assert 514 < len(TOKENIZER) <= SIZE
    small = train_tokenizer(CAPTIONS, 600, LENGTH)
    assert 514 < len(small) <= 600
    vocabulary = TOKENIZER.get_vocab()
    letters = pre_tokenizers.ByteLevel.alphabet()
    assert len(letters) == 256
    assert {*letters, *(letter + "</w>" for letter in letters)} <= vocabulary.keys()
    assert sorted(vocabulary.values()) == list(range(len(TOKENIZER)))


def test_the_same_captions_give_the_same_tokenizer() -> None:
    again = train_tokenizer(iter(CAPTIONS), SIZE, LENGTH)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    other = train_tokenizer(CAPTIONS[:20], SIZE, LENGTH)
    assert other.get_vocab() != TOKENIZER.get_vocab()


def test_saved_it_opens_as_it_was(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == LENGTH
    for text in [*CAPTIONS[:100], "", "quokka 🦊"]:
        assert encode(text, loaded) == encode(text)
