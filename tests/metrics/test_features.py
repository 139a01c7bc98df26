"""Features by their configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentdiff.config import Config, load_yaml, save_yaml
from latentdiff.errors import InputError
from latentdiff.metrics.clip_features import ClipConfig, ClipExtractor, OpenClipConfig
from latentdiff.metrics.features import FeatureConfig, TextExtractor, open_extractor
from latentdiff.metrics.inception import InceptionConfig


class Some(Config):
    """Features of a protocol."""

    features: tuple[FeatureConfig, ...]
    """Which."""


def test_each_kind_is_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(
        "features:\n"
        "- {type: inception, resize: bicubic}\n"
        "- {type: clip}\n"
        "- {type: clip, directory: runs/clip/model, name: mine}\n"
        "- {type: open_clip, model: ViT-L-14, weights: datacomp_xl_s13b_b90k}\n"
    )
    expected = (
        InceptionConfig(resize="bicubic"),
        ClipConfig(directory="bundled"),
        ClipConfig(directory=Path("runs/clip/model"), name="mine"),
        OpenClipConfig(model="ViT-L-14", weights="datacomp_xl_s13b_b90k"),
    )
    some = load_yaml(Some, path)
    assert some.features == expected
    assert isinstance(some.features[1], ClipConfig)
    assert some.features[1].directory == "bundled"
    assert [item.name for item in some.features] == ["inception", "clip", "mine", "open_clip"]
    save_yaml(some, path)
    assert load_yaml(Some, path) == some


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{type: dinov2}", "dinov2"),
        ("{model: ViT-L-14}", "discriminator"),
        ("{type: open_clip, model: ViT-L-14}", "weights"),
        ("{type: clip, name: ../outside}", "pattern"),
        ("{type: inception, directory: bundled}", "directory"),
    ],
)
def test_what_is_no_kind_is_refused(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text(f"features: [{line}]\n")
    with pytest.raises(InputError, match=message):
        load_yaml(Some, tmp_path / "some.yaml")


def test_the_configured_one_is_opened(tmp_path: Path) -> None:
    extractor = open_extractor(ClipConfig(name="scenes"))
    assert isinstance(extractor, ClipExtractor)
    assert isinstance(extractor, TextExtractor)
    assert extractor.name == "scenes"
    for config, message in (
        (InceptionConfig(weights=tmp_path / "a.pth"), r"a\.pth"),
        (OpenClipConfig(model="ViT-Z", weights="any"), "ViT-Z"),
    ):
        with pytest.raises(InputError, match=message):
            open_extractor(config)
