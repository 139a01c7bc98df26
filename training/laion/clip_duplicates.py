"""Embeddings of downloaded pictures by a CLIP model of open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from latentdiff.data.decode import decode
from latentdiff.data.locked import IMAGES, Tars
from latentdiff.errors import InputError
from latentdiff.model_files import read_weights


def embed(
    directory: Path, keys: Sequence[str], model: str, weights: Path, batch_size: int
) -> np.ndarray:
    """Unit vectors float32 [N, D] of pictures by key.

    Raises InputError when open_clip knows no such model or the weights are not its own.
    """
    import open_clip

    if model not in open_clip.list_models():
        raise InputError(
            f"open_clip knows no model {model!r}; set dedup.clip_model to one of its names, such "
            "as ViT-B-32."
        )
    network = open_clip.create_model(model, pretrained_hf=False)
    try:
        network.load_state_dict(read_weights(weights))
    except RuntimeError:
        raise InputError(
            f"{weights} are not the weights of {model}; name the two together."
        ) from None
    transform = open_clip.image_transform(network.visual.image_size, is_train=False)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    network = network.to(device).eval()
    if not keys:
        return np.empty((0, 1), dtype=np.float32)
    tars, found = Tars(directory / IMAGES), []
    for start in range(0, len(keys), batch_size):
        pictures = [decode(tars.read(key)) for key in keys[start : start + batch_size]]
        with torch.inference_mode():
            images = torch.stack([transform(picture) for picture in pictures]).to(device)
            found.append(network.encode_image(images, normalize=True).float().cpu().numpy())
    return np.concatenate(found)
