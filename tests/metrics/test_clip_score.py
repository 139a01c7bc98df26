"""CLIP score against PyTorch's cosine and torchmetrics' own function."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.multimodal.clip_score import clip_score

from latentdiff.errors import InputError
from latentdiff.metrics import clip_score as module
from latentdiff.metrics.clip_score import clip_scores, cosines


def vectors(count: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32))
def test_cosines_are_pytorchs_whatever_the_block(
    count: int, width: int, chunk: int, seed: int
) -> None:
    images, texts = vectors(count, width, seed), vectors(count, width, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found = cosines(images, texts)
    expected = F.cosine_similarity(*(torch.from_numpy(v).double() for v in (images, texts)))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("angle", [0.0, 1.0, 1.5])
def test_torchmetrics_gives_the_same_score(angle: float) -> None:
    """It clamps the mean, so all pictures are given cosines of one sign."""
    images = vectors(6, 8, 0)
    across = vectors(6, 8, 1)
    texts = images * np.cos(angle) + across * np.sin(angle)
    texts[cosines(images, texts) < 0] *= -1
    network: Any = SimpleNamespace(
        get_image_features=lambda pixels: torch.from_numpy(images),
        get_text_features=lambda ids, mask: torch.from_numpy(texts),
        config=SimpleNamespace(),
    )
    network.to = lambda device: network

    def processor(**inputs: Any) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(6) for name in ("pixel_values", "input_ids", "attention_mask")}

    pictures = [torch.zeros(3, 2, 2, dtype=torch.uint8)] * 6
    theirs = clip_score(pictures, ["caption"] * 6, lambda: (network, processor))
    assert clip_scores(images, texts).mean() == pytest.approx(float(theirs), rel=1e-5)


def test_each_picture_is_clamped_not_the_mean() -> None:
    """Hessel et al. 2021, equation 1."""
    images = np.array([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    texts = np.array([[-2.0, 0.0], [5.0, 0.0], [0.0, 7.0]])
    np.testing.assert_allclose(cosines(images, texts), [-1, 1, 0.8], rtol=1e-15)
    np.testing.assert_allclose(clip_scores(images, texts), [0, 100, 80], rtol=1e-15)


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(InputError, match=r"pictures \[3, 4\] and of captions \[2, 4\]"):
        cosines(np.ones((3, 4)), np.ones((2, 4)))
    with pytest.raises(InputError, match="length 0"):
        cosines(np.ones((2, 4)), np.zeros((2, 4)))
    with pytest.raises(InputError, match="not finite"):
        cosines(np.ones((2, 4)), np.full((2, 4), np.nan))
