"""Text to image: prompts to embeddings to latents to pictures."""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from latentdiff.checkpoint import ModelParts, load_model, save_model
from latentdiff.conditioning import (
    TruncatedPromptWarning,
    chunks,
    condition,
    embed,
    is_guided,
)
from latentdiff.diffusion.denoiser import Denoiser, DenoiserFunction
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.errors import InputError
from latentdiff.hub import model_path
from latentdiff.inputs import Start, blend, read_start
from latentdiff.lora import Adapters
from latentdiff.lora_files import read_lora
from latentdiff.models.preview import LatentPreview
from latentdiff.models.prompt import plain_text
from latentdiff.pictures import ImageSource
from latentdiff.recipe import Lora, Recipe, model_hash
from latentdiff.request import (
    MAX_PICTURES,
    Picture,
    Settings,
    guidance_is_inside,
    read_pictures,
    read_settings,
    whole_number,
)
from latentdiff.sampling import fresh_noise, guided, initial_noise, noise_levels, to_pil
from latentdiff.vocabulary import UnknownWordWarning, Vocabulary

__all__ = ["Progress", "TextToImage", "TruncatedPromptWarning", "UnknownWordWarning", "generate"]


@dataclass(frozen=True)
class Progress:
    """Where TextToImage.stream has got to."""

    step: int
    """Steps taken, over all batches."""
    total: int
    """Steps in all; equal to `step` in the last Progress."""
    images: list[Image.Image]
    """Previews of the batch in work; in the last Progress the finished pictures, all of them."""


