"""Train the U-Net on cached latents, conditioned on text and timestep.

accelerate launch -m training.diffusion --config configs/emoji/diffusion.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from pydantic import Field
from torch import nn

from latentdiff.checkpoint import ModelParts, load_model, save_model
from latentdiff.config import load_config, load_yaml
from latentdiff.data.cache import LatentCache
from latentdiff.data.order import step_orders
from latentdiff.data.scenes import ScenesConfig
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.loss import diffusion_loss, min_snr, uniform
from latentdiff.errors import InputError, run_command
from latentdiff.models.autoencoder import Autoencoder, Posterior
from latentdiff.models.blocks import BasicTransformerBlock
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.networks import load_text_encoder
from latentdiff.pipeline import TextToImage
from latentdiff.rng import keyed_normal, keyed_uniform
from latentdiff.scheduler_config import SchedulerConfig
from training.cache_latents import ENCODER_FILES, TOKENIZER_FILE, TOWER_FILES, digest
from training.loop import Losses, RunConfig, make_accelerator, seeded, train
from training.pictures import grid


class DiffusionConfig(RunConfig):
    """A run of training.diffusion."""

    cache: Path
    """The latent cache, written by training.cache_latents."""
    autoencoder: Path
    """Directory with vae/, the one that the cache was made with."""
    text_encoder: Path
    """Directory with text_encoder/ and tokenizer/: CLIP, T5, BERT or GPT-2, kept frozen."""
    scenes: Path | None = None
    """The scenes' YAML file; the finished model then says what it knows."""
    init_from: Path | None = None
    """A model directory whose U-Net's weights the run starts from instead of random ones."""
    scheduler: SchedulerConfig
    """The noise schedule, and what the U-Net predicts."""
    unet: UNetConfig
    """The network."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """gamma of the loss weights of Hang et al. (2023); none for uniform weights."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    sample_prompts: tuple[str, ...] = Field(min_length=1)
    """What the sample grids show."""
    sample_guidance_scale: float = Field(default=4.0, ge=1)
    """Guidance scale of the sample grids."""


