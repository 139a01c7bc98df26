"""Captions to token ids, by every tokenizer of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentdiff.errors import InputError
from latentdiff.tokenizer_files import pack_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(
    tokenizers: Sequence[PreTrainedTokenizerBase], captions: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, towers, L] int32, padded or cut to L, and how many were cut off, [B] int64.

    The ids are those of TextEncoder.tokenize and TextEncoders.tokenize. Of several towers the one
    that cuts most is counted.
    """
    ids, cut = [], np.zeros(len(captions), dtype=np.int64)
    for tokenizer in tokenizers:
        length = tokenizer.model_max_length
        tokens = tokenizer(
            list(captions),
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=length,
            return_tensors="np",
        )
        ids.append(tokens["input_ids"].astype(np.int32))
        for row in np.flatnonzero(tokens["attention_mask"].all(axis=1)).tolist():
            whole = tokenizer(captions[row], truncation=False, verbose=False)["input_ids"]
            cut[row] = max(cut[row], len(whole) - length)
    return np.stack(ids, axis=1), cut


def tokenizers_digest(tokenizers: Sequence[PreTrainedTokenizerBase]) -> str:
    """sha256 of what token ids are a function of besides the captions.

    Raises InputError for tokenizers of different lengths.
    """
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
    if len(set(lengths)) > 1:
        raise InputError(
            f"The tokenizers pad to {' and '.join(map(str, lengths))} tokens; set one "
            "model_max_length in their tokenizer_config.json."
        )
    packed = [
        (type(tokenizer).__name__, tokenizer.pad_token_id, pack_tokenizer(tokenizer))
        for tokenizer in tokenizers
    ]
    return hashlib.sha256(json.dumps([lengths, packed], sort_keys=True).encode()).hexdigest()
