"""What a VAE learns from: windows of pictures, each where its own number puts it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.data.buckets import fit
from latentdiff.data.images import SourceConfig
from latentdiff.data.order import Share
from latentdiff.errors import InputError
from training.crops import Crops, FileCrops, SceneImages
from training.file_pictures import PicturesConfig


def files(folder: Path, **options: Any) -> FileCrops:
    source = SourceConfig(type="folder", path=folder)
    values = {"source": source, "held_out": source, "resolution": 32} | options
    return FileCrops(PicturesConfig(**values), seed=5)


def test_crops_are_windows_of_their_scenes(tiny_chain: Any) -> None:
    scenes = tiny_chain.program("autoencoder").pictures.scenes
    corners = set()
    for index in range(64):
        crop = Crops(SceneImages(scenes), 60, seed=5)[index]
        assert (crop.dtype, crop.shape) == (torch.uint8, (3, 60, 60))
        image = torch.from_numpy(scenes[index]["image"]).permute(2, 0, 1)
        places = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if image[:, y : y + 60, x : x + 60].equal(crop)
        ]
        assert places
        if len(places) == 1:
            corners.add(places[0])
    assert {y for y, _ in corners} == {x for _, x in corners} == {0, 1, 2, 3, 4}


def test_a_whole_picture_can_be_the_crop(tiny_chain: Any) -> None:
    scenes = tiny_chain.program("autoencoder").pictures.scenes
    crop = Crops(SceneImages(scenes), 64, seed=0)[3]
    assert crop.equal(torch.from_numpy(scenes[3]["image"]).permute(2, 0, 1))


def test_unseen_scenes_are_those_of_the_held_out_split(tiny_chain: Any) -> None:
    pictures = tiny_chain.program("autoencoder").pictures
    trained = {picture.tobytes() for picture in pictures.whole(2000)}
    assert len(trained) > 1000
    assert not any(picture.tobytes() in trained for picture in pictures.unseen(20))


def test_files_are_cut_alike_on_two_processes_and_anew_each_epoch(folder: Path) -> None:
    def taken(share: Share, steps: range) -> list[Any]:
        made = files(folder).crops(steps, 4, share, 24, workers=0)
        return [batch for (batch,) in islice(made, len(steps))]

    whole = taken(Share(), range(6))
    assert whole[0].data.shape == (4, 3, 24, 24)
    halves = [taken(Share(rank, 2), range(3, 6)) for rank in (0, 1)]
    for rank in (0, 1):
        for full, half in zip(whole[3:], halves[rank], strict=True):
            assert full.data[rank::2].equal(half.data)
    windows: dict[int, list[torch.Tensor]] = {}
    for batch in whole:
        for number, window in zip(batch.samples, batch.data, strict=True):
            windows.setdefault(number % 12, []).append(window)
    assert len(windows) == 12
    moved = [n for n, (one, other) in windows.items() if n not in (0, 3) and not one.equal(other)]
    assert len(moved) > 5  # where a window is all of one colour, it looks the same elsewhere


def test_whole_files_without_the_damaged_one(folder: Path) -> None:
    pictures = files(folder)
    assert len(list(pictures.whole(4))) == 3  # 0, 3, 6 and 9
    assert len(list(pictures.whole(256))) == 11
    unseen = pictures.unseen(256)
    assert unseen.shape == (11, 32, 32, 3)
    square, _, _ = fit(pictures.source.image(4), (32, 32))
    np.testing.assert_array_equal(unseen[3], np.array(square))


def test_no_readable_picture_to_measure_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes((folder / "03.png").read_bytes())
    (tmp_path / "one.txt").write_text("damaged")
    held_out = SourceConfig(type="folder", path=tmp_path)
    with pytest.raises(InputError, match="no readable picture among the held-out"):
        files(folder, held_out=held_out).unseen(4)
