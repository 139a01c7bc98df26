"""A byte-pair tokenizer trained on captions, stored as a CLIPTokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"


def train_tokenizer(
    captions: Iterable[str], vocabulary_size: int, max_length: int
) -> CLIPTokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) over bytes, as CLIP has it.

    Every byte is a token, alone and at a word's end, so any text can be encoded; the merges are
    those that the captions need, at most until `vocabulary_size` tokens. Texts are padded and cut
    to `max_length` tokens, begin and end included.
    """
    shape = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix=SUFFIX))
    learner.normalizer, learner.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        BpeTrainer(
            vocab_size=vocabulary_size - len(alphabet) - 2,
            initial_alphabet=alphabet,
            end_of_word_suffix=SUFFIX,
            show_progress=False,
        ),
    )
    learned = learner.get_vocab()
    tokens = alphabet + [letter + SUFFIX for letter in alphabet]
    known = set(tokens)
    tokens += [t for t in sorted(learned, key=learned.__getitem__) if t not in known]
    tokens += [BEGIN, END]
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=max_length,
    )
