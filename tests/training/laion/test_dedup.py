"""The lockfile of a download: duplicates are found and kept out of the other split, whatever the
number of processes, and every sample has a row.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from benchmarks.laion_dedup import DISGUISES, jpeg, lay_out, planted, sprites
from latentdiff.data.images import SourceConfig, open_source
from latentdiff.data.lockfile import check_lockfile, read_rows
from latentdiff.errors import InputError
from training.laion import clip_duplicates
from training.laion import dedup as dedup_module
from training.laion import duplicates as duplicates_module
from training.laion.dedup import DedupConfig, dedup
from training.laion.duplicates import Pictures, alike, groups, stay
from training.laion.phash import RADIUS


def drawing(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = random.uniform(0.1, 0.5, 4)
        colour = tuple(int(each) for each in random.integers(0, 200, 3))
        box = (x * size[0], y * size[1], (x + w) * size[0], (y + h) * size[1])
        (draw.ellipse if random.uniform() < 0.5 else draw.rectangle)(box, fill=colour)
    return image


def large(seed: int) -> Image.Image:
    return drawing(seed).resize((320, 240), Image.Resampling.LANCZOS)


PICTURES: list[tuple[bytes | None, dict[str, Any]]] = [
    (jpeg(drawing(0), 90), {"caption": "first", "similarity": 0.25}),
    (jpeg(drawing(1), 90), {}),
    (jpeg(drawing(0), 90), {"caption": "its copy"}),
    (None, {"error_message": "404"}),
    (jpeg(ImageEnhance.Brightness(large(1)).enhance(0.95), 80), {}),
    (jpeg(drawing(2), 70), {}),
    (jpeg(drawing(3, (40, 30)), 90), {}),
    (b"no picture", {}),
    (None, {"error_message": "opted out", "opt_out": "noai"}),
    (jpeg(drawing(4), 90), {}),
]
EXPECTED = [
    "kept",
    "duplicate: near",
    "duplicate: exact",
    "404",
    "kept",
    "kept",
    "too small",
    "unknown format",
    "opted out",
    "kept",
]
CONFIG = DedupConfig(min_side=64, validation_share=0.5)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pictures above, four to a shard."""
    monkeypatch.setattr("benchmarks.laion_dedup.SHARD", 4)
    lay_out(tmp_path, PICTURES)
    return tmp_path


