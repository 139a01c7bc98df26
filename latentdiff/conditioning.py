"""Prompts, sizes and masks to what the U-Net is conditioned on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.checkpoint import ModelParts
from latentdiff.models.unet import Conditioning
from latentdiff.request import Picture, Settings, is_sdxl


class TruncatedPromptWarning(UserWarning):
    """A prompt has more tokens than the text encoder reads."""


def is_guided(parts: ModelParts, settings: Settings) -> bool:
    """Whether the U-Net runs twice a step: not at scale 1, nor where it reads the scale."""
    return settings.guidance_scale != 1 and parts.unet.config.time_cond_proj_dim is None


def chunks(parts: ModelParts, picture: Picture, settings: Settings) -> int:
    """Chunks of tokens that a picture's prompts take; pictures of one batch take the same."""
    texts = [picture.prompt]
    if is_guided(parts, settings):
        texts.append(picture.negative_prompt)
    return max(parts.text_encoder.chunks(texts, weighted=settings.weighted))


def condition(
    parts: ModelParts,
    pictures: Sequence[Picture],
    settings: Settings,
    extra: Tensor | None,
    device: torch.device,
) -> Conditioning:
    """What B pictures are conditioned on: a batch of 2B, negative prompts first, where guided.

    extra: [1, C', h, w], channels that inpainting models read besides.
    """
    texts = [picture.prompt for picture in pictures]
    guided = is_guided(parts, settings)
    if guided:
        texts = [picture.negative_prompt for picture in pictures] + texts
    hidden, pooled = _embed(parts, texts, settings, guided)
    dtype = next(parts.unet.parameters()).dtype
    time_ids = _time_ids(parts, settings, guided, len(pictures))
    distilled = parts.unet.config.time_cond_proj_dim is not None
    return parts.unet.condition(
        hidden.to(device, dtype),
        None if pooled is None else pooled.to(device, dtype),
        None if time_ids is None else time_ids.to(device),
        None if extra is None else extra.to(device, dtype).expand(len(texts), -1, -1, -1),
        settings.guidance_scale if distilled else None,
    )


def _embed(
    parts: ModelParts, texts: Sequence[str], settings: Settings, guided: bool
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [B, L, D] and SDXL's pooled [B, P], each distinct text encoded once."""
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


def _time_ids(parts: ModelParts, settings: Settings, guided: bool, count: int) -> Tensor | None:
    """SDXL's sizes and crop, or the refiner's sizes, crop and score: [B, 6] or [B, 5]."""
    if not is_sdxl(parts):
        return None
    sizes = [*(settings.original_size or ()), *(settings.crops_coords_top_left or ())]
    ends: list[list[float]] = [list(settings.target_size or ())] * 2
    if parts.requires_aesthetics_score:
        scores = (settings.negative_aesthetic_score, settings.aesthetic_score)
        ends = [[score] for score in scores if score is not None]
    halves = ends if guided else ends[1:]
    return torch.tensor([sizes + end for end in halves for _ in range(count)]).float()
