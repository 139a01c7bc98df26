"""What a call of generate asks for, checked before any work."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentdiff.errors import InputError

if TYPE_CHECKING:
    from latentdiff.checkpoint import ModelParts

MAX_PICTURES = 1024
MAX_SIDE = 8192
MAX_PROMPT_CHARACTERS = 10_000
MAX_SEED = 2**32 - 1
"""Of more than 32 bits PyTorch's generator on the CPU reads the lower ones alone."""

SPACINGS = ("trailing", "leading", "linspace", "karras", "exponential")
GUIDANCE = ("cfg", "apg")


@dataclass(frozen=True)
class Picture:
    """One picture that is asked for."""

    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """How all pictures of a call are made; sizes are (height, width) in pixels.

    Named as in TextToImage.generate and recipe.Recipe. None is what the model does by itself, or
    what it has no use for.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    guidance: str
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    eta: float | None
    spacing: str | None
    clip_skip: int | None
    weighted: bool
    strength: float | None
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None


def read_settings(
    parts: ModelParts,
    *,
    from_image: bool,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    guidance: str = "cfg",
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    clip_skip: int | None = None,
    weighted: bool = True,
    strength: float | None = None,
    original_size: tuple[int, int] | None = None,
    crops_coords_top_left: tuple[int, int] | None = None,
    target_size: tuple[int, int] | None = None,
    aesthetic_score: float | None = None,
    negative_aesthetic_score: float | None = None,
) -> Settings:
    """The settings of one call with the model's defaults; see TextToImage.generate.

    Raises InputError for a value that cannot be, and for one that the model has no use for.
    """
    factor = parts.autoencoder.scale_factor
    default = parts.unet.config.sample_size * factor
    height = check_side(height, "height", default, factor)
    width = check_side(width, "width", default, factor)
    most = parts.scheduler_config.num_train_timesteps
    if num_inference_steps is None:
        num_inference_steps = default_steps(parts, 1.0 if strength is None else strength)
    steps = whole_number(num_inference_steps, "num_inference_steps", 1, most)
    if guidance_scale is None:
        guidance_scale = default_guidance_scale(parts)
    sampler = check_sampler(default_sampler(parts) if sampler is None else sampler)
    if eta is not None:
        eta = number(eta, "eta", 0, math.inf)
        if not takes_eta(sampler):
            raise InputError(f"The sampler {sampler} has no eta; leave it out.")
    if not from_image and strength is not None:
        raise InputError("strength says how far to change an image; give image= too.")
    rescale = number(guidance_rescale, "guidance_rescale", 0, 1)
    if rescale and guidance != "cfg":
        raise InputError("guidance_rescale belongs to the guidance cfg; leave one of them out.")
    if clip_skip is not None:
        clip_skip = whole_number(clip_skip, "clip_skip", 0, 64)
        parts.text_encoder.check_clip_skip(clip_skip)
    further = rescale or guidance != "cfg" or guidance_interval is not None
    if guidance_is_inside(parts, guidance_scale) and further:
        raise InputError(
            "This model was distilled with its guidance; it has a guidance_scale alone."
        )
    size = (height, width)
    if not is_sdxl(parts):
        _refuse(
            "SDXL",
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
        )
    else:  # Podell et al. (2023), section 2.2: by default an uncropped picture of the size made
        original_size = check_pair(original_size or size, "original_size")
        corner = crops_coords_top_left or (0, 0)
        crops_coords_top_left = check_pair(corner, "crops_coords_top_left")
        target_size = check_pair(target_size or size, "target_size")
    if not parts.requires_aesthetics_score:
        _refuse(
            "SDXL's refiner",
            aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score,
        )
    else:  # diffusers' defaults
        good, bad = aesthetic_score, negative_aesthetic_score
        aesthetic_score = number(6.0 if good is None else good, "aesthetic_score", 0, 10)
        bad = 2.5 if bad is None else bad
        negative_aesthetic_score = number(bad, "negative_aesthetic_score", 0, 10)
    return Settings(
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=number(guidance_scale, "guidance_scale", 0, math.inf),
        sampler=sampler,
        guidance=check_choice(guidance, "guidance", GUIDANCE),
        guidance_rescale=rescale,
        guidance_interval=check_interval(guidance_interval),
        eta=eta,
        spacing=None if spacing is None else check_choice(spacing, "spacing", SPACINGS),
        clip_skip=clip_skip,
        weighted=bool(weighted),
        strength=check_strength(1.0 if strength is None else strength, steps)
        if from_image
        else None,
        original_size=original_size,
        crops_coords_top_left=crops_coords_top_left,
        target_size=target_size,
        aesthetic_score=aesthetic_score,
        negative_aesthetic_score=negative_aesthetic_score,
    )


FEW_STEPS = 4
"""What latent consistency models draw in."""


def default_steps(parts: ModelParts, strength: Any) -> int:
    """25; of models distilled to draw in few as many as leave 4 of `strength`, if that is one."""
    if not draws_in_few_steps(parts):
        return 25
    share = number(strength, "strength", 0, 1)
    most = parts.scheduler_config.num_train_timesteps
    return min(math.ceil(FEW_STEPS / max(share, FEW_STEPS / most)), most)


def default_sampler(parts: ModelParts) -> str:
    """lcm for models distilled for it; ddpm for the bundled model's kind, whose fresh noise undoes
    what began in two places; else ddim.
    """
    if draws_in_few_steps(parts):
        return "lcm"
    return "ddim" if parts.vocabulary is None else "ddpm"


def default_guidance_scale(parts: ModelParts) -> float:
    """3 for the bundled model's kind, and what people use: 5 for SDXL, 7.5 for Stable Diffusion.

    1 where the guidance is in the weights.
    """
    if draws_in_few_steps(parts) and not is_distilled(parts):
        return 1.0
    if parts.vocabulary is not None:
        return 3.0
    return 5.0 if is_sdxl(parts) else 7.5


def draws_in_few_steps(parts: ModelParts) -> bool:
    """Whether it is a latent consistency model (Luo et al. 2023), as its scheduler says."""
    from latentdiff.scheduler_config import LCM

    return parts.scheduler_config.class_name == LCM


def is_sdxl(parts: ModelParts) -> bool:
    """Whether the U-Net also reads a pooled embedding and sizes (Podell et al. 2023)."""
    return parts.unet.config.addition_embed_type is not None


def is_distilled(parts: ModelParts) -> bool:
    """Whether the U-Net reads the guidance scale (Luo et al. 2023) and so runs once a step."""
    return parts.unet.config.time_cond_proj_dim is not None


def guidance_is_inside(parts: ModelParts, guidance_scale: float) -> bool:
    """Whether the U-Net's weights guide by themselves, so that nothing else can."""
    return is_distilled(parts) or (draws_in_few_steps(parts) and guidance_scale == 1)


