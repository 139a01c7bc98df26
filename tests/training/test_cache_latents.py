"""The latent cache: what the encoder says of each picture, however often it was killed."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from pydantic import ValidationError

from latentdiff.checkpoint import ModelParts, save_model
from latentdiff.config import load_yaml
from latentdiff.data.buckets import SizesConfig, assign, fit
from latentdiff.data.cache import INDEX, MANIFEST, CacheKey, LatentCache
from latentdiff.data.images import SourceConfig, open_source
from latentdiff.data.live import LiveImages
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.data.store import Store
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import Autoencoder
from training import cache_latents
from training.cache_latents import CacheConfig
from training.encoder import encoder_digest, load_encoder

ROOT = Path(__file__).parents[2]
SCENES = ROOT / "configs" / "tiny" / "scenes.yaml"
CLOSE = {"atol": 2e-3, "rtol": 2e-3}  # half precision on the disk


def run(run_dir: Path | str, parts: Path, /, **overrides: Any) -> None:
    """The program's own main; `a__b=1` means `--a.b 1`."""
    words = ["--config", str(ROOT / "configs" / "tiny" / "cache_latents.yaml")]
    made = {"run_dir": run_dir, "source__path": SCENES, "source__count": 22}
    made |= {"shard_size": 8, "batch_size": 3, "autoencoder": parts, "text_encoder": parts}
    for name, value in (made | overrides).items():
        words += ["--" + name.replace("__", "."), str(value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", ["cache_latents", *words])
        cache_latents.main()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the config, which names its own directory."""
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.name != "config.yaml"
    }


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache") / "whole"
    run(directory, tiny_model)
    return directory


def posterior(model: Path, pictures: np.ndarray) -> Any:
    """diffusers' own, of uint8 [B, H, W, 3], times the scaling factor."""
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    with torch.no_grad():
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = vae.encode(images).latent_dist
    scaling = vae.config.scaling_factor
    return found.mean * scaling, found.logvar + 2 * np.log(scaling)


def test_records_are_the_encoders_moments_and_the_captions_tokens(
    tiny_model: Path, tiny_parts: ModelParts, whole: Path
) -> None:
    scenes = EmojiScenes(load_yaml(ScenesConfig, SCENES))
    latents = LatentCache(whole)
    assert latents.counts == [22]
    captions = [scenes.scene(index).caption for index in range(22)]
    assert latents.captions() == captions
    records = latents.read(range(22))
    assert records.ids.shape == (22, 1, 32)
    assert records.ids[:, 0].equal(tiny_parts.text_encoder.tokenize(captions))
    mean, logvar = posterior(tiny_model, np.stack([scenes[n]["image"] for n in range(22)]))
    assert records.mean.shape == (22, 4, 8, 8)
    torch.testing.assert_close(records.mean, mean, **CLOSE)
    torch.testing.assert_close(records.logvar, logvar, **CLOSE)
    assert records.sizes.unique(dim=0).tolist() == [[64, 64, 0, 0, 64, 64]]
    assert latents.cut == sum(len(caption.encode().replace(b" ", b"")) > 30 for caption in captions)


# Pictures of files, in buckets, some of them unreadable


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of many shapes, two of which cannot be read."""
    import datasets

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(12):
        width, height = rng.integers(30, 140, 2).tolist()
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = folder / f"{number:02d}.png"
        Image.fromarray(noise).save(path)
        path.with_suffix(".txt").write_text(f"picture number {number}")
    (folder / "03.png").write_bytes(b"nonsense")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:-500])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield folder


BUCKETS = {
    "source": "{type: folder, path: PATH}",
    "sizes": "{resolution: 64, buckets: true, step: 16}",
    "flip": "true",
    "max_unreadable": 0.2,
    "shard_size": 3,
    "batch_size": 2,
}


def of_files(folder: Path, **overrides: Any) -> dict[str, Any]:
    made = BUCKETS | {"source": str(BUCKETS["source"]).replace("PATH", str(folder))}
    return {"source__path": folder, "source__type": "folder", "source__count": "null"} | {
        name: value for name, value in (made | overrides).items() if name != "source"
    }


def test_pictures_of_files_in_buckets(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    run(tmp_path, tiny_model, **of_files(pictures))
    latents = LatentCache(tmp_path)
    shapes = SizesConfig(resolution=64, buckets=True, step=16).shapes()
    assert latents.buckets == shapes
    assert latents.unreadable == {"damaged": 1, "unknown format": 1}
    places: dict[int, list[int]] = {bucket: [] for bucket in range(len(shapes))}
    for number in sorted(set(range(12)) - {3, 7}):
        with Image.open(pictures / f"{number:02d}.png") as image:
            places[int(assign(*image.size, shapes))].append(number)
    assert latents.counts == [len(numbers) for numbers in places.values()]
    assert sum(count > 0 for count in latents.counts) > 2
    sample = 0
    for bucket, numbers in places.items():
        for number in numbers:
            with Image.open(pictures / f"{number:02d}.png") as image:
                fitted, top, left = fit(image, shapes[bucket])
                original = image.size
            for flipped in (False, True):
                pixels = np.asarray(fitted)[:, :: -1 if flipped else 1].copy()
                mean, logvar = posterior(tiny_model, pixels[None])
                got = latents.read([sample], [flipped])
                torch.testing.assert_close(got.mean, mean, **CLOSE)
                torch.testing.assert_close(got.logvar, logvar, **CLOSE)
            width, height = shapes[bucket]
            assert got.sizes.tolist() == [[*original[::-1], top, left, height, width]]
            assert latents.captions()[sample] == f"picture number {number}"
            sample += 1
    index = pq.read_table(tmp_path / INDEX).to_pylist()
    status = {row["source"]: row["status"] for row in index if row["status"] != "ok"}
    assert status == {3: "unknown format", 7: "damaged"}


def test_live_images_are_numbered_as_the_cache_is(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    run(tmp_path / "cache", tiny_model, **of_files(pictures))
    latents = LatentCache(tmp_path / "cache")
    _, tokenizers = load_encoder(None, tiny_model, tiny_model)
    source = open_source(SourceConfig(type="folder", path=pictures))
    sizes = SizesConfig(resolution=64, buckets=True, step=16)
    live = LiveImages(source, sizes, tokenizers, Store(tmp_path / "run"))
    assert live.buckets == latents.buckets
    damaged = [sample for sample in range(len(live)) if live.source_row(sample) == 7]
    captions = live.captions()
    assert live.cut() == (0, tokenizers[0].model_max_length)
    lengths = [len(ids) for ids in tokenizers[0](captions)["input_ids"]]
    tokenizers[0].model_max_length = sorted(lengths)[len(lengths) // 2]
    longer = [length > tokenizers[0].model_max_length for length in lengths]
    assert any(longer)
    assert live.cut() == (np.mean(longer), tokenizers[0].model_max_length)
    assert live.cut(most=1) == (longer[0], tokenizers[0].model_max_length)
    tokenizers[0].model_max_length = latents.key.tokens
    readable = [sample for sample in range(len(live)) if sample not in damaged]
    assert [captions[sample] for sample in readable] == latents.captions()
    with pytest.raises(ValueError, match="damaged"):
        live[damaged[0]]
    for number, sample in enumerate(readable):
        item, record = live[sample], latents.read([number])
        mean, _ = posterior(tiny_model, item["image"].permute(1, 2, 0)[None].numpy())
        torch.testing.assert_close(record.mean, mean, **CLOSE)
        assert item["ids"].equal(record.ids[0])
        assert item["size"].equal(record.sizes[0])
    with pytest.raises(IndexError):
        live[len(live)]


@pytest.mark.parametrize("max_unreadable", [0.0, 0.1])
def test_too_many_unreadable_pictures_stop_it(
    tiny_model: Path, pictures: Path, tmp_path: Path, max_unreadable: float
) -> None:
    """One is found by its header, and the other when it is decoded."""
    with pytest.raises(InputError, match=r"of 12 pictures cannot be read \(.*1 unknown format"):
        run(tmp_path, tiny_model, **of_files(pictures, max_unreadable=max_unreadable))
    assert not (tmp_path / MANIFEST).exists()


# Whole models


def test_a_whole_model_gives_the_cache_of_its_parts(
    tiny_model: Path, tiny_parts: ModelParts, whole: Path, tmp_path: Path
) -> None:
    single = tmp_path / "tiny.safetensors"
    save_model(tiny_parts, single)
    for number, model in enumerate((tiny_model, single)):
        run(
            tmp_path / str(number), tiny_model, model=model, autoencoder="null", text_encoder="null"
        )
        assert LatentCache(tmp_path / str(number)).key == LatentCache(whole).key
    assert contents(tmp_path / "0") == contents(whole)


@pytest.mark.parametrize("missing", ["autoencoder", "text_encoder"])
def test_parts_that_are_missing_are_named(tiny_model: Path, tmp_path: Path, missing: str) -> None:
    with pytest.raises(InputError, match="is missing; train it first"):
        run(tmp_path / "cache", tiny_model, **{missing: tmp_path / "absent"})
    with pytest.raises(InputError, match="name autoencoder and text_encoder, or a model"):
        run(tmp_path / "cache", tiny_model, **{missing: "null"})


# Keys


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("survived", [0, 1, 2, 3])
def test_killed_anywhere_the_same_command_continues_to_the_same_bytes(
    tiny_model: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    survived: int,
) -> None:
    writes = itertools.count()
    numbers: list[int] = []
    real = cache_latents.write_shard

    def write(store: Store, key: CacheKey, number: int, records: Any) -> None:
        if next(writes) == survived:
            raise Killed
        real(store, key, number, records)
        numbers.append(number)

    with monkeypatch.context() as patch:
        patch.setattr(cache_latents, "write_shard", write)
        if survived < 3:
            with pytest.raises(Killed):
                run(tmp_path, tiny_model)
            with pytest.raises(InputError, match="no finished latent cache"):
                LatentCache(tmp_path)
        run(tmp_path, tiny_model)
    assert numbers == [0, 1, 2]  # none was made twice
    assert contents(tmp_path) == contents(whole)


def test_processes_share_the_shards_and_the_last_one_finishes(
    tiny_model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three is alone at first; then another one writes shard 2."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    numbers: list[int] = []
    real = cache_latents.write_shard

    def write(store: Store, key: CacheKey, number: int, records: Any) -> None:
        assert not (tmp_path / MANIFEST).exists()
        real(store, key, number, records)
        numbers.append(number)
        for path in whole.glob("shard-000002.*"):
            shutil.copy(path, tmp_path)

    monkeypatch.setattr(cache_latents, "write_shard", write)
    run(tmp_path, tiny_model)
    assert numbers == [1, 0]
    assert contents(tmp_path) == contents(whole)


def test_idle_processes_take_different_shards() -> None:
    missing = [number for number in range(100) if number % 4 == 3]  # one process of four is slow
    turns = [cache_latents.in_turn(missing, rank, 4) for rank in range(4)]
    assert turns[3] == missing
    assert all(sorted(turn) == missing for turn in turns)
    assert len({turn[0] for turn in turns}) == 4
    assert cache_latents.in_turn([0, 1, 2, 3, 4], 1, 2) == [1, 3, 2, 0, 4]


def test_a_finished_cache_that_lost_a_shard_gets_it_again(
    tiny_model: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("shard-000001.*"):
        path.unlink()
    run(tmp_path, tiny_model)
    assert contents(tmp_path) == contents(whole)


def test_a_picture_is_read_once(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(SourceConfig(type="folder", path=pictures))
    expected = hashlib.sha256((pictures / "00.png").read_bytes()).hexdigest()
    opened: list[Path] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode: opened.append(path) or real(path, *mode))
    picture = cache_latents.Pictures(source)[0, (64, 64)]
    assert opened == [pictures / "00.png"]
    assert picture.status == "ok"
    assert picture.sha256 == expected


def test_a_finished_cache_is_not_encoded_again(
    tiny_model: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(whole)
    monkeypatch.setattr(cache_latents, "encode_missing", None)
    run(whole, tiny_model)
    assert contents(whole) == before


@pytest.mark.parametrize("changed", ["batch_size", "workers", "max_unreadable"])
def test_how_it_is_computed_is_not_in_the_key(tiny_model: Path, whole: Path, changed: str) -> None:
    run(whole, tiny_model, **{changed: 1})


def test_workers_make_the_same_bytes(tiny_model: Path, whole: Path, tmp_path: Path) -> None:
    run(tmp_path, tiny_model, workers=2)
    assert contents(tmp_path) == contents(whole)


def test_another_key_is_refused(tiny_model: Path, whole: Path, tmp_path: Path) -> None:
    before = contents(whole)

    def refused(name: str, **overrides: Any) -> None:
        with pytest.raises(InputError, match=f"holds a cache with another {name}; delete it"):
            run(whole, tiny_model, **overrides)

    refused("count", source__count=23)
    refused("shard_size", shard_size=9)
    refused("precision", mixed_precision="bf16")
    refused("shapes", sizes__resolution=32)
    refused("flip", flip="true")
    scenes = tmp_path / "scenes.yaml"
    scenes.write_text(SCENES.read_text().replace("seed: 0", "seed: 1"))
    refused("source", source__path=scenes)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    vae = AutoencoderKL.from_pretrained(other / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.bias += 1
    vae.save_pretrained(other / "vae")
    refused("encoder", autoencoder=other)
    path = other / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("32", "31"))
    refused("tokenizers, tokens", text_encoder=other)
    assert contents(whole) == before


def test_the_encoders_digest_is_of_what_latents_depend_on(tiny_model: Path) -> None:
    autoencoder, _ = load_encoder(None, tiny_model, tiny_model)
    digest = encoder_digest(autoencoder)
    with torch.no_grad():
        autoencoder.vae.decoder.conv_in.bias += 1
        assert encoder_digest(autoencoder) == digest
        autoencoder.vae.quant_conv.bias += 1
        moved = encoder_digest(autoencoder)
    autoencoder.vae.register_to_config(scaling_factor=0.5)
    assert len({digest, moved, encoder_digest(autoencoder)}) == 3


def test_a_size_that_the_vae_does_not_divide_is_refused(tokenizer_of: Any) -> None:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8,) * 5,
        norm_num_groups=4,
    )
    config = CacheConfig(
        run_dir="a",
        model="emoji",
        source=SourceConfig(type="scenes", path=SCENES, count=1),
        sizes=SizesConfig(resolution=72),
    )
    source = open_source(config.source)
    with pytest.raises(InputError, match="72 pixels is no multiple of the VAE's factor, 16"):
        cache_latents.cache_key(config, source, Autoencoder(vae), [tokenizer_of(32)])


def test_latents_that_overflow_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cache_latents.load_encoder

    def loud(*arguments: Any) -> Any:
        autoencoder, tokenizers = real(*arguments)
        with torch.no_grad():
            autoencoder.vae.quant_conv.bias.fill_(1e6)
        return autoencoder, tokenizers

    monkeypatch.setattr(cache_latents, "load_encoder", loud)
    with pytest.raises(InputError, match="not finite with mixed_precision no"):
        run(tmp_path, tiny_model)


def test_a_config_names_a_model_or_its_parts() -> None:
    values = {"run_dir": "a", "source": {"type": "folder", "path": "b"}, "sizes": {"resolution": 8}}
    CacheConfig.model_validate(values | {"model": "emoji"})
    CacheConfig.model_validate(values | {"autoencoder": "c", "text_encoder": "d"})
    for parts in ({}, {"autoencoder": "c"}, {"text_encoder": "d"}):
        with pytest.raises(ValidationError, match="or a model"):
            CacheConfig.model_validate(values | parts)
