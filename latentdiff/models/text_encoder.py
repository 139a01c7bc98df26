"""Prompts and captions to the embeddings that the U-Net attends to (transformers' towers inside).

TextEncoder is one tower: CLIP's, as Stable Diffusion 1.x and 2.x have it, or T5, BERT or GPT-2 for
training from scratch. TextEncoders is SDXL's pair, or the one tower of its refiner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentdiff.errors import InputError
from latentdiff.models.prompt import chunk_tensors, emphasize, prompt_chunks

if TYPE_CHECKING:
    from transformers import (
        BatchEncoding,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

CLIP = "clip_text_model"
MODEL_TYPES = (CLIP, "t5", "bert", "gpt2")
MAX_LENGTH = 4096
"""Tokenizers that were not told a length name an enormous one."""
LEGACY_END = 2
"""Older CLIP configs, SDXL's among them, wrongly name this as the end token; transformers then
pools at the largest id of each text, which is the end token's."""


@dataclass(frozen=True)
class TextEmbeddings:
    """A batch of B encoded texts, C chunks each; L = C * max_length."""

    hidden: Tensor
    """[B, L, D] hidden states, those of SDXL's towers side by side."""
    pooled: Tensor | None
    """[B, P] projected state of the end token in each text's first chunk; None outside SDXL."""
    ids: Tensor
    """[B, L] int64 token ids; [B, N, L] of N towers."""
    truncated: list[str]
    """The ends that did not fit, one for each text that was too long for a tower other than
    CLIP's."""