def rows(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_rows(directory / "lock.parquet").to_pylist()
    return found


def statuses(directory: Path) -> list[str]:
    return [row["status"] for row in rows(directory)]


# The step


def test_every_sample_has_a_row_that_says_what_became_of_it(directory: Path) -> None:
    info = dedup(CONFIG, "shapes", directory)
    assert check_lockfile(directory / "lock.parquet") == info
    manifest = json.loads((directory / "selected" / "manifest.json").read_bytes())
    selected = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    assert (info.name, info.selected) == ("shapes", selected)
    found = rows(directory)
    assert [row["status"] for row in found] == EXPECTED
    assert [row["key"] for row in found] == [f"{n // 4:05d}{n % 4}" for n in range(10)]
    for (data, values), row in zip(PICTURES, found, strict=True):
        if data is not None:
            assert row["sha256"] == hashlib.sha256(data).hexdigest()
            assert row["bytes"] == len(data)
        assert row["caption"] == values.get("caption", row["caption"])
    assert (found[0]["similarity"], found[0]["width"], found[0]["height"]) == (0.25, 160, 120)
    assert found[1]["duplicate_of"] == found[4]["key"]
    assert found[2]["duplicate_of"] == found[0]["key"]
    assert found[8]["opt_out"] == "noai"
    assert found[7]["phash"] is None


def test_the_same_download_makes_the_same_bytes(directory: Path) -> None:
    dedup(CONFIG, "shapes", directory)
    before = (directory / "lock.parquet").read_bytes()
    dedup(CONFIG, "shapes", directory)
    assert (directory / "lock.parquet").read_bytes() == before
    shutil.rmtree(directory / "dedup")
    dedup(CONFIG.model_copy(update={"processes": 2}), "shapes", directory)
    assert (directory / "lock.parquet").read_bytes() == before


def test_a_stopped_step_goes_on(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[str] = []

    def once(tars: Any, key: str, sha256: str) -> Any:
        described.append(key)
        if len(described) == 5:
            raise KeyboardInterrupt
        return real(tars, key, sha256)

    real = dedup_module.features._of
    monkeypatch.setattr(dedup_module.features, "_of", once)
    with pytest.raises(KeyboardInterrupt):
        dedup(CONFIG, "shapes", directory)
    dedup(CONFIG, "shapes", directory)
    assert statuses(directory) == EXPECTED
    assert len(described) == len(set(described)) + 2  # the second shard was begun twice


def test_a_shard_that_was_downloaded_anew_is_looked_at_anew(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dedup(CONFIG, "shapes", directory)
    other = tmp_path_factory.mktemp("other")
    lay_out(other, [*PICTURES[:9], (jpeg(drawing(2), 90), {})])
    for path in (other / "images").glob("00002*"):
        shutil.copy(path, directory / "images" / path.name)
    dedup(CONFIG, "shapes", directory)
    assert statuses(directory) == [*EXPECTED[:9], "duplicate: near"]


def test_pictures_are_in_the_bucket_that_training_uses(directory: Path) -> None:
    sizes = {"resolution": 64, "buckets": True, "step": 16}
    dedup(DedupConfig.model_validate({"sizes": sizes}), "shapes", directory)
    kept = [row for row in rows(directory) if row["status"] == "kept"]
    assert {row["bucket"] for row in kept} == {"80x48"}
    assert {row["bucket"] for row in rows(directory) if row["status"] != "kept"} == {None}


def test_what_is_kept_is_a_source(directory: Path) -> None:
    dedup(CONFIG, "shapes", directory)
    path = directory / "lock.parquet"
    kept = 0
    for split in ("train", "validation"):
        expected = [row for row in rows(directory) if row["split"] == split]
        if expected:
            source = open_source(SourceConfig(type="lockfile", path=path, split=split))
            kept += len(source)
            for index, row in enumerate(expected):
                assert hashlib.sha256(source.raw(index) or b"").hexdigest() == row["sha256"]
                assert source.size(index) == source.image(index).size
    assert kept == 4


def test_what_is_missing_is_said(directory: Path) -> None:
    (directory / "images" / "00001_stats.json").unlink()
    with pytest.raises(InputError, match=r"6 of 10 selected samples; run the step download"):
        dedup(CONFIG, "shapes", directory)
    shutil.rmtree(directory / "images")
    with pytest.raises(InputError, match="holds no pictures"):
        dedup(CONFIG, "shapes", directory)
    shutil.rmtree(directory / "selected")
    with pytest.raises(InputError, match="run select first"):
        dedup(CONFIG, "shapes", directory)


def test_pictures_of_another_selection_are_refused(directory: Path) -> None:
    record, manifest = directory / "download.json", directory / "selected" / "manifest.json"
    record.write_text(json.dumps({"selected": hashlib.sha256(manifest.read_bytes()).hexdigest()}))
    dedup(CONFIG, "shapes", directory)
    record.write_text(json.dumps({"selected": "0" * 64}))
    with pytest.raises(InputError, match="pictures of another selection"):
        dedup(CONFIG, "shapes", directory)


def test_where_the_metadata_lay_changes_no_byte(directory: Path, tmp_path: Path) -> None:
    manifest = directory / "selected" / "manifest.json"
    values = json.loads(manifest.read_text())
    made = []
    for place in ("a", "b"):
        there = tmp_path / place
        shutil.copytree(directory / "images", there / "images")
        (there / "selected").mkdir()
        config = {"metadata": [f"/{place}/*.parquet"]}
        changed = {**values, "config": config, "inputs": place}
        (there / "selected" / "manifest.json").write_text(json.dumps(changed))
        dedup(CONFIG, "shapes", there)
        made.append((there / "lock.parquet").read_bytes())
    assert made[0] == made[1]


def test_candidates_are_measured_block_by_block(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dedup(CONFIG, "shapes", directory)
    before = (directory / "lock.parquet").read_bytes()
    blocks: list[int] = []
    real = duplicates_module._differences

    def counted(pictures: Any, pairs: np.ndarray, *rest: Any) -> np.ndarray:
        blocks.append(len(pairs))
        return real(pictures, pairs, *rest)

    monkeypatch.setattr(duplicates_module, "_differences", counted)
    monkeypatch.setattr(duplicates_module, "MANY", 0)
    dedup(CONFIG, "shapes", directory)
    assert len(blocks) > 1
    assert (directory / "lock.parquet").read_bytes() == before


def of_hashes(hashes: np.ndarray) -> Pictures:
    """Pictures with these hashes, [N, 2], and nothing else in common."""
    count = len(hashes)
    return Pictures(
        shard=np.zeros(count, int),
        row=np.arange(count),
        sha256=np.array([hashlib.sha256(b"%d" % n).digest() for n in range(count)], "S32"),
        size=np.full((count, 2), 64),
        hashes=hashes,
        aspects=np.zeros((count, 2), np.float32),
        taken=np.zeros(count, bool),
    )


def held_out_of(pictures: Pictures, **settings: Any) -> np.ndarray:
    none = np.empty((0, 2), np.int64)
    return dedup_module._validation(DedupConfig(**settings), pictures, none)


@pytest.mark.parametrize("bits", [0, 0b1, 0b1000_0001, 0b111])
def test_pictures_that_nearly_share_the_hash_of_a_view_are_of_one_split(bits: int) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, (40, 2)).astype(np.uint64)
    hashes[1::2, 1] = hashes[::2, 1] ^ np.uint64(bits)
    held_out = held_out_of(of_hashes(hashes), validation_share=0.5)
    assert (held_out[::2] == held_out[1::2]).all()
    assert 0 < held_out.sum() < len(held_out)


def test_no_near_hash_crosses_the_split_though_the_search_misses_pairs() -> None:
    """Where the hashes of a cluster are denser than the window; the others are held out still."""
    rng = np.random.default_rng(1)
    spread = rng.integers(0, 2**63, (60, 2)).astype(np.uint64)
    dense = np.stack([rng.integers(0, 2**12, 60) << 20, rng.integers(0, 2**63, 60)], axis=1)
    hashes = np.concatenate([spread, dense.astype(np.uint64)])
    held_out = held_out_of(of_hashes(hashes), validation_share=0.3, window=1)
    first = hashes[:, 0]
    distances = np.bitwise_count(first[held_out][:, None] ^ first[~held_out][None])
    assert distances.min() > RADIUS
    assert held_out[:60].sum() > 5


def test_a_download_of_nothing_has_a_lockfile_too(tmp_path: Path) -> None:
    lay_out(tmp_path, [(None, {"error_message": "404"})] * 3)
    assert dedup(CONFIG, "gone", tmp_path).rows == 3
    assert statuses(tmp_path) == ["404"] * 3


# Takedown


@pytest.mark.parametrize("name", ["key", "sample_id", "sha256", "url"])
def test_what_is_taken_down_takes_its_copies_along(directory: Path, name: str) -> None:
    dedup(CONFIG, "shapes", directory)
    row = rows(directory)[1]  # of which a larger copy is kept
    (directory / "list.txt").write_text(f"# do not use\n{row[name]}\n")
    config = CONFIG.model_copy(update={"takedown": (directory / "list.txt",)})
    dedup(config, "shapes", directory)
    expected = list(EXPECTED)
    expected[1] = expected[4] = "taken down"
    assert statuses(directory) == expected


def test_what_is_too_small_takes_its_larger_copies_along(tmp_path: Path) -> None:
    small = drawing(0).resize((80, 60), Image.Resampling.BOX)
    lay_out(tmp_path, [(jpeg(each, 90), {}) for each in (small, drawing(0), drawing(1))])
    config = DedupConfig(min_side=64, validation_share=0)
    dedup(config, "shapes", tmp_path)
    assert statuses(tmp_path) == ["too small", "kept", "kept"]
    (tmp_path / "list.txt").write_text(rows(tmp_path)[0]["sha256"])
    dedup(config.model_copy(update={"takedown": (tmp_path / "list.txt",)}), "shapes", tmp_path)
    assert statuses(tmp_path) == ["taken down", "taken down", "kept"]


# Planted copies


def test_planted_copies_are_found_and_none_crosses_the_split(tmp_path: Path) -> None:
    """Every tenth emoji, in all disguises; benchmarks/laion_dedup.py has the figures of all."""
    truth: list[tuple[int, str]] = []
    lay_out(tmp_path, planted((each for n, each in enumerate(sprites()) if n % 30 == 0), truth))
    dedup(DedupConfig(validation_share=0.5), "emoji", tmp_path)
    found = rows(tmp_path)
    kept = [
        (number, name, row["split"])
        for (number, name), row in zip(truth, found, strict=True)
        if row["status"] == "kept"
    ]
    pictures = {number for number, _ in truth}
    assert len({number for number, _, _ in kept}) == len(pictures)
    copies = sum(name != "" for _, name in truth)
    assert len(kept) - len(pictures) <= 0.05 * copies
    splits: dict[int, set[str]] = {}
    for number, _, split in kept:
        splits.setdefault(number, set()).add(split)
    assert all(len(each) == 1 for each in splits.values())
    assert {split for _, _, split in kept} == {"train", "validation"}
    assert {name for _, name in truth} == {"", *DISGUISES}


# Groups


PAIRS = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40).map(
    lambda pairs: np.array([p for p in pairs if p[0] != p[1]], dtype=np.int64).reshape(-1, 2)
)


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS, ranks=st.permutations(range(20)))
def test_no_two_that_stay_are_a_pair(pairs: np.ndarray, ranks: list[int]) -> None:
    gone = stay(pairs, np.array(ranks))
    near: dict[int, set[int]] = {each: set() for each in range(20)}
    for i, j in pairs.tolist():
        near[i].add(j)
        near[j].add(i)
    for i, j in pairs.tolist():
        assert i in gone or j in gone
    for each, kept in gone.items():
        assert kept not in gone
        assert ranks[kept] < ranks[each]
        assert kept in near[each] or near[kept] & near[each]


@settings(max_examples=100, deadline=None)
@given(pairs=PAIRS)
def test_groups_are_what_pairs_connect(pairs: np.ndarray) -> None:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (20, 20))
    _, labels = connected_components(graph, directed=False)
    found = groups(20, pairs)
    np.testing.assert_array_equal(found, [np.flatnonzero(labels == each)[0] for each in labels])


