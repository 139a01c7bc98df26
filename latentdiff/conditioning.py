"""Prompts, sizes and masks to what the U-Net is conditioned on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.checkpoint import ModelParts
from latentdiff.models.unet import Conditioning
from latentdiff.request import Picture, Settings, is_distilled, is_sdxl


class TruncatedPromptWarning(UserWarning):
    """A prompt has more tokens than the text encoder reads."""


def is_guided(parts: ModelParts, settings: Settings) -> bool:
    """Whether the U-Net runs twice a step: not at scale 1, nor where it reads the scale."""
    return settings.guidance_scale != 1 and not is_distilled(parts)


def chunks(parts: ModelParts, picture: Picture, settings: Settings) -> int:
    """Chunks of tokens that a picture's prompts take; pictures of one batch take the same."""
    texts = [picture.prompt]
    if is_guided(parts, settings):
        texts.append(picture.negative_prompt)
    return max(parts.text_encoder.chunks(texts, weighted=settings.weighted))


def embed(
    parts: ModelParts, pictures: Sequence[Picture], settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [B, L, D] and SDXL's pooled [B, P], each distinct text encoded once.

    Where guided, B is twice the number of pictures, negative prompts first.
    """
    texts = [picture.prompt for picture in pictures]
    guided = is_guided(parts, settings)
    if guided:
        texts = [picture.negative_prompt for picture in pictures] + texts
    distinct = list(dict.fromkeys(texts))
    embeddings = parts.text_encoder.encode(
        distinct, clip_skip=settings.clip_skip, weighted=settings.weighted
    )
    for rest in embeddings.truncated:
        warnings.warn(
            f"The prompt is longer than {embeddings.ids.shape[1]} tokens; "
            f"the model does not read its end: {rest!r}.",
            TruncatedPromptWarning,
            stacklevel=2,
        )
    rows = [distinct.index(text) for text in texts]
    hidden = embeddings.hidden[rows]
    pooled = None if embeddings.pooled is None else embeddings.pooled[rows]
    if guided and parts.force_zeros_for_empty_prompt:
        empty = [row for row in range(len(texts) // 2) if not texts[row]]
        hidden[empty] = 0
        if pooled is not None:
            pooled[empty] = 0
    return hidden, pooled


def condition(
    parts: ModelParts,
    settings: Settings,
    embeddings: tuple[Tensor, Tensor | None],
    extra: Tensor | None,
) -> Conditioning:
    """What the U-Net is conditioned on, from what embed returns, on the U-Net's device.

    extra: [1, C', h, w], channels that inpainting models read besides.
    """
    hidden, pooled = embeddings
    weight = next(parts.unet.parameters())
    time_ids = _time_ids(parts, settings, len(hidden))
    return parts.unet.condition(
        hidden.to(weight),
        None if pooled is None else pooled.to(weight),
        None if time_ids is None else time_ids.to(weight.device),
        None if extra is None else extra.to(weight).expand(len(hidden), -1, -1, -1),
        settings.guidance_scale if is_distilled(parts) else None,
    )


def _time_ids(parts: ModelParts, settings: Settings, rows: int) -> Tensor | None:
    """SDXL's sizes and crop, [B, 6], or the refiner's with its score, [B, 5]."""
    if not is_sdxl(parts):
        return None
    sizes = [*(settings.original_size or ()), *(settings.crops_coords_top_left or ())]
    if not parts.requires_aesthetics_score:
        return torch.tensor([[*sizes, *(settings.target_size or ())]] * rows).float()
    good, bad = [*sizes, settings.aesthetic_score], [*sizes, settings.negative_aesthetic_score]
    if not is_guided(parts, settings):
        return torch.tensor([good] * rows).float()
    return torch.tensor([bad] * (rows // 2) + [good] * (rows // 2)).float()
