"""Encode a data set once: posterior moments and token ids of every sample.

    accelerate launch -m training.cache_latents --config configs/emoji/cache_latents.yaml

Killed anywhere, the same command continues; every process writes shards of its own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from pydantic import Field
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from latentdiff.config import Config, load_config, load_yaml, save_yaml
from latentdiff.data import cache
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.data.sprites import SPRITES_FILE
from latentdiff.errors import InputError, run_command
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.networks import load_tokenizer
from training.data import StepDataset, loader, to_network
from training.loop import Precision

ENCODER_FILES = (Path("vae", "diffusion_pytorch_model.safetensors"), Path("vae", "config.json"))
TOKENIZER_FILE = Path("tokenizer", "tokenizer.json")
TOWER_FILES = (Path("text_encoder", "model.safetensors"), Path("text_encoder", "config.json"))


class CacheConfig(Config):
    """A run of training.cache_latents."""

    run_dir: Path
    """The cache's directory."""
    scenes: Path
    """The scenes' YAML file."""
    autoencoder: Path
    """Directory with vae/, written by training.autoencoder."""
    text_encoder: Path
    """Directory with tokenizer/, written by training.clip."""
    count: int = Field(gt=0)
    """How many scenes."""
    shard_size: int = Field(default=4096, gt=0)
    """Scenes in a shard: what is lost at most when it is stopped."""
    batch_size: int = Field(default=64, gt=0)
    """Scenes encoded together."""
    workers: int = Field(default=0, ge=0)
    """Processes that draw scenes ahead."""
    mixed_precision: Precision = "no"
    """Arithmetic of the encoder."""


class CaptionedScenes(StepDataset):
    """image uint8 [3, H, W] and caption of each scene."""

    def __init__(self, scenes: EmojiScenes) -> None:
        self.scenes = scenes

    def __getitem__(self, index: int) -> dict[str, object]:
        sample = self.scenes[index]
        return {
            "image": torch.from_numpy(sample["image"]).permute(2, 0, 1).contiguous(),
            "caption": sample["caption"],
        }


def digest(directory: Path, *files: Path) -> str:
    """sha256 over the contents of files. Raises InputError when one is missing."""
    total = hashlib.sha256()
    for file in (directory / name for name in files):
        if not file.is_file():
            raise InputError(f"{file} is missing; train it first.")
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def describe(scenes: ScenesConfig) -> str:
    """sha256 of what scenes are a function of: their configuration and the sprites."""
    description = hashlib.sha256(scenes.model_dump_json().encode())
    description.update(digest(SPRITES_FILE.parent, Path(SPRITES_FILE.name)).encode())
    return description.hexdigest()


def main() -> None:
    config = load_config(CacheConfig)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=config.mixed_precision
    )
    scenes = EmojiScenes(load_yaml(ScenesConfig, config.scenes))
    hashes = {
        "encoder": digest(config.autoencoder, *ENCODER_FILES),
        "tokenizer": digest(config.text_encoder, TOKENIZER_FILE),
    }
    vae = AutoencoderKL.from_pretrained(config.autoencoder / "vae").eval()
    tokenizer = load_tokenizer(config.text_encoder / "tokenizer")
    autoencoder = Autoencoder(vae).to(accelerator.device)
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side = scenes.config.resolution // autoencoder.scale_factor
    key = cache.CacheKey(
        **hashes,
        source=describe(scenes.config),
        precision=config.mixed_precision,
        count=config.count,
        shard_size=config.shard_size,
        latent_shape=(autoencoder.latent_channels, side, side),
        tokens=tokenizer.model_max_length,
    )
    if accelerator.is_main_process:
        cache.prepare(config.run_dir, key)
        save_yaml(config, config.run_dir / "config.yaml")
    accelerator.wait_for_everyone()
    missing = cache.missing_shards(config.run_dir, key)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    total = sum(len(key.samples(number)) for number in mine)
    bar = tqdm(total=total, unit="images", disable=not accelerator.is_main_process)
    for number in mine:
        records = encode_shard(
            autoencoder, tokenizer, scenes, key.samples(number), config, accelerator, bar
        )
        cache.write_shard(config.run_dir, number, records)
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        cache.finish(config.run_dir, key)
        print(f"finished: {config.run_dir}")
    accelerator.end_training()


@torch.inference_mode()
def encode_shard(
    autoencoder: Autoencoder,
    tokenizer: PreTrainedTokenizerBase,
    scenes: EmojiScenes,
    samples: range,
    config: CacheConfig,
    accelerator: Accelerator,
    bar: tqdm,  # type: ignore[type-arg]
) -> cache.Records:
    """Records of consecutive samples."""
    means, logvars, captions = [], [], []
    first, last, size = samples.start, samples.stop, config.batch_size
    orders = [list(range(start, min(start + size, last))) for start in range(first, last, size)]
    for _, batch in loader(CaptionedScenes(scenes), orders, config.workers):
        with accelerator.autocast():
            posterior = autoencoder.encode(to_network(batch["image"], accelerator.device))
        means.append(posterior.mean.cpu().numpy().astype(np.float16))
        logvars.append(posterior.logvar.cpu().numpy().astype(np.float16))
        captions += batch["caption"]
        bar.update(len(batch["caption"]))
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")
    return cache.Records(
        np.concatenate(means),
        np.concatenate(logvars),
        ids["input_ids"].astype(np.int32),
        captions,
    )


if __name__ == "__main__":
    run_command(main)
