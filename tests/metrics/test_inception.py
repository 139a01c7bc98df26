"""FID's Inception: the real architecture, with random weights, against torch-fidelity's own."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorInceptionV3

from latentdiff.errors import InputError
from latentdiff.metrics import inception
from latentdiff.metrics.inception import InceptionConfig, InceptionExtractor, bicubic, find_weights
from latentdiff.model_files import file_digest


@pytest.fixture(scope="module")
def library() -> FeatureExtractorInceptionV3:
    """Random weights that keep the scale of what they are given."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, tensors: None)
        network = FeatureExtractorInceptionV3("inception", ["2048"], nothing)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    return network


@pytest.fixture(scope="module")
def weights(library: FeatureExtractorInceptionV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(library.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> InceptionExtractor:
    return InceptionExtractor(InceptionConfig(weights=weights))


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_features_are_torch_fidelitys(
    extractor: InceptionExtractor, library: FeatureExtractorInceptionV3
) -> None:
    images = noise(2, 3, 50, 70)
    found = extractor(images)
    assert found.shape == (2, extractor.dimensions)
    assert found.dtype == np.float32
    assert found.std() > 0.01
    np.testing.assert_allclose(found, library(images)[0].numpy(), rtol=1e-5, atol=1e-6)


def test_clean_features_are_the_librarys_where_nothing_is_resized(
    weights: Path, library: FeatureExtractorInceptionV3, extractor: InceptionExtractor
) -> None:
    clean = InceptionExtractor(InceptionConfig(weights=weights, resize="bicubic"))
    images = noise(1, 3, 299, 299)
    np.testing.assert_allclose(clean(images), library(images)[0].numpy(), rtol=1e-5, atol=1e-6)
    assert clean.digest != extractor.digest


@pytest.mark.parametrize("shape", [(40, 52), (400, 640)])
def test_bicubic_averages_and_does_not_round(shape: tuple[int, int]) -> None:
    """PyTorch's own bicubic filter with antialiasing is Pillow's."""
    images = noise(2, 3, *shape)
    expected = F.interpolate(
        images.double(), (299, 299), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 255)
    torch.testing.assert_close(bicubic(images).double(), expected, rtol=0, atol=2e-3)


def test_the_published_file_is_read_and_no_other_pickle(
    weights: Path,
    extractor: InceptionExtractor,
    library: FeatureExtractorInceptionV3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / inception.FILES[0]
    torch.save(library.state_dict(), path)
    with pytest.raises(InputError, match="is not the published file"):
        InceptionExtractor(InceptionConfig(weights=path))
    monkeypatch.setattr(inception, "SHA256", file_digest(path))
    assert InceptionExtractor(InceptionConfig(weights=path)).digest == extractor.digest


def test_a_pickle_of_the_right_hash_still_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "weights.pth", tmp_path / "made"

    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (made,)

    torch.save({"fc.weight": Code()}, path)
    monkeypatch.setattr(inception, "SHA256", file_digest(path))
    with pytest.raises(InputError, match=r"weights\.pth is damaged"):
        InceptionExtractor(InceptionConfig(weights=path))
    assert not made.exists()


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="does not hold the tensors of FID's Inception"):
        InceptionExtractor(InceptionConfig(weights=path))


def test_weights_are_sought_where_people_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError) as refusal:
        find_weights(None)
    for word in (*inception.FILES, inception.URL, inception.SHA256, inception.VARIABLE):
        assert word in str(refusal.value)
    cached = tmp_path / "hub" / "checkpoints" / inception.FILES[1]
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert find_weights(None) == cached
    elsewhere, named = tmp_path / "a.pth", tmp_path / "b.pth"
    monkeypatch.setenv(inception.VARIABLE, str(elsewhere))
    with pytest.raises(InputError, match=r"not at \S*a\.pth;"):
        find_weights(None)
    elsewhere.touch()
    assert find_weights(None) == elsewhere
    with pytest.raises(InputError, match=r"not at \S*b\.pth;"):
        find_weights(named)


def test_nothing_is_drawn_from_the_global_generator(weights: Path) -> None:
    before = torch.random.get_rng_state()
    InceptionExtractor(InceptionConfig(weights=weights))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_torch_fidelity_it_says_so(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match="pip install torch-fidelity"):
        InceptionExtractor(InceptionConfig(weights=weights))