def _refuse(whose: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} conditions {whose}; this model does not read it.")


def read_pictures(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    seed: int | Sequence[int] | None,
    num_images_per_prompt: int,
) -> list[Picture]:
    """The pictures of one call, in order. Raises InputError when they cannot be made."""
    prompts = [prompt] if isinstance(prompt, str) else _texts(prompt, "prompt")
    for text in prompts:
        if not text.strip():
            raise InputError("The prompt is empty; say what the picture shows.")
    if isinstance(negative_prompt, str):
        negatives = [negative_prompt] * len(prompts)
    else:
        negatives = _texts(negative_prompt, "negative_prompt")
    if len(negatives) != len(prompts):
        raise InputError(
            f"There are {len(negatives)} negative prompts for {len(prompts)} prompts; give one "
            "for all or one for each."
        )
    if any("\ud800" <= letter <= "\udfff" for text in (*prompts, *negatives) for letter in text):
        raise InputError("A prompt holds half a character (an unpaired surrogate); remove it.")
    if any(len(text) > MAX_PROMPT_CHARACTERS for text in (*prompts, *negatives)):
        raise InputError(f"A prompt is longer than {MAX_PROMPT_CHARACTERS} characters; shorten it.")
    copies = whole_number(num_images_per_prompt, "num_images_per_prompt", 1, MAX_PICTURES)
    count = len(prompts) * copies
    if not 1 <= count <= MAX_PICTURES:
        raise InputError(f"{count} pictures in one call; ask for 1 to {MAX_PICTURES}.")
    seeds = _seeds(seed, count)
    return [Picture(prompts[i // copies], negatives[i // copies], seeds[i]) for i in range(count)]


def whole_number(value: Any, name: str, least: int, most: int) -> int:
    """`value` as an int in [least, most]. Raises InputError otherwise."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool) or not least <= whole <= most:
        raise InputError(f"{name} is {value!r}; it must be a whole number from {least} to {most}.")
    return whole


def number(value: Any, name: str, least: float, most: float) -> float:
    """`value` as a finite float in [least, most]. Raises InputError otherwise."""
    try:
        real = float(value)
    except (TypeError, ValueError):
        real = math.nan
    if not (math.isfinite(real) and least <= real <= most):
        limits = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
        raise InputError(f"{name} is {value!r}; it must be a finite number, {limits}.")
    return real


def check_strength(value: Any, steps: int) -> float:
    """A share of the noise levels, at least one step. Raises InputError otherwise."""
    strength = number(value, "strength", 0, 1)
    if int(steps * strength) < 1:
        raise InputError(
            f"strength {strength:g} of {steps} steps leaves none to take; raise one of them."
        )
    return strength


def check_interval(value: Any) -> tuple[float, float] | None:
    """Noise levels (low, high), low < high. Raises InputError otherwise."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"guidance_interval is {value!r}; give two noise levels, low and high.")
    low, high = (number(level, "guidance_interval", 0, math.inf) for level in value)
    if low >= high:
        raise InputError(f"guidance_interval is {value!r}; the first level must be the lower one.")
    return low, high


def check_pair(value: Any, name: str) -> tuple[int, int]:
    """(height, width) in pixels, 0 or more. Raises InputError otherwise."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"{name} is {value!r}; give two numbers of pixels, vertical first.")
    first, second = (whole_number(side, name, 0, 1 << 16) for side in value)
    return first, second


def check_side(value: Any, name: str, default: int, multiple: int) -> int:
    """A height or width in pixels. Raises InputError when the model cannot make it."""
    side = whole_number(default if value is None else value, name, multiple, MAX_SIDE)
    if side % multiple:
        raise InputError(
            f"{name} is {side}; this model makes multiples of {multiple}, for example "
            f"{side - side % multiple} or {side - side % multiple + multiple}."
        )
    return side


def check_choice(name: Any, what: str, known: Sequence[str]) -> str:
    """One of `known`. Raises InputError listing them."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"There is no {what} {name!r}; {meant}There are {', '.join(known)}.")
    return str(name)


def check_sampler(name: Any) -> str:
    """The name of a sampler. Raises InputError listing those there are."""
    from latentdiff.diffusion.samplers import SAMPLERS

    return check_choice(name, "sampler", list(SAMPLERS))


def takes_eta(sampler: str) -> bool:
    """Whether a sampler has a parameter eta."""
    from latentdiff.diffusion.samplers import SAMPLERS

    return "eta" in inspect.signature(SAMPLERS[sampler]).parameters


def _texts(texts: Any, name: str) -> list[str]:
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} must be a string or a list of strings.")
    if not texts:
        raise InputError(f"The list of {name}s is empty; give at least one.")
    return list(texts)


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        seed = secrets.randbits(31)
    if isinstance(seed, list | tuple):
        if len(seed) != count:
            raise InputError(f"There are {len(seed)} seeds for {count} pictures; give one each.")
        return [whole_number(value, "seed", 0, MAX_SEED) for value in seed]
    first = whole_number(seed, "seed", 0, MAX_SEED - count + 1)
    return list(range(first, first + count))
