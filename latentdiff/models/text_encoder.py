"""Prompts and captions to the embeddings that the U-Net attends to (transformers' CLIP inside)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from latentdiff.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding, CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class TextEmbeddings:
    """A batch of B encoded texts."""

    hidden: Tensor
    """[B, L, D] last hidden state, after the final layer norm."""
    ids: Tensor
    """[B, L] int64 token ids."""
    truncated: list[str]
    """The ends that did not fit into L tokens, one for each text that was too long."""


class TextEncoder(nn.Module):
    """CLIP's text tower, used as StableDiffusionPipeline uses it: no attention mask, every text
    padded to L = `tokenizer.model_max_length` tokens.

    Args:
        tokenizer: byte-pair tokenizer with its begin, end and padding tokens set.
        model: the text tower; D = `model.config.hidden_size`.

    Raises:
        InputError: the tokenizer makes more tokens, or longer texts, than the tower has
            embeddings for.
    """

    def __init__(self, tokenizer: CLIPTokenizer, model: CLIPTextModel) -> None:
        super().__init__()
        config = model.config
        if tokenizer.model_max_length > config.max_position_embeddings:
            raise InputError(
                f"The tokenizer pads to {tokenizer.model_max_length} tokens but the text encoder "
                f"has {config.max_position_embeddings} positions; set model_max_length in "
                "tokenizer_config.json."
            )
        if len(tokenizer) > config.vocab_size:
            raise InputError(
                f"The tokenizer has {len(tokenizer)} tokens but the text encoder embeds "
                f"{config.vocab_size}; they belong to different models."
            )
        self.tokenizer = tokenizer
        self.model = model

    @property
    def max_length(self) -> int:
        """Tokens per text, begin and end tokens included."""
        return int(self.tokenizer.model_max_length)

    @property
    def hidden_size(self) -> int:
        """Width of one token's embedding."""
        return int(self.model.config.hidden_size)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, L] int64 on the CPU, padded or truncated to L."""
        return self._tokens(texts)["input_ids"]

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Hidden states [B, L, D] of token ids [B, L]; differentiable in the tower's weights."""
        return self.model(input_ids=ids.to(self.model.device)).last_hidden_state

    forward = encode_ids

    def encode(self, texts: Sequence[str]) -> TextEmbeddings:
        """Tokenize and encode B texts, reporting what was cut from those that were too long."""
        tokens = self._tokens(texts, return_offsets_mapping=True)
        ends = tokens["offset_mapping"][:, :, 1].amax(dim=1).tolist()
        full = tokens["attention_mask"].all(dim=1).tolist()
        rests = (
            text[end:].strip() for text, end, cut in zip(texts, ends, full, strict=True) if cut
        )
        ids = tokens["input_ids"]
        return TextEmbeddings(self.encode_ids(ids), ids, [rest for rest in rests if rest])

    def _tokens(self, texts: Sequence[str], return_offsets_mapping: bool = False) -> BatchEncoding:
        return self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=return_offsets_mapping,
            return_tensors="pt",
        )