class TextToImage:
    """A loaded model. Pictures depend on their prompt, seed and settings alone.

    Args:
        parts: the networks, all on one device; they are this object's from now on.
        offload_to: a device to compute on when the networks are on the CPU: each goes there for
            as long as it is needed, so that the largest alone must fit.
    """

    def __init__(self, parts: ModelParts, offload_to: str | torch.device | None = None) -> None:
        self.parts = parts
        self.vocabulary = Vocabulary(parts.vocabulary) if parts.vocabulary else None
        weight = next(parts.unet.parameters())
        self._dtype = weight.dtype
        self._offload = offload_to is not None
        self._device = weight.device if offload_to is None else torch.device(offload_to)
        if offload_to is None:
            parts.autoencoder.to(self._device)
            parts.text_encoder.to(self._device)
        towers = {name: tower.model for name, tower in parts.towers.items()}
        self.adapters = Adapters({"unet": parts.unet, **towers})
        self._loras: dict[str, Lora] = {}
        self._prediction_type: str | None = None

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        offload: bool = False,
        vae: str | os.PathLike[str] | None = None,
        prediction_type: str | None = None,
    ) -> TextToImage:
        """Read a model, by default the bundled one; see checkpoint.load_model.

        With `offload` the networks wait on the CPU and go to `device` one at a time.
        """
        parts = load_model(model, dtype, "cpu" if offload else device, vae, prediction_type)
        for network in (parts.unet, parts.autoencoder):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        loaded = cls(parts, device if offload else None)
        loaded._prediction_type = prediction_type
        return loaded

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
        """Write the model, fused LoRAs included, with weights stored as `dtype`.

        A path that ends in .safetensors is one file; see checkpoint.save_model.
        """
        save_model(self.parts, path, dtype)

    def load_lora(
        self, path: str | os.PathLike[str], weight: float = 1.0, name: str | None = None
    ) -> str:
        """Attach a LoRA file of diffusers', peft's or kohya's naming, beside those there are.

        Returns its name, by default the file's; see `adapters` for set_weights, fuse, unfuse and
        remove. Raises InputError, and changes nothing, when it does not fit.
        """
        path = Path(path).expanduser().resolve()
        name = name or path.stem
        self.adapters.add(name, read_lora(path), weight)
        self._loras[name] = Lora(file=path.name, sha256=model_hash(path))
        return name

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        image: ImageSource | None = None,
        mask: ImageSource | None = None,
        tile: int | None = None,
        batch_size: int = 8,
        progress: bool = False,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Make pictures from one prompt or several.

        Args:
            prompt: what to show; a list makes a list of pictures. CLIP reads prompts of any length
                and A1111's weights: (word:1.3), [word].
            negative_prompt: what to steer away from, one for all prompts or one for each.
            seed: from 0 to 2**32 - 1. Picture i of a call has seed + i; a list names one for each
                picture; None draws one from the operating system.
            num_images_per_prompt: pictures of the same prompt stand next to each other.
            image: a picture, or its file, to start from; sets height and width.
            mask: white where the image is to be painted anew. Without an inpainting model the rest
                is held at every step; the rest of the result is the image's own in any case.
            tile: encode and decode this many rows of latents at a time, 8 for instance: the same
                picture to rounding, in less memory.
            batch_size: pictures that are made together; no picture depends on it.
            progress: show a bar on stderr.
            height, width: in pixels; by default the size the model was trained at.
            num_inference_steps: 25 by default, or 4 for latent consistency models and from an image
                as many as leave 4; at most the training schedule's length. heun, dpm2 and dpmpp_sde
                call the U-Net twice a step.
            guidance_scale: w of Ho & Salimans (2022) in uncond + w * (cond - uncond). 1 turns
                guidance off, and the negative prompt with it. By default 5 (SDXL), 7.5 (SD), 3 for
                models of emoji scenes, or 1 for latent consistency models that read no scale.
            sampler: a name in diffusion.samplers.SAMPLERS, by default "ddim", "ddpm" for models of
                emoji scenes, or "lcm" for latent consistency models; eta: its stochasticity,
                where it has one.
            spacing: of the noise levels: "trailing", "leading", "linspace", "karras" or
                "exponential"; by default the model's.
            guidance: "cfg" or "apg", adaptive projected guidance (Sadat et al. 2024).
            guidance_rescale: phi of Lin et al. (2023), from 0 to 1.
            guidance_interval: (low, high), the sigmas to guide at (Kynkaanniemi et al. 2024).
            clip_skip: layers of CLIP to leave out, as diffusers counts them, for prompt and
                negative prompt.
            weighted: False takes brackets in prompts literally.
            strength: share of the noise levels that an image is taken back through, 1 by default.
            original_size, crops_coords_top_left, target_size: (height, width) that SDXL reads;
                aesthetic_score, negative_aesthetic_score: that its refiner reads.

        Returns:
            RGB pictures whose `info` holds A1111's `parameters` and the recipe, which
            pictures.save_picture writes; one picture, not a list, for a single prompt string with
            num_images_per_prompt=1.

        Raises:
            InputError: for anything that cannot be done, before any work.

        Warns:
            UnknownWordWarning: a word that the model never saw in training.
            TruncatedPromptWarning: a prompt longer than the text encoder reads.
        """
        steps = self.stream(
            prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            num_images_per_prompt=num_images_per_prompt,
            image=image,
            mask=mask,
            tile=tile,
            batch_size=batch_size,
            previews=False,
            **settings,
        )
        *_, last = _with_bar(steps) if progress else steps
        return last.images[0] if isinstance(prompt, str) and len(last.images) == 1 else last.images

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        image: ImageSource | None = None,
        mask: ImageSource | None = None,
        tile: int | None = None,
        batch_size: int = 8,
        previews: bool = True,
        **settings: Any,
    ) -> Iterator[Progress]:
        """Like generate, step by step: a Progress after each, the last with the finished pictures.

        Everything is checked, and errors are raised, before the iterator is returned. Leaving the
        loop cancels the rest.
        """
        start = read_start(image, mask, self.parts) if image is not None else None
        if image is None and mask is not None:
            raise InputError("mask says where to paint an image anew; give image= too.")
        if start is None and self.parts.inpaints:
            raise InputError("This is an inpainting model; give image= and mask=.")
        if start is not None:
            sizes = {"height": start.height, "width": start.width}
            if any(settings.get(name) not in (None, size) for name, size in sizes.items()):
                raise InputError("The image sets height and width; leave them out, or resize it.")
            settings |= sizes
        asked = read_settings(self.parts, from_image=start is not None, **settings)
        pictures = read_pictures(prompt, negative_prompt, seed, num_images_per_prompt)
        inside = guidance_is_inside(self.parts, asked.guidance_scale)
        if inside and any(picture.negative_prompt for picture in pictures):
            raise InputError(
                "This model was distilled with its guidance; leave negative_prompt out."
            )
        if tile is not None:
            tile = whole_number(tile, "tile", 1, asked.height)
        batch_size = whole_number(batch_size, "batch_size", 1, MAX_PICTURES)
        if self.vocabulary is not None:
            texts = dict.fromkeys(p for q in pictures for p in (q.prompt, q.negative_prompt))
            self.vocabulary.warn(plain_text(t) if asked.weighted else t for t in texts)
        facts = self._facts(start)
        batches = list(self._batches(pictures, asked, batch_size))
        return self._run(batches, asked, start, tile, facts, previews)

    def _run(
        self,
        batches: Sequence[Sequence[Picture]],
        settings: Settings,
        start: Start | None,
        tile: int | None,
        facts: dict[str, Any],
        previews: bool,
    ) -> Iterator[Progress]:
        steps = len(noise_levels(self.parts, settings, start)) - 1
        total, images = steps * len(batches), list[Image.Image]()
        if start is not None:
            with torch.inference_mode(), self._placed(self.parts.autoencoder):
                start = start.encoded(self.parts.autoencoder, self._device, tile)
        if previews:
            _ = self.preview  # fitted now, while no other network is on the device
        for number, batch in enumerate(batches):
            for done, state in enumerate(self._sample(batch, settings, start), number * steps + 1):
                latents, denoised = state
                if done < total:
                    yield Progress(done, total, self._preview(denoised) if previews else [])
            pictures = self._decode(latents, start, tile)
            for image, picture in zip(pictures, batch, strict=True):
                recipe = Recipe(**asdict(picture), **asdict(settings), **facts)
                image.info.update(recipe.to_png_text())
            images += pictures
        yield Progress(total, total, images)

    def _batches(
        self, pictures: Sequence[Picture], settings: Settings, size: int
    ) -> Iterator[list[Picture]]:
        """Neighbours of equally many chunks of tokens, at most `size`."""
        for _, alike in itertools.groupby(pictures, lambda p: chunks(self.parts, p, settings)):
            group = list(alike)
            yield from (group[first : first + size] for first in range(0, len(group), size))

    @torch.inference_mode()
    def _sample(
        self, pictures: Sequence[Picture], settings: Settings, start: Start | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """After each step the latents, scaled as they will be decoded, and the denoised."""
        parts, device = self.parts, self._device
        denoiser: DenoiserFunction = Denoiser(self._network, parts.schedule, parts.parameterization)
        if is_guided(parts, settings):
            denoiser = guided(denoiser, settings)
        sigmas = noise_levels(parts, settings, start).to(device)
        noise = initial_noise(parts, pictures, settings).to(device)
        if start is None or start.from_noise(settings.strength):
            # Algorithm 2 of Ho et al. (2020) starts at x_T ~ N(0, I), x = x_T / sqrt(abar_T).
            x = torch.sqrt(1 + sigmas[0] ** 2) * noise
        else:
            x = start.latents + sigmas[0] * noise
        if start is not None and start.held is not None:
            denoiser = blend(denoiser, start.held, start.latents, noise)
        fresh = functools.partial(fresh_noise, pictures, x)
        options = {} if settings.eta is None else {"eta": settings.eta}
        with self._placed(parts.text_encoder):
            embeddings = embed(parts, pictures, settings)
        with self._placed(parts.unet):
            cond = condition(parts, settings, embeddings, None if start is None else start.extra)
            sampler = SAMPLERS[settings.sampler]
            for step in sampler(denoiser, x, sigmas, cond, noise=fresh, **options):
                yield step.x / math.sqrt(1 + step.sigma**2), step.denoised

    @torch.inference_mode()
    def _decode(self, latents: Tensor, start: Start | None, tile: int | None) -> list[Image.Image]:
        with self._placed(self.parts.autoencoder):
            decoded = self.parts.autoencoder.decode(latents, tile).float().cpu()
        return to_pil(decoded if start is None else start.keep(decoded))

    def _network(self, sample: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        """The U-Net in its own dtype, whatever that of the sampler's x."""
        return self.parts.unet(sample.to(self._dtype), timestep, cond)

    @contextmanager
    def _placed(self, network: nn.Module) -> Iterator[None]:
        """The network is on the device that computes, for as long as it is needed there."""
        if not self._offload:
            yield
            return
        network.to(self._device)
        try:
            yield
        finally:
            network.to("cpu")

    @functools.cached_property
    def preview(self) -> LatentPreview:
        """Latents to pictures for stream; set it to LatentPreview.tiny(...) for sharper ones."""
        with self._placed(self.parts.autoencoder):
            return LatentPreview.fit(self.parts.autoencoder)

    def _preview(self, denoised: Tensor) -> list[Image.Image]:
        height, width = (side * self.parts.autoencoder.scale_factor for side in denoised.shape[2:])
        return self.preview.pictures(denoised, width, height)

    def _facts(self, start: Start | None) -> dict[str, Any]:
        """What a recipe says beside prompt and settings."""
        parts, facts = self.parts, dict[str, Any]()
        facts["prediction_type"] = self._prediction_type
        facts["dtype"] = str(self._dtype).removeprefix("torch.")
        if parts.directory is not None:
            local = Path(parts.name).expanduser().exists()  # whose folders are nobody's business
            facts["model"] = parts.directory.name if local else parts.name
            facts["model_sha256"] = model_hash(parts.directory)
        if parts.other_vae is not None:
            facts["vae_sha256"] = model_hash(parts.other_vae)
        facts["loras"] = tuple(
            self._loras[name].model_copy(update={"weight": weight})
            for name, weight in self.adapters.weights.items()
            if name in self._loras
        )
        return facts if start is None else facts | start.names


def generate(
    prompt: str | Sequence[str],
    model: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Image.Image | list[Image.Image]:
    """TextToImage.generate on the bundled model, or on `model`: a directory, file or hub name.

    The last two models stay loaded. Use TextToImage.load for another dtype or device, and for a
    model that changes on disk.
    """
    return _loaded(model_path(model).resolve()).generate(prompt, **settings)


@functools.lru_cache(maxsize=2)
def _loaded(path: Path) -> TextToImage:
    return TextToImage.load(path)


def _with_bar(steps: Iterator[Progress]) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(unit="step", file=sys.stderr) as bar:
        for progress in steps:
            bar.total = progress.total
            bar.update(progress.step - bar.n)
            yield progress
