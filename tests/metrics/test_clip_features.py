"""CLIP's embeddings against transformers' and open_clip's own, on narrow models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig as TwoTowersConfig
from transformers import CLIPModel

from latentdiff.errors import InputError
from latentdiff.metrics.clip_features import (
    ClipConfig,
    ClipExtractor,
    OpenClipConfig,
    OpenClipExtractor,
)
from latentdiff.metrics.clip_score import cosines

CAPTIONS = ["a fox", "a robot to the left of a red apple"]
NARROW = "narrow-for-tests"


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer_of: Any, enliven: Any) -> Path:
    """A CLIP of 32 x 32 pixels with random weights, as training.clip leaves it."""
    directory = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size["num_attention_heads"] = 2
    tokens = {"vocab_size": 514, "max_position_embeddings": 48, "bos_token_id": 512}
    tokens |= {"eos_token_id": 513, "pad_token_id": 513}
    config = TwoTowersConfig(
        text_config=size | tokens,
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        enliven(CLIPModel(config)).save_pretrained(directory / "clip")
    tokenizer_of(48).save_pretrained(directory / "tokenizer")
    return directory


def test_embeddings_are_transformers(directory: Path) -> None:
    """Its forward pass scales them to length 1."""
    extractor = ClipExtractor(ClipConfig(directory=directory))
    images = noise(2, 3, 32, 32)
    pictures, texts = extractor(images), extractor.text(CAPTIONS)
    assert pictures.shape == texts.shape == (2, extractor.dimensions)
    assert pictures.dtype == texts.dtype == np.float32
    model = CLIPModel.from_pretrained(directory / "clip").eval()
    ids = extractor.encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=images.float() / 127.5 - 1)
    for found, expected in ((pictures, output.image_embeds), (texts, output.text_embeds)):
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        np.testing.assert_allclose(found / lengths, expected, rtol=1e-4, atol=1e-6)
        assert np.abs(lengths - 1).min() > 0.01
    assert abs(cosines(pictures, texts)[0] - cosines(pictures[:1], texts[1:])[0]) > 1e-4


def test_pictures_of_any_shape_are_brought_to_its_square(directory: Path) -> None:
    extractor = ClipExtractor(ClipConfig(directory=directory))
    wide = noise(1, 3, 64, 96)
    whole = Image.fromarray(wide[0].permute(1, 2, 0).numpy())
    square = np.array(whole.resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32)))
    expected = extractor(torch.from_numpy(square).permute(2, 0, 1)[None])
    np.testing.assert_allclose(extractor(wide), expected, rtol=1e-5, atol=1e-6)


def test_a_neighbour_in_the_batch_changes_nothing(directory: Path) -> None:
    extractor = ClipExtractor(ClipConfig(directory=directory))
    images = noise(5, 3, 32, 32)
    np.testing.assert_allclose(extractor(images[3:4]), extractor(images)[3:4], rtol=1e-5, atol=1e-6)


def test_the_digest_is_of_what_changes_the_features(directory: Path, tmp_path: Path) -> None:
    def digest(
        name: str, hidden_act: str = "quick_gelu", size: str = "5GB", step: float = 0
    ) -> str:
        model = CLIPModel.from_pretrained(directory / "clip")
        model.config.vision_config.hidden_act = hidden_act
        model.visual_projection.weight.data[0, 0] += step
        model.save_pretrained(tmp_path / name / "clip", max_shard_size=size)
        (tmp_path / name / "tokenizer").symlink_to(directory / "tokenizer")
        return ClipExtractor(ClipConfig(directory=tmp_path / name)).digest

    own = ClipExtractor(ClipConfig(directory=directory, name="another")).digest
    assert digest("shards", size="50KB") == own
    assert len(list((tmp_path / "shards" / "clip").glob("*.safetensors"))) > 1
    assert digest("activation", hidden_act="gelu") != own
    assert digest("weight", step=1e-3) != own


def test_a_clip_that_is_missing_or_damaged_is_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clip is missing; train it with training\.clip first"):
        ClipExtractor(ClipConfig(directory=tmp_path))
    (tmp_path / "clip").mkdir()
    for name in ("config.json", "model.safetensors"):
        data = (directory / "clip" / name).read_bytes()
        (tmp_path / "clip" / name).write_bytes(data[: None if name == "config.json" else 1000])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        ClipExtractor(ClipConfig(directory=tmp_path))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A model of open_clip, random and narrow, and a file of its weights."""
    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{NARROW}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{NARROW}.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.create_model(NARROW).eval()
    save_file(network.state_dict(), folder / "weights.safetensors")
    yield network, folder / "weights.safetensors"
    del open_clip.factory._MODEL_CONFIGS[NARROW]


def test_cosines_are_open_clips_own(narrow: tuple[Any, Path]) -> None:
    network, weights = narrow
    extractor = OpenClipExtractor(OpenClipConfig(model=NARROW, weights=str(weights)))
    images = noise(2, 3, 40, 50)
    transform = open_clip.image_transform(32, is_train=False)
    pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
    with torch.no_grad():
        seen = network.encode_image(torch.stack([*map(transform, pictures)]), normalize=True)
        read = network.encode_text(open_clip.get_tokenizer(NARROW)(CAPTIONS), normalize=True)
    found = extractor(images), extractor.text(CAPTIONS)
    assert [*found[0].shape, *found[1].shape] == [2, extractor.dimensions] * 2
    np.testing.assert_allclose(cosines(*found), (seen * read).sum(dim=1), rtol=1e-5, atol=1e-6)


def test_a_tag_is_open_clips_to_download(
    narrow: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a download that finds the file, and one that does not."""
    _, weights = narrow
    by_file = OpenClipExtractor(OpenClipConfig(model=NARROW, weights=str(weights)))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NARROW, {"mine": {"url": "unused"}})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(weights))
    by_tag = OpenClipExtractor(OpenClipConfig(model=NARROW, weights="mine"))
    images = noise(1, 3, 32, 32)
    np.testing.assert_array_equal(by_tag(images), by_file(images))
    assert by_tag.digest == by_file.digest

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(InputError, match=r"mine of narrow-for-tests cannot be had.*no route"):
        OpenClipExtractor(OpenClipConfig(model=NARROW, weights="mine"))


def test_what_open_clip_does_not_know_is_refused(narrow: tuple[Any, Path], tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for model, weights, message in (
        ("ViT-Z", "laion2b", "knows no model 'ViT-Z'"),
        ("ViT-L-14", "laion3b", "no weights 'laion3b' of ViT-L-14; .* datacomp_xl_s13b_b90k"),
        ("ViT-L-14", "weights.pt", r"no weights 'weights\.pt'.*set weights to a \.safetensors"),
        (NARROW, str(tmp_path / "other.safetensors"), "do not fit it"),
        (NARROW, str(tmp_path / "absent.safetensors"), "absent.safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            OpenClipExtractor(OpenClipConfig(model=model, weights=weights))


def test_nothing_is_drawn_from_the_global_generator(
    directory: Path, narrow: tuple[Any, Path]
) -> None:
    before = torch.random.get_rng_state()
    ClipExtractor(ClipConfig(directory=directory))
    OpenClipExtractor(OpenClipConfig(model=NARROW, weights=str(narrow[1])))
    assert torch.equal(torch.random.get_rng_state(), before)
