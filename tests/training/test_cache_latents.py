"""The latent cache: what the encoder says of each scene, however often it was killed."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers import CLIPTokenizer

from latentdiff.config import load_yaml
from latentdiff.data import cache
from latentdiff.data.cache import LatentCache
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.errors import InputError
from training import cache_latents

SIZES = {"count": 22, "shard_size": 8, "batch_size": 3}


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the config, which names its own directory."""
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.name != "config.yaml"
    }


@pytest.fixture(scope="module")
def whole(tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache") / "whole"
    tiny_chain.run("cache_latents", run_dir=directory, **SIZES)
    return directory


def test_records_are_the_encoders_moments_and_the_captions_tokens(
    tiny_chain: Any, whole: Path
) -> None:
    config = tiny_chain.config("cache_latents")
    scenes = EmojiScenes(load_yaml(ScenesConfig, config.scenes))
    vae = AutoencoderKL.from_pretrained(config.autoencoder / "vae").eval()
    tokenizer = CLIPTokenizer.from_pretrained(config.text_encoder / "tokenizer")
    latents = LatentCache(whole)
    assert len(latents) == 22
    captions = [scenes.scene(index).caption for index in range(22)]
    assert latents.captions() == captions
    mean, logvar, ids = latents.read(range(22))
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt")["input_ids"]
    assert ids.equal(tokens)
    pictures = np.stack([scenes[index]["image"] for index in range(22)])
    with torch.no_grad():
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(images).latent_dist
    assert mean.shape == (22, 4, 8, 8)
    close = {"atol": 2e-3, "rtol": 2e-3}  # half precision on the disk
    torch.testing.assert_close(mean, posterior.mean, **close)
    torch.testing.assert_close(logvar, posterior.logvar, **close)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("survived", [0, 1, 2, 3])
def test_killed_anywhere_the_same_command_continues_to_the_same_bytes(
    tiny_chain: Any,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    survived: int,
) -> None:
    writes = itertools.count()
    numbers: list[int] = []
    real = cache.write_shard

    def write(directory: Path, number: int, records: cache.Records) -> None:
        if next(writes) == survived:
            raise Killed
        real(directory, number, records)
        numbers.append(number)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_shard", write)
        if survived < 3:
            with pytest.raises(Killed):
                tiny_chain.run("cache_latents", run_dir=tmp_path, **SIZES)
            with pytest.raises(InputError, match="no finished latent cache"):
                LatentCache(tmp_path)
        tiny_chain.run("cache_latents", run_dir=tmp_path, **SIZES)
    assert numbers == [0, 1, 2]  # none was made twice
    assert contents(tmp_path) == contents(whole)


def test_a_finished_cache_is_not_encoded_again(
    tiny_chain: Any, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(whole)
    monkeypatch.setattr(cache_latents, "encode_shard", None)
    tiny_chain.run("cache_latents", run_dir=whole, **SIZES)
    assert contents(whole) == before


@pytest.mark.parametrize("changed", ["batch_size", "workers"])
def test_how_it_is_computed_is_not_in_the_key(tiny_chain: Any, whole: Path, changed: str) -> None:
    tiny_chain.run("cache_latents", run_dir=whole, **(SIZES | {changed: 1}))


def test_another_key_is_refused(tiny_chain: Any, whole: Path, tmp_path: Path) -> None:
    before = contents(whole)

    def refused(name: str, **overrides: Any) -> None:
        with pytest.raises(InputError, match=f"holds a cache with another {name}; delete it"):
            tiny_chain.run("cache_latents", run_dir=whole, **(SIZES | overrides))

    refused("count", count=23)
    refused("shard_size", shard_size=9)
    refused("precision", mixed_precision="bf16")

    scenes = tmp_path / "scenes.yaml"
    text = (tiny_chain.configs / "scenes.yaml").read_text()
    scenes.write_text(text.replace("seed: 0", "seed: 1"))
    refused("source", scenes=scenes)

    for part, name, file in (
        ("autoencoder", "encoder", "vae/diffusion_pytorch_model.safetensors"),
        ("clip", "tokenizer", "tokenizer/tokenizer.json"),
    ):
        other = tmp_path / part
        shutil.copytree(tiny_chain.run_dir(part) / "model", other)
        if name == "encoder":
            vae = AutoencoderKL.from_pretrained(other / "vae")
            with torch.no_grad():
                vae.quant_conv.bias += 1
            vae.save_pretrained(other / "vae")
        else:
            path = other / file
            path.write_text(path.read_text() + "\n")
        option = "autoencoder" if name == "encoder" else "text_encoder"
        refused(name, **{option: other})
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("option", "file"),
    [("autoencoder", "diffusion_pytorch_model.safetensors"), ("text_encoder", "tokenizer.json")],
)
def test_an_untrained_part_is_named(
    tiny_chain: Any, tmp_path: Path, option: str, file: str
) -> None:
    with pytest.raises(InputError, match=f"{file} is missing; train it first"):
        tiny_chain.run("cache_latents", run_dir=tmp_path, **{option: tmp_path / "absent"})