class TextEncoder(nn.Module):
    """One text tower. Texts are padded to L = `tokenizer.model_max_length` tokens.

    CLIPTextModel and CLIPTextModelWithProjection are used as StableDiffusionPipeline uses them: no
    attention mask, padded with the tokenizer's own token (the end token in SD 1.x, "!" in SD 2.x).
    They read prompts of any length in chunks, with weights; see models.prompt.

    T5EncoderModel, BertModel and GPT2Model attend to a text's own tokens alone, and the hidden
    states of its padding are zero: the U-Net, which has no mask, finds nothing in them. Prompts are
    read as they are written, up to L tokens.

    Args:
        tokenizer: of the tower, with the special tokens and the padding token that it needs.
        model: the text tower; D = `model.config.hidden_size`.

    Raises:
        InputError: the tower is of another kind, or the tokenizer does not say how long a text
            may be, cannot pad, or makes more tokens or longer texts than the tower embeds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        super().__init__()
        _check_fit(tokenizer, model.config)
        self.tokenizer = tokenizer
        self.model = model

    @property
    def max_length(self) -> int:
        """Tokens per text, or per chunk of one, begin and end tokens included."""
        return int(self.tokenizer.model_max_length)

    @property
    def hidden_size(self) -> int:
        """Width of one token's embedding."""
        return int(self.model.config.hidden_size)

    @property
    def reads_chunks(self) -> bool:
        """Whether prompts may have any length and weights: CLIP's towers, none else."""
        return bool(self.model.config.model_type == CLIP)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, L] int64 on the CPU, of plain text, padded or truncated to L."""
        return self._tokens(texts)["input_ids"]

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Hidden states [B, L, D] of token ids [B, L]; differentiable in the tower's weights."""
        ids = ids.to(self.model.device)
        if self.reads_chunks:
            return self.model(input_ids=ids).last_hidden_state
        # Padding is what follows the last token that is none: GPT-2's may occur in a text.
        present = (ids != self.tokenizer.pad_token_id).flip(-1).cumsum(dim=-1).flip(-1) > 0
        hidden = self.model(input_ids=ids, attention_mask=present.long()).last_hidden_state
        return hidden.masked_fill(~present.unsqueeze(-1), 0)

    forward = encode_ids

    def chunks(self, texts: Sequence[str], *, weighted: bool = True) -> list[int]:
        """How many chunks of L tokens each text takes; 1 for towers other than CLIP's."""
        if not self.reads_chunks:
            return [1] * len(texts)
        return [len(chunks) for chunks in prompt_chunks(self.tokenizer, texts, weighted)]

    def encode(
        self,
        texts: Sequence[str],
        *,
        clip_skip: int | None = None,
        weighted: bool = True,
        chunks: int | None = None,
    ) -> TextEmbeddings:
        """Tokenize and encode B texts.

        Args:
            texts: prompts. A text's embedding does not depend on the others, except that all are
                filled up with empty chunks to the number that the longest takes.
            clip_skip: how many of CLIP's last layers to leave out before the final layer norm, as
                diffusers counts them: 1 is the penultimate layer (A1111's "Clip skip: 2").
            weighted: read A1111's syntax (models.prompt); without it every character is text.
            chunks: the number of chunks to fill up to.

        Raises:
            InputError: a text takes more than `chunks`, the tower has too few layers for
                `clip_skip`, or one of the two is asked of a tower other than CLIP's.
        """
        if not self.reads_chunks:
            if clip_skip or chunks not in (None, 1):
                raise InputError(
                    f"clip_skip and chunks are of CLIP; this text encoder is "
                    f"{type(self.model).__name__}; leave them out."
                )
            return self._encode_cut(texts)
        prompts = prompt_chunks(self.tokenizer, texts, weighted)
        ids, weights = chunk_tensors(self.tokenizer, prompts, chunks)
        hidden = self._skipping(ids.flatten(0, 1), clip_skip)
        hidden = emphasize(hidden.unflatten(0, ids.shape[:2]), weights)
        return TextEmbeddings(hidden.flatten(1, 2), None, ids.flatten(1), [])

    def penultimate(
        self, ids: Tensor, clip_skip: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What SDXL takes of a CLIP tower and ids [B, L].

        Hidden states [B, L, D] after the layer before the last, or `clip_skip` layers earlier,
        without the final layer norm; and the end token's state after all layers, projected
        [B, P], None for a tower without a projection.
        """
        skip = self._checked_skip(clip_skip, kept=2)
        output = self.model(input_ids=ids.to(self.model.device), output_hidden_states=True)
        hidden = output.hidden_states[-(skip + 2)]
        return hidden, getattr(output, "text_embeds", None)

    def _skipping(self, ids: Tensor, clip_skip: int | None) -> Tensor:
        """Hidden states [B, L, D] of ids [B, L] without the last `clip_skip` layers."""
        skip = self._checked_skip(clip_skip, kept=1)
        if skip == 0:
            return self.encode_ids(ids)
        output = self.model(input_ids=ids.to(self.model.device), output_hidden_states=True)
        tower: Any = getattr(self.model, "text_model", self.model)
        return tower.final_layer_norm(output.hidden_states[-(skip + 1)])

    def check_clip_skip(self, clip_skip: int | None) -> None:
        """Raises InputError where encode would."""
        if clip_skip and not self.reads_chunks:
            raise InputError(
                f"clip_skip is of CLIP; this text encoder is {type(self.model).__name__}; leave it "
                "out."
            )
        if clip_skip:
            self._checked_skip(clip_skip, kept=1)

    def _checked_skip(self, clip_skip: int | None, kept: int) -> int:
        skip, most = clip_skip or 0, self.model.config.num_hidden_layers - kept
        if not 0 <= skip <= most:
            raise InputError(f"clip_skip must be from 0 to {most} for this model, not {skip}.")
        return skip

    def _encode_cut(self, texts: Sequence[str]) -> TextEmbeddings:
        """Encode the first L tokens of B texts, reporting the rest."""
        tokens = self._tokens(texts, return_offsets_mapping=True)
        ends = tokens["offset_mapping"][:, :, 1].amax(dim=1).tolist()
        full = tokens["attention_mask"].all(dim=1).tolist()
        rests = (
            text[end:].strip() for text, end, cut in zip(texts, ends, full, strict=True) if cut
        )
        ids = tokens["input_ids"]
        return TextEmbeddings(self.encode_ids(ids), None, ids, [rest for rest in rests if rest])

    def _tokens(self, texts: Sequence[str], return_offsets_mapping: bool = False) -> BatchEncoding:
        return self.tokenizer(
            list(texts),
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=return_offsets_mapping,
            return_tensors="pt",
        )


class TextEncoders(nn.Module):
    """SDXL's CLIP towers, used as StableDiffusionXLPipeline uses them: penultimate hidden states,
    side by side, and the pooled state of the last tower. The refiner has the last tower alone.

    Args:
        towers: in the order of text_encoder and text_encoder_2; the last is a
            CLIPTextModelWithProjection. D is the sum of their widths.

    Raises:
        InputError: a tower is not CLIP's, the last has no projection, they read texts of different
            lengths, or the last looks for an end token that its tokenizer does not make.
    """

    def __init__(self, towers: Sequence[TextEncoder]) -> None:
        super().__init__()
        if not towers or not all(tower.reads_chunks for tower in towers):
            raise InputError("SDXL has one or two text encoders and all are CLIP's.")
        lengths = {tower.max_length for tower in towers}
        if len(lengths) > 1:
            raise InputError(
                f"The text encoders read {' and '.join(map(str, sorted(lengths)))} tokens; set one "
                "model_max_length in both tokenizer_config.json."
            )
        config, end = towers[-1].model.config, towers[-1].tokenizer.eos_token_id
        if not hasattr(towers[-1].model, "text_projection"):
            raise InputError(
                "SDXL's last text encoder is a CLIPTextModelWithProjection, but this one is a "
                f"{type(towers[-1].model).__name__}."
            )
        if config.eos_token_id not in (LEGACY_END, end):
            raise InputError(
                f"The last text encoder pools at token {config.eos_token_id} but its tokenizer "
                f"ends texts with {end}; set eos_token_id in its config.json."
            )
        self.towers: Sequence[TextEncoder] = nn.ModuleList(towers)  # type: ignore[assignment]

    @property
    def max_length(self) -> int:
        """Tokens per chunk, begin and end tokens included."""
        return self.towers[-1].max_length

    @property
    def hidden_size(self) -> int:
        """Width of one token's embedding."""
        return sum(tower.hidden_size for tower in self.towers)

    @property
    def pooled_size(self) -> int:
        """P, the width of the pooled embedding."""
        return int(self.towers[-1].model.config.projection_dim)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, N, L] int64 on the CPU for N towers, padded or truncated to L."""
        return torch.stack([tower.tokenize(texts) for tower in self.towers], dim=1)

    def encode_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, L, D] and pooled embeddings [B, P] of token ids [B, N, L].

        Differentiable in the towers' weights.
        """
        hidden, pooled = self._run(ids.unbind(dim=1), None)
        return torch.cat(hidden, dim=-1), pooled

    forward = encode_ids

    def chunks(self, texts: Sequence[str], *, weighted: bool = True) -> list[int]:
        """How many chunks each text takes, in the tower where it takes most."""
        counts = [tower.chunks(texts, weighted=weighted) for tower in self.towers]
        return [max(count) for count in zip(*counts, strict=True)]

    def encode(
        self,
        texts: Sequence[str],
        *,
        clip_skip: int | None = None,
        weighted: bool = True,
        chunks: int | None = None,
    ) -> TextEmbeddings:
        """Tokenize and encode B texts; see TextEncoder.encode.

        `clip_skip` counts from the penultimate layer, and the pooled embedding keeps all layers, as
        in diffusers; weights are applied to each tower's hidden states, as in A1111, and do not
        reach the pooled embedding.
        """
        if chunks is None:
            chunks = max(self.chunks(texts, weighted=weighted))
        ids, weights = zip(
            *(
                chunk_tensors(t.tokenizer, prompt_chunks(t.tokenizer, texts, weighted), chunks)
                for t in self.towers
            ),
            strict=True,
        )
        hidden, pooled = self._run([i.flatten(0, 1) for i in ids], clip_skip)
        shape = ids[0].shape[:2]
        emphasized = [
            emphasize(h.unflatten(0, shape), w) for h, w in zip(hidden, weights, strict=True)
        ]
        return TextEmbeddings(
            torch.cat(emphasized, dim=-1).flatten(1, 2),
            pooled.unflatten(0, shape)[:, 0],
            torch.stack(ids, dim=1).flatten(2),
            [],
        )

    def check_clip_skip(self, clip_skip: int | None) -> None:
        """Raises InputError where encode would."""
        for tower in self.towers:
            tower._checked_skip(clip_skip, kept=2)

    def _run(self, ids: Sequence[Tensor], clip_skip: int | None) -> tuple[list[Tensor], Tensor]:
        """Each tower's hidden states [B, L, D_n] of its ids [B, L]; the last's pooled [B, P]."""
        outputs = [
            tower.penultimate(i, clip_skip) for tower, i in zip(self.towers, ids, strict=True)
        ]
        pooled = outputs[-1][1]
        assert pooled is not None
        return [hidden for hidden, _ in outputs], pooled


def _check_fit(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    if config.model_type not in MODEL_TYPES:
        raise InputError(
            f"A text encoder of type {config.model_type!r} is not supported; these are: "
            f"{', '.join(MODEL_TYPES)}."
        )
    if tokenizer.model_max_length > MAX_LENGTH:
        raise InputError(
            "The tokenizer does not say how many tokens a text may have; set model_max_length in "
            "tokenizer_config.json."
        )
    positions = getattr(config, "max_position_embeddings", MAX_LENGTH)  # T5 has relative ones
    if tokenizer.model_max_length > positions:
        raise InputError(
            f"The tokenizer pads to {tokenizer.model_max_length} tokens but the text encoder "
            f"has {positions} positions; set model_max_length in tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        raise InputError(
            "The tokenizer has no padding token; set pad_token in tokenizer_config.json (for "
            "GPT-2, its end token)."
        )
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"The tokenizer has {len(tokenizer)} tokens but the text encoder embeds "
            f"{config.vocab_size}; they belong to different models."
        )
