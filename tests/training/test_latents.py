"""Where latents come from: what is listed as unreadable, and what numbers are a function of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentdiff.checkpoint import ModelParts
from latentdiff.data.buckets import SizesConfig
from latentdiff.data.cache import MANIFEST
from latentdiff.data.images import SourceConfig
from training.latents import CachedLatents, LiveConfig, LiveLatents


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six pictures; the header of the third is no header."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    path = tmp_path / "pictures"
    path.mkdir()
    for number in range(6):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text("a fox")
    (path / "2.png").write_bytes(b"x" * len((path / "1.png").read_bytes()))
    return path


def live(folder: Path, parts: ModelParts, scanned: Path) -> LiveLatents:
    source = SourceConfig(type="folder", path=folder)
    return LiveLatents(
        LiveConfig(source=source, sizes=SizesConfig(resolution=64)), parts, 0, scanned
    )


def test_pictures_without_a_header_are_listed_beside_samples(
    folder: Path, tiny_parts: ModelParts, tmp_path: Path
) -> None:
    latents = live(folder, tiny_parts, tmp_path / "scan")
    assert latents.counts == [5]
    header = f"unknown format: picture 2 of {folder}"
    assert latents.unreadable == {-3: header}
    latents.cannot_read(2, "damaged")
    assert latents.unreadable == {-3: header, 2: f"damaged: picture 3 of {folder}"}


def test_what_was_readable_is_in_the_digest_of_live_pictures(
    folder: Path, tiny_parts: ModelParts, tmp_path: Path
) -> None:
    """The same names and lengths, and another numbering."""
    before = live(folder, tiny_parts, tmp_path / "scan")
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes())
    after = live(folder, tiny_parts, tmp_path / "another scan")
    assert (after.images.digest, after.counts) == (before.images.digest, [6])
    assert after.digest != before.digest


def test_what_was_readable_is_in_the_digest_of_a_cache(tiny_chain: Any, tmp_path: Path) -> None:
    program = tiny_chain.program("diffusion")
    before = program.latents
    (tmp_path / MANIFEST).write_bytes(before.cache.store.read_bytes(MANIFEST))
    same = CachedLatents(str(tmp_path), program.parts, 0, None, 1)
    assert same.digest == before.digest
    values = json.loads((tmp_path / MANIFEST).read_text())
    values["rows"][0][-1] -= 1
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    after = CachedLatents(str(tmp_path), program.parts, 0, None, 1)
    assert after.cache.key == before.cache.key
    assert after.digest != before.digest
