"""CLIP score: how near a picture's embedding is to its caption's."""

from __future__ import annotations

import numpy as np

from latentdiff.errors import InputError
from latentdiff.metrics.arrays import Features, blocks, unit

CHUNK = 4096


def cosines(images: Features, texts: Features) -> np.ndarray:
    """Cosine of each picture's embedding with its own caption's: float64 [N] of [N, D] and [N, D].

    What the papers of Stable Diffusion plot against the Frechet distance. Memory is flat but for
    the result. Raises InputError when the arrays are not of one shape, or an embedding has length 0
    or is not finite.
    """
    if tuple(images.shape) != tuple(texts.shape):
        raise InputError(
            f"Embeddings of pictures {list(images.shape)} and of captions {list(texts.shape)} are "
            "not pairs; take both from one CLIP, one caption for each picture."
        )
    pairs = zip(blocks(images, CHUNK), blocks(texts, CHUNK), strict=True)
    found = [np.einsum("nd,nd->n", unit(a), unit(b)) for a, b in pairs]
    return np.concatenate([np.empty(0), *found])


def clip_scores(images: Features, texts: Features) -> np.ndarray:
    """max(100 cosine, 0) of each picture and its caption: float64 [N] in [0, 100].

    Hessel et al. 2021, "CLIPScore", eq. 1, with torchmetrics' weight 100 for their 2.5, and of
    captions as they are, as torchmetrics takes them: Hessel's begin with "A photo depicts". Raises
    InputError as `cosines`.
    """
    scores: np.ndarray = 100 * np.maximum(cosines(images, texts), 0)
    return scores