class DiffusionProgram:
    """Algorithm 1 of Ho et al. (2020) on latents (Rombach et al. 2022)."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.cache = LatentCache(config.cache)
        if len(self.cache) < config.batch_size:
            raise InputError(
                f"{config.cache} holds {len(self.cache)} samples, fewer than one batch of "
                f"{config.batch_size}."
            )
        if self.cache.key.encoder != digest(config.autoencoder, *ENCODER_FILES):
            raise InputError(
                f"{config.cache} was not made with the autoencoder in {config.autoencoder}; make "
                "the cache again or name its own autoencoder."
            )
        if self.cache.key.tokenizer != digest(config.text_encoder, TOKENIZER_FILE):
            raise InputError(
                f"{config.cache} was not made with the tokenizer in {config.text_encoder}; make "
                "the cache again or name its own text encoder."
            )
        self.parts = assemble(config)
        self.network = self.parts.unet
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.text_encoder = self.parts.text_encoder.requires_grad_(False).eval()
        self.empty = self.text_encoder.tokenize([""])
        gamma = config.min_snr_gamma
        self.weighting = uniform if gamma is None else min_snr(gamma)
        self.inputs = {
            "latent cache": self.cache.key.digest,
            "text encoder": digest(config.text_encoder, *TOWER_FILES),
        }

    def batches(self, steps: range, rank: int, processes: int) -> Iterator[Any]:
        config = self.config
        orders = step_orders(
            config.seed, len(self.cache), config.batch_size, steps, rank, processes
        )
        for epoch, samples in orders:
            yield epoch, samples, self.cache.read(samples)

    def losses(self, network: Callable[..., Any], batch: Any, device: torch.device) -> Losses:
        epoch, samples, (mean, logvar, ids) = batch
        seed, shape = self.config.seed, tuple(mean.shape[1:])
        posterior_noise = keyed_normal(seed, "posterior", epoch, samples, shape)
        x0 = Posterior(mean, logvar).sample(posterior_noise)
        noise = keyed_normal(seed, "noise", epoch, samples, shape)
        schedule = self.parts.schedule
        timestep = (keyed_uniform(seed, "timestep", epoch, samples) * len(schedule.sigmas)).long()
        dropped = keyed_uniform(seed, "caption", epoch, samples) < self.config.caption_dropout
        ids = torch.where(dropped[:, None], self.empty, ids).to(device)
        with torch.no_grad():
            text = self.text_encoder.to(device).encode_ids(ids)
        denoiser = Denoiser(network, schedule, self.parts.parameterization)
        x0, noise = (
            values.to(device).contiguous(memory_format=torch.channels_last)
            for values in (x0, noise)
        )
        sigma = schedule.sigmas[timestep].to(device)
        loss = diffusion_loss(denoiser, x0, sigma, noise, text, self.weighting)
        return {"loss": loss.mean()}

    def samples(self, device: torch.device) -> Image.Image:
        """The configured prompts, two seeds each, by the pipeline that users run."""
        prompts = list(self.config.sample_prompts)
        pictures = TextToImage(self.parts).generate(
            prompts,
            num_images_per_prompt=2,
            guidance_scale=self.config.sample_guidance_scale,
            seed=list(range(2 * len(prompts))),
        )
        assert isinstance(pictures, list)
        return grid(pictures, columns=12, scale=2)

    def finish(self, directory: Path, device: torch.device) -> None:
        save_model(self.parts, directory, torch.float16)


def assemble(config: DiffusionConfig) -> ModelParts:
    """The parts that a run trains and conditions on.

    Raises InputError when a directory is missing or the parts do not fit one another.
    """
    for path in (config.autoencoder / "vae", config.text_encoder / "text_encoder"):
        if not path.is_dir():
            raise InputError(f"{path} is missing; train it first.")
    autoencoder = Autoencoder(AutoencoderKL.from_pretrained(config.autoencoder / "vae").eval())
    text_encoder = load_text_encoder(config.text_encoder)
    if config.unet.cross_attention_dim != text_encoder.hidden_size:
        raise InputError(
            f"unet.cross_attention_dim is {config.unet.cross_attention_dim}, but the text encoder "
            f"is {text_encoder.hidden_size} wide; make them equal."
        )
    for name in ("in_channels", "out_channels"):
        if getattr(config.unet, name) != autoencoder.latent_channels:
            raise InputError(
                f"unet.{name} is {getattr(config.unet, name)}, but the autoencoder's latents have "
                f"{autoencoder.latent_channels} channels; make them equal."
            )
    with seeded(config.seed):
        unet = UNet(config.unet)
        open_to_text(unet)
    if config.init_from is not None:
        try:
            unet.load_state_dict(load_model(config.init_from).unet.state_dict())
        except RuntimeError:
            raise InputError(
                f"init_from, {config.init_from}, has a U-Net of another shape; make unet equal to "
                "its unet/config.json."
            ) from None
    vocabulary = load_yaml(ScenesConfig, config.scenes) if config.scenes else None
    return ModelParts(unet, autoencoder, text_encoder, config.scheduler, vocabulary)


TEXT_GAIN = 2.0
"""Gain of the values and outputs of cross-attention at the start."""


@torch.no_grad()
def open_to_text(unet: UNet) -> None:
    """Initial weights: PyTorch's, but the prediction zero and cross-attention orthogonal and loud.

    At first attention averages over all tokens, and what is left of one caption's difference from
    another is small beside the features it is added to. Louder, it is learned from in half the
    steps; so it is with residual branches that do not start at zero.
    """
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            for name in ("to_v.weight", "to_out.0.weight"):
                nn.init.orthogonal_(module.attn2.get_parameter(name), TEXT_GAIN)
    unet.conv_out.weight.zero_()


def main() -> None:
    config = load_config(DiffusionConfig)
    accelerator = make_accelerator(config)
    train(DiffusionProgram(config), config, accelerator)


if __name__ == "__main__":
    run_command(main)
