"""Pictures for a CLIP: every one once an epoch, cut by its own numbers, the same when resumed."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from latentdiff.data.images import SourceConfig, open_source
from latentdiff.data.order import Share
from training.data import MicroBatch
from training.file_pictures import PicturesConfig
from training.pairs import FilePairs

COUNT = 12  # pictures of `folder`
SINGLE = Share()


def pairs(folder: Path, **options: Any) -> FilePairs:
    source = SourceConfig(type="folder", path=folder)
    return FilePairs(PicturesConfig(source=source, held_out=source, resolution=32, **options), 5)


def batches(
    folder: Path, tokenizer: Any, steps: range, share: Share = SINGLE, **options: Any
) -> tuple[list[MicroBatch], FilePairs]:
    made = pairs(folder, **options)
    read = made.batches(steps, 4, share, tokenizer, workers=0)
    return [batch for (batch,) in islice(read, len(steps))], made


def test_an_epoch_takes_each_picture_once(folder: Path, tokenizer_of: Any) -> None:
    made, _ = batches(folder, tokenizer_of(32), range(6))
    for epoch in range(2):
        taken = [n for batch in made[3 * epoch : 3 * epoch + 3] for n in batch.samples]
        assert sorted(taken) == list(range(epoch * COUNT, epoch * COUNT + COUNT))
    orders = [[n % COUNT for b in made[first : first + 3] for n in b.samples] for first in (0, 3)]
    assert orders[0] != orders[1]


def test_uncut_pictures_are_the_squares_that_a_cache_holds(folder: Path, tokenizer_of: Any) -> None:
    from latentdiff.data.buckets import fit

    tokenizer = tokenizer_of(32)
    made, whole = batches(folder, tokenizer, range(3))
    for batch in made:
        for number, image, ids in zip(
            batch.samples, batch.data["image"], batch.data["ids"], strict=True
        ):
            if number == 3:
                continue
            square, _, _ = fit(whole.source.image(number), (32, 32))
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.array(square))
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert "".join(text.split()) == f"picturenumber{number}"


def test_a_resumed_run_and_two_processes_see_the_same(folder: Path, tokenizer_of: Any) -> None:
    options: dict[str, Any] = {"smallest_cut": 0.6, "flip": True}
    tokenizer = tokenizer_of(32)
    whole, _ = batches(folder, tokenizer, range(5), **options)
    resumed, _ = batches(folder, tokenizer, range(3, 5), **options)
    halves = [
        batches(folder, tokenizer, range(3, 5), Share(rank, 2), **options)[0] for rank in (0, 1)
    ]
    for step in (0, 1):
        assert whole[3 + step].samples == resumed[step].samples
        for name in ("image", "ids"):
            full = whole[3 + step].data[name]
            assert full.equal(resumed[step].data[name])
            for rank in (0, 1):
                assert full[rank::2].equal(halves[rank][step].data[name])


def test_pictures_are_cut_and_mirrored_anew_each_epoch(folder: Path, tokenizer_of: Any) -> None:
    made, _ = batches(folder, tokenizer_of(32), range(60), smallest_cut=0.5, flip=True)
    mirrored: Counter[bool] = Counter()
    edges = []
    for batch in made:
        for number, image in zip(batch.samples, batch.data["image"].float(), strict=True):
            if number % COUNT in (0, 3):  # too dark to say
                continue
            row = image[0, 16]
            mirrored[bool(row[0] < row[-1])] += 1
            edges.append(int((row > row.max() / 2).sum()))
    assert abs(mirrored[True] - mirrored[False]) < 4 * np.sqrt(mirrored.total())
    assert len(set(edges)) > 10  # where the edge lies: of 32 pixels, from a half to a whole


def test_an_unreadable_picture_is_replaced_and_reported(folder: Path, tokenizer_of: Any) -> None:
    made, whole = batches(folder, tokenizer_of(32), range(6))
    assert list(whole.unreadable) == [3]
    assert "damaged: picture 3 of" in whole.unreadable[3]
    assert all(batch.data["image"].shape == (4, 3, 32, 32) for batch in made)


def test_held_out_pairs_have_captions_of_their_own(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copied")
    (copied / "05.txt").write_text("picture number 4")
    held_out = pairs(copied).held_out(256)
    numbers = [n for n in range(COUNT) if n not in (3, 5)]
    assert held_out.captions == [f"picture number {n}" for n in numbers]
    assert held_out.images.shape == (len(numbers), 3, 32, 32)
    assert held_out.images.dtype == torch.uint8


def test_the_digest_is_the_sources(folder: Path) -> None:
    source = open_source(SourceConfig(type="folder", path=folder))
    assert pairs(folder).inputs == {"pictures": source.digest}


def test_clip_wants_scenes_or_pictures(chain: Any, tmp_path: Path) -> None:
    from training.clip import ClipConfig

    values = chain("tiny", tmp_path).config("clip").model_dump() | {"scenes": None}
    with pytest.raises(ValidationError, match="name either scenes or pictures"):
        ClipConfig.model_validate(values)