# CLIP


def test_like_embeddings_are_found_in_blocks() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [
        (i, j) for i in range(50) for j in range(i + 1, 50) if vectors[i] @ vectors[j] > 0.9
    ]
    assert expected
    for block in (1, 7, 50, 99):
        assert sorted(map(tuple, alike(vectors, 0.9, block).tolist())) == expected


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Path:
    """A small CLIP model that open_clip knows as tiny-clip, and its random weights."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    torch.manual_seed(0)
    state = open_clip.create_model("tiny-clip").state_dict()
    save_file(
        {name: value.contiguous() for name, value in state.items()}, tmp_path / "clip.safetensors"
    )
    return tmp_path / "clip.safetensors"


def test_clip_finds_what_looks_alike_to_it(directory: Path, tiny_clip: Path) -> None:
    keys = ["000000", "000001", "000010"]
    vectors = clip_duplicates.embed(directory, keys, "tiny-clip", tiny_clip, 2)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert not len(clip_duplicates.embed(directory, [], "tiny-clip", tiny_clip, 2))
    alone = clip_duplicates.embed(directory, keys[2:], "tiny-clip", tiny_clip, 2)
    np.testing.assert_allclose(alone[0], vectors[2], rtol=1e-4, atol=1e-6)
    options = {"clip_model": "tiny-clip", "clip_weights": tiny_clip}
    config = CONFIG.model_copy(update={**options, "clip_cosine": 0.0001})
    dedup(config, "shapes", directory)
    found = rows(directory)
    assert [row["status"] for row in found].count("duplicate: clip") == 3
    (kept,) = [row for row in found if row["status"] == "kept"]
    assert kept["width"] == 320  # the largest
    clip = [row["duplicate_of"] for row in found if row["status"] == "duplicate: clip"]
    assert set(clip) == {kept["key"]}
    assert found[2]["duplicate_of"] == kept["key"]  # its original went, too


def test_clip_needs_a_model_and_its_weights(directory: Path, tiny_clip: Path) -> None:
    with pytest.raises(ValueError, match="go together"):
        DedupConfig(clip_model="ViT-B-32")
    for model in ("no such model", "RN50"):
        with pytest.raises(InputError, match=r"no model|not the weights of RN50"):
            clip_duplicates.embed(directory, ["000000"], model, tiny_clip, 1)
