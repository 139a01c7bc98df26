"""A recipe as the text `parameters` that A1111's web UI and its kin write into pictures.

    a fox, <lora:ink:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, ...

The form is that of create_infotext in processing.py and parse_generation_parameters in
infotext_utils.py of github.com/AUTOMATIC1111/stable-diffusion-webui (1.10); written anew.
"""

from __future__ import annotations

import json
import re
import warnings
from typing import TYPE_CHECKING, Any

from latentdiff.config import parse
from latentdiff.errors import InputError

if TYPE_CHECKING:
    from latentdiff.recipe import Recipe

SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
"""A1111's names (DDPM is Forge's)."""
SPACINGS = {
    "trailing": "SGM Uniform",
    "leading": "DDIM",
    "linspace": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
}
"""A1111's names of what is the same thing up to rounding of the timesteps."""
KARRAS_BY_DEFAULT = ("dpm2", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde")
"""What "Automatic" means for these in A1111; for ddim it is "DDIM" and else "Uniform"."""

PROGRAM = "latentdiff"
NEGATIVE = "Negative prompt:"
IN_PASSING = {"Model", "RNG", "Version", "Lora hashes", "VAE", "Hashes", "User"}
"""Read besides, or of no consequence."""

_PARAMETER = re.compile(r'\b(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_COUNT = re.compile("[0-9]{1,4}")
"""A number that int reads; what is longer or else is left to the recipe's own checks."""
_LORA = re.compile(r"<lora:([^:<>]+)(?::([^:<>]+))?(?::[^<>]*)?>")


class UnreadParametersWarning(UserWarning):
    """A text says more about its picture than a recipe can hold; the picture will differ."""


def to_parameters(recipe: Recipe) -> str:
    """The text for `recipe`. Its input pictures and SDXL's sizes have no place in it.

    "Clip skip" is one more than the recipe's, whatever the model. For SDXL, which reads the
    penultimate layer by itself, the number counts from there; A1111 ignores it for SDXL.
    "RNG: CPU" makes A1111 start from the noise that this project starts from.
    """
    tagged = {name: lora for lora in recipe.loras if _plain(name := _bare(lora.file))}
    prompt = recipe.prompt + "".join(
        f" <lora:{name}:{_number(lora.weight)}>" for name, lora in tagged.items()
    )
    hashes = [f"{name}: {lora.sha256[:10]}" for name, lora in tagged.items() if lora.sha256]
    values: dict[str, Any] = {
        "Steps": recipe.num_inference_steps,
        "Sampler": SAMPLERS.get(recipe.sampler, recipe.sampler),
        "Schedule type": SPACINGS[recipe.spacing] if recipe.spacing else "Automatic",
        "CFG scale": recipe.guidance_scale,
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.model_sha256 and recipe.model_sha256[:10],
        "Model": _bare(recipe.model),
        "VAE hash": recipe.vae_sha256 and recipe.vae_sha256[:10],
        "Denoising strength": recipe.strength,
        "Clip skip": recipe.clip_skip + 1 if recipe.clip_skip else None,
        "RNG": "CPU",
        "Emphasis": None if recipe.weighted else "None",
        _eta_name(recipe.sampler): recipe.eta,
        "Guidance": "APG" if recipe.guidance == "apg" else None,
        "Guidance rescale": recipe.guidance_rescale or None,
        "Guidance interval": recipe.guidance_interval
        and "{} to {}".format(*map(_number, recipe.guidance_interval)),
        "Lora hashes": ", ".join(hashes),
        "Version": f"{PROGRAM} {recipe.version}" if recipe.version else None,
    }
    line = ", ".join(f"{k}: {_quoted(v)}" for k, v in values.items() if v not in (None, ""))
    negative = f"\n{NEGATIVE} {recipe.negative_prompt}" if recipe.negative_prompt else ""
    return f"{prompt}{negative}\n{line}"


def from_parameters(text: str, source: str = "The text") -> Recipe:
    """As much of a recipe as `text` says.

    Raises InputError, naming `source`, for a text that lacks steps, sampler, seed or size, or
    whose sampler or schedule is not here. Warns UnreadParametersWarning of what it leaves out.
    """
    from latentdiff.recipe import Recipe

    prompt, negative, values = _split(text)
    missing = [
        key for key in ("Steps", "Sampler", "CFG scale", "Seed", "Size") if key not in values
    ]
    if missing:
        raise InputError(f"{source} does not say the picture's {', '.join(missing)}.")
    version = values.get("Version", "")
    ours = version.startswith(f"{PROGRAM} ")
    sampler, schedule = _sampler(values.pop("Sampler"), source)
    width, _, height = values.pop("Size").partition("x")
    prompt, loras = _loras(prompt, values.get("Lora hashes", ""))
    low, _, high = values.pop("Guidance interval", "").partition(" to ")
    skipped = values.pop("Clip skip", None)
    found: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative,
        "num_inference_steps": values.pop("Steps"),
        "sampler": sampler,
        "spacing": _spacing(values.pop("Schedule type", schedule), sampler, ours, source),
        "guidance_scale": values.pop("CFG scale"),
        "seed": values.pop("Seed"),
        "width": width,
        "height": height,
        "clip_skip": int(skipped) - 1 if skipped and _COUNT.fullmatch(skipped) else skipped,
        "strength": values.pop("Denoising strength", None),
        "eta": values.pop(_eta_name(sampler), None),
        "weighted": values.pop("Emphasis", None) != "None",
        "guidance": "apg" if values.pop("Guidance", None) == "APG" else "cfg",
        "guidance_rescale": values.pop("Guidance rescale", 0.0),
        "guidance_interval": (low, high) if high else None,
        "model": values.get("Model", ""),
        "model_sha256": _hash(values.pop("Model hash", "")),
        "vae_sha256": _hash(values.pop("VAE hash", "")),
        "loras": loras,
        "version": version.removeprefix(f"{PROGRAM} ") if ours else None,
    }
    unread = sorted(values.keys() - IN_PASSING)
    if any(key.startswith("Hires ") for key in unread):
        found["strength"] = None  # the second pass's
    if not ours and values.get("RNG") != "CPU":
        unread.append("noise from a GPU")
    if unread:
        warnings.warn(
            f"{source} says more than can be done here ({', '.join(unread[:10])}); the picture "
            "will differ.",
            UnreadParametersWarning,
            stacklevel=2,
        )
    return parse(Recipe, found, source)


def _split(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and parameters, which are the last line if it has three or more."""
    body, _, last = text.rstrip().rpartition("\n")
    found = _PARAMETER.findall(last)
    if len(found) < 3:
        body, found = text, []
    values = {key: _unquoted(value) for key, value in found}
    if marker := re.search(rf"^{NEGATIVE} ?", body, re.MULTILINE):
        return body[: max(marker.start() - 1, 0)], body[marker.end() :], values
    return body, "", values


def _quoted(value: object) -> str:
    """As A1111 quotes; also what would not come back unquoted."""
    text = _number(value) if isinstance(value, float) else str(value)
    if any(mark in text for mark in ',:"\n') or text != text.strip():
        return json.dumps(text, ensure_ascii=False)
    return text


def _unquoted(value: str) -> str:
    if value[:1] == '"' == value[-1:]:
        try:
            return str(json.loads(value))
        except ValueError:
            pass
    return value


def _bare(path: str) -> str:
    """A model's name: the last part of its path."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1].removesuffix(".safetensors")


def _hash(text: str) -> str | None:
    """A SHA-256's beginning; A1111's hashes of 8 digits, before 2023, are over something else."""
    return text if re.fullmatch("[0-9a-f]{10,64}", text) else None


def _number(value: float) -> str:
    """7.0 is 7, as in A1111."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _eta_name(sampler: str) -> str:
    return "Eta DDIM" if sampler == "ddim" else "Eta"


def _plain(name: str) -> bool:
    """Whether a LoRA's name can stand in a tag and in the list of hashes."""
    return bool(name.strip()) and name == name.strip() and not re.search(r'[:,<>"\n]', name)


def _loras(prompt: str, hashes: str) -> tuple[str, list[dict[str, Any]]]:
    """The prompt without its tags, and what they name. A1111's own hashes, of 12 digits, are over
    the tensors alone and left out.
    """
    known = dict(item.split(": ", 1) for item in hashes.split(", ") if ": " in item)
    loras = [
        {
            "file": f"{name}.safetensors",
            "weight": weight or 1.0,
            "sha256": known.get(name) if len(known.get(name, "")) == 10 else None,
        }
        for name, weight in _LORA.findall(prompt)
    ]
    return re.sub(rf" ?{_LORA.pattern}", "", prompt), loras


def _sampler(name: str, source: str) -> tuple[str, str | None]:
    """Our name, and the schedule where the name has it behind it, as before A1111 1.9."""
    ours = {theirs: sampler for sampler, theirs in SAMPLERS.items()}
    for suffix in ("Karras", "Exponential"):
        bare = name.removesuffix(f" {suffix}")
        if bare != name and bare in ours:
            return ours[bare], suffix
    if name not in ours:
        raise InputError(
            f"{source} names the sampler {name[:40]!r}, which is not here; there are "
            f"{', '.join(ours)}."
        )
    return ours[name], None


def _spacing(schedule: str | None, sampler: str, ours: bool, source: str) -> str | None:
    if schedule in (None, "Automatic"):
        if ours:
            return None
        if sampler == "ddim":
            return "leading"
        return "karras" if schedule and sampler in KARRAS_BY_DEFAULT else "linspace"
    known = {theirs: spacing for spacing, theirs in SPACINGS.items()}
    known |= {"Normal": "linspace", "Simple": "trailing"}
    if schedule not in known:
        raise InputError(
            f"{source} names the schedule {str(schedule)[:40]!r}, which is not here; there are "
            f"{', '.join(known)}."
        )
    return known[str(schedule)]
