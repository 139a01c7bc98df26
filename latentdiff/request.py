"""What a call of generate asks for, checked before any work."""

from __future__ import annotations

import difflib
import math
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentdiff.errors import InputError

MAX_PICTURES = 1024
MAX_SIDE = 2048
MAX_PROMPT_CHARACTERS = 10_000
MAX_SEED = 2**32 - 1
"""Of more than 32 bits PyTorch's generator on the CPU reads the lower ones alone."""


@dataclass(frozen=True)
class Picture:
    """One picture that is asked for."""

    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """How all pictures of a call are made; height and width in pixels."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str


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
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        raise InputError(f"{name} is {value!r}; it must be a whole number from {least} to {most}.")
    return number


def check_scale(value: Any) -> float:
    """A guidance scale. Raises InputError when it is negative or not finite."""
    try:
        scale = float(value)
    except (TypeError, ValueError):
        scale = math.nan
    if not (math.isfinite(scale) and scale >= 0):
        raise InputError(f"guidance_scale is {value!r}; it must be a finite number, 0 or more.")
    return scale


def check_side(value: Any, name: str, default: int, multiple: int) -> int:
    """A height or width in pixels. Raises InputError when the model cannot make it."""
    side = whole_number(default if value is None else value, name, multiple, MAX_SIDE)
    if side % multiple:
        raise InputError(
            f"{name} is {side}; this model makes multiples of {multiple}, for example "
            f"{side - side % multiple} or {side - side % multiple + multiple}."
        )
    return side


def check_sampler(name: Any, known: Sequence[str]) -> str:
    """The name of a sampler. Raises InputError listing those there are."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"There is no sampler {name!r}; {meant}There are {', '.join(known)}.")
    return str(name)


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
