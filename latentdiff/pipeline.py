"""Text to image: prompts to embeddings to latents to pictures."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.checkpoint import ModelParts, load_model, save_model
from latentdiff.diffusion.denoiser import Denoiser, DenoiserFunction
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.errors import InputError
from latentdiff.model_files import model_directory
from latentdiff.models.unet import TextKeysValues
from latentdiff.request import (
    Picture,
    Settings,
    check_sampler,
    check_scale,
    check_side,
    read_pictures,
    whole_number,
)
from latentdiff.rng import keyed_normal, picture_noise
from latentdiff.vocabulary import UnknownWordWarning, Vocabulary

__all__ = ["TextToImage", "TruncatedPromptWarning", "UnknownWordWarning", "generate"]

BATCH = 8
"""Pictures that are made together; no picture depends on it."""


class TruncatedPromptWarning(UserWarning):
    """A prompt has more tokens than the text encoder reads."""


class TextToImage:
    """A loaded model. Pictures depend on their prompt, seed and settings alone."""

    def __init__(self, parts: ModelParts) -> None:
        self.parts = parts
        self.vocabulary = Vocabulary(parts.vocabulary) if parts.vocabulary else None
        weight = next(parts.unet.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        parts.autoencoder.to(self._device)
        parts.text_encoder.to(self._device)
        for network in (parts.unet, parts.autoencoder):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> TextToImage:
        """Read a model directory, by default the bundled model; see checkpoint.load_model."""
        return cls(load_model(model, dtype, device))

    def save(self, directory: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write a model directory with weights stored as `dtype`; see checkpoint.save_model."""
        save_model(self.parts, directory, dtype)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        sampler: str = "ddim",
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
    ) -> Image.Image | list[Image.Image]:
        """Make pictures from one prompt or several.

        Args:
            prompt: what to show; a list makes a list of pictures.
            negative_prompt: what to steer away from, one for all prompts or one for each.
            height, width: in pixels; by default the size the model was trained at.
            num_inference_steps: calls of the U-Net, from 1 to the training schedule's length.
            guidance_scale: w of Ho & Salimans (2022) in uncond + w * (cond - uncond). 1 turns
                guidance off, and the negative prompt with it.
            sampler: a name in diffusion.samplers.SAMPLERS.
            seed: from 0 to 2**32 - 1. Picture i of a call has seed + i; a list names one for each
                picture; None draws one from the operating system.
            num_images_per_prompt: pictures of the same prompt stand next to each other.

        Returns:
            RGB pictures whose `info` holds prompt, seed and settings; one picture, not a list,
            for a single prompt string with num_images_per_prompt=1.

        Raises:
            InputError: for anything that cannot be done, before any work.

        Warns:
            UnknownWordWarning: a word that the model never saw in training.
            TruncatedPromptWarning: a prompt longer than the text encoder reads.
        """
        settings = self._settings(height, width, num_inference_steps, guidance_scale, sampler)
        pictures = read_pictures(prompt, negative_prompt, seed, num_images_per_prompt)
        self._warn_of_unknown_words(pictures)
        images: list[Image.Image] = []
        for start in range(0, len(pictures), BATCH):
            images += self._make(pictures[start : start + BATCH], settings)
        return images[0] if isinstance(prompt, str) and len(images) == 1 else images

    @torch.inference_mode()
    def _make(self, pictures: Sequence[Picture], settings: Settings) -> list[Image.Image]:
        parts = self.parts
        sigmas = self._sigmas(settings)
        texts = [picture.prompt for picture in pictures]
        denoiser: DenoiserFunction = Denoiser(self._network, parts.schedule, parts.parameterization)
        if settings.guidance_scale != 1:
            texts = [picture.negative_prompt for picture in pictures] + texts
            denoiser = ClassifierFreeGuidance(denoiser, settings.guidance_scale)
        text = parts.unet.project_text(self._embed(texts))

        # Algorithm 2 of Ho et al. (2020) starts at x_T ~ N(0, I); x = x_T / sqrt(alphas_cumprod).
        x = torch.sqrt(1 + sigmas[0] ** 2) * self._noise(pictures, settings)
        fresh = functools.partial(_fresh_noise, pictures, x)
        for step in SAMPLERS[settings.sampler](denoiser, x, sigmas, text, noise=fresh):
            x = step.x
        latents = x / torch.sqrt(1 + sigmas[-1] ** 2)

        images = _to_pil(parts.autoencoder.decode(latents.to(self._dtype)))
        for image, picture in zip(images, pictures, strict=True):
            image.info.update(asdict(picture), **asdict(settings))
        return images

    def _network(self, sample: Tensor, timestep: Tensor, text: TextKeysValues) -> Tensor:
        """The U-Net in its own dtype, whatever that of the sampler's x."""
        return self.parts.unet(sample.to(self._dtype), timestep, text)

    def _settings(
        self,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        sampler: str,
    ) -> Settings:
        parts = self.parts
        factor = parts.autoencoder.scale_factor
        default = parts.unet.config.sample_size * factor
        multiple = factor * parts.unet.downsampling
        most = parts.scheduler_config.num_train_timesteps
        return Settings(
            check_side(height, "height", default, multiple),
            check_side(width, "width", default, multiple),
            whole_number(num_inference_steps, "num_inference_steps", 1, most),
            check_scale(guidance_scale),
            check_sampler(sampler, list(SAMPLERS)),
        )

    def _sigmas(self, settings: Settings) -> Tensor:
        """The noise levels [N + 1] that sampling visits, descending."""
        config, schedule = self.parts.scheduler_config, self.parts.schedule
        sigmas = schedule.sampling_sigmas(
            settings.num_inference_steps, config.timestep_spacing, config.steps_offset
        )
        if settings.sampler == "ddim" and not config.set_alpha_to_one:
            sigmas[-1] = schedule.sigmas[0]
        return sigmas.to(self._device)

    def _noise(self, pictures: Sequence[Picture], settings: Settings) -> Tensor:
        """Initial noise [B, C, h, w], one generator for each picture."""
        factor = self.parts.autoencoder.scale_factor
        shape = (
            self.parts.autoencoder.latent_channels,
            settings.height // factor,
            settings.width // factor,
        )
        return picture_noise([picture.seed for picture in pictures], shape).to(self._device)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        """[B, L, D], each distinct text encoded once."""
        distinct = list(dict.fromkeys(texts))
        embeddings = self.parts.text_encoder.encode(distinct)
        for rest in embeddings.truncated:
            warnings.warn(
                f"The prompt is longer than {embeddings.ids.shape[1]} tokens; "
                f"the model does not read its end: {rest!r}.",
                TruncatedPromptWarning,
                stacklevel=5,
            )
        return embeddings.hidden[[distinct.index(text) for text in texts]]

    def _warn_of_unknown_words(self, pictures: Sequence[Picture]) -> None:
        if self.vocabulary is None:
            return
        texts = dict.fromkeys(p for q in pictures for p in (q.prompt, q.negative_prompt))
        unknown = {w: near for text in texts for w, near in self.vocabulary.unknown(text).items()}
        for word, near in unknown.items():
            warnings.warn(
                f"This model never saw the word {word!r}; the nearest it knows: {', '.join(near)}.",
                UnknownWordWarning,
                stacklevel=3,
            )


def generate(
    prompt: str | Sequence[str],
    model: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Image.Image | list[Image.Image]:
    """TextToImage.generate on the bundled model, or on the model directory `model`.

    The last two models stay loaded; use TextToImage.load for a model that changes on disk.
    """
    return _loaded(model_directory(model).resolve()).generate(prompt, **settings)


@functools.lru_cache(maxsize=2)
def _loaded(directory: Path) -> TextToImage:
    return TextToImage.load(directory)


def _fresh_noise(pictures: Sequence[Picture], x: Tensor, index: int) -> Tensor:
    """Noise [B, C, h, w] for step `index` of a stochastic sampler, keyed by each picture's seed."""
    rows = [keyed_normal(p.seed, "sampler", index, [0], tuple(x.shape[1:])) for p in pictures]
    return torch.cat(rows).to(x.device)


def _to_pil(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in [-1, 1] to 8-bit RGB. Raises InputError where they are not finite."""
    if not torch.isfinite(images).all():
        raise InputError(
            "The model computed values that are not finite; its weights are damaged, or they "
            "overflow in this dtype and need float32."
        )
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]
