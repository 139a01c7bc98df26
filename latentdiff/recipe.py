"""What makes one picture again: a Recipe, as JSON and in the PNG that it belongs to."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, UnidentifiedImageError
from pydantic import Field

from latentdiff import __version__
from latentdiff.config import Config, parse
from latentdiff.errors import InputError
from latentdiff.model_files import VARIANT, file_digest, read_json, weights_name, whole_weights
from latentdiff.request import MAX_PROMPT_CHARACTERS, MAX_SEED

FORMAT = 1
"""Of recipes; a key that is added has a default and needs no new one."""
MAX_TEXT_BYTES = 1 << 20
WEIGHTS_AND_CONFIGS = (".safetensors", ".json")
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
OTHER_PARTS = ("scheduler", "tokenizer", "tokenizer_2")

Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Name = Annotated[str, Field(max_length=4096)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{10,64}$")]
"""A SHA-256 in hexadecimal, or its first 10 digits or more, which is what A1111 writes."""
Pixels = Annotated[int, Field(ge=0, le=1 << 16)]


class InputPicture(Config):
    """A picture that was read; its pixels are not in the recipe."""

    name: Name = ""
    """The file's name, where it was a file."""
    sha256: Hash
    """picture_hash of it."""

    def check(self, image: Image.Image) -> str | None:
        """None, or a sentence when `image` is another picture."""
        if same_hash(picture_hash(image), self.sha256):
            return None
        return f"This is not the picture {self.name!r} that the recipe names; the result differs."


class Lora(Config):
    """A LoRA that was attached."""

    file: Name
    """The file's name."""
    sha256: Hash | None = None
    """model_hash of the file; None where the recipe comes from a text that has none."""
    weight: float = 1.0
    """What it was multiplied with."""

    def check(self, sha256: str) -> str | None:
        """None, or a sentence when the LoRA with this model_hash is another."""
        return _other("LoRA", self.file, self.sha256, sha256)


class Recipe(Config):
    """Everything that one picture depends on, beside the pixels of its input pictures."""

    prompt: Prompt
    """What the picture shows."""
    negative_prompt: Prompt = ""
    """What it was steered away from."""
    seed: int = Field(ge=0, le=MAX_SEED)
    """This picture's own, whatever its place in a batch."""
    height: Pixels
    """Of the picture, in pixels."""
    width: Pixels
    """Of the picture, in pixels."""
    num_inference_steps: int = Field(ge=1, le=100_000)
    """Steps of the sampler."""
    guidance_scale: float = Field(ge=0)
    """w of Ho & Salimans (2022)."""
    sampler: Name
    """A name in diffusion.samplers.SAMPLERS."""

    guidance: Literal["cfg", "apg"] = "cfg"
    """Classifier-free, or adaptive projected."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """phi of Lin et al. (2023)."""
    guidance_interval: tuple[float, float] | None = None
    """The noise levels, low < sigma <= high, with guidance; None is all of them."""
    eta: float | None = Field(default=None, ge=0)
    """None is the sampler's own."""
    spacing: Literal["trailing", "leading", "linspace", "karras", "exponential"] | None = None
    """None is the model's own."""
    clip_skip: int | None = Field(default=None, ge=0, le=64)
    """Layers of CLIP that are left out; A1111 counts one more."""
    weighted: bool = True
    """Whether (word:1.3) in the prompt is a weight."""

    strength: float | None = Field(default=None, ge=0, le=1)
    """How far it went from the picture that it started from."""
    image: InputPicture | None = None
    """Where the picture started from."""
    mask: InputPicture | None = None
    """White where it was painted anew."""

    original_size: tuple[Pixels, Pixels] | None = None
    """SDXL's conditioning, like the next four: (height, width) of the picture before a crop."""
    crops_coords_top_left: tuple[Pixels, Pixels] | None = None
    """The crop's (y, x)."""
    target_size: tuple[Pixels, Pixels] | None = None
    """What was asked for."""
    aesthetic_score: float | None = None
    """From 0 to 10, of the refiner."""
    negative_aesthetic_score: float | None = None
    """The same for the negative prompt."""

    model: Name = ""
    """Name of its directory or file, or on the hub."""
    model_sha256: Hash | None = None
    """model_hash of it."""
    loras: tuple[Lora, ...] = Field(default=(), max_length=256)
    """In the order in which they were attached."""
    vae_sha256: Hash | None = None
    """model_hash of the VAE that took the place of the model's own."""
    prediction_type: Name | None = None
    """What the U-Net was taken to predict; None is what the model says."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] = "float32"
    """Of the U-Net's weights."""
    version: Name | None = __version__
    """Of the latentdiff that made the picture; None is another program."""
    format: int = Field(default=FORMAT, ge=1)
    """FORMAT of the latentdiff that wrote it."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of TextToImage.generate, of a model with `loras` and the VAE in place.

        What is None is left out, and so are image and mask, which only the caller has.
        """
        values = self.model_dump(exclude=set(_ABOUT_FILES))
        return {name: value for name, value in values.items() if value is not None}

    def check_model(self, sha256: str) -> str | None:
        """None, or a sentence when the model with this model_hash is not the recipe's."""
        return _other("model", self.model, self.model_sha256, sha256)

    def check_vae(self, sha256: str | None) -> str | None:
        """None, or a sentence when the VAE is not the recipe's; None is the model's own."""
        if sha256 is None and self.vae_sha256 is None:
            return None
        if self.vae_sha256 is None:
            return "The picture was made with the model's own VAE; with another it differs."
        if sha256 is None:
            return (
                "The picture was made with another VAE than the model's own, of hash "
                f"{self.vae_sha256[:10]}."
            )
        return _other("VAE", "", self.vae_sha256, sha256)

    def to_json(self) -> str:
        """One line of ASCII."""
        return json.dumps(self.model_dump(mode="json"))

    def to_png_text(self) -> dict[str, str]:
        """PNG text by keyword: A1111's `parameters`, and the whole recipe."""
        return {"parameters": self.to_parameters(), "latentdiff": self.to_json()}

    def to_parameters(self) -> str:
        """The text that A1111 writes; see parameters_text.to_parameters."""
        from latentdiff.parameters_text import to_parameters

        return to_parameters(self)


_ABOUT_FILES = (
    *("image", "mask", "model", "model_sha256", "loras", "vae_sha256"),
    *("prediction_type", "dtype", "version", "format"),
)


def _other(what: str, name: str, recorded: str | None, sha256: str) -> str | None:
    """None, or a sentence when the file in use is not the one that was recorded."""
    named = f" ({name})" if name else ""
    if recorded is None:
        return f"The recipe has no hash of its {what}{named}; the picture may come out another."
    if same_hash(sha256, recorded):
        return None
    return (
        f"The picture was made with another {what}{named}, of hash {recorded[:10]}; this one has "
        f"{sha256[:10]}, and the picture comes out another."
    )


def recipe_from_json(text: str, source: str = "The recipe") -> Recipe:
    """Read `to_json`'s text. Raises InputError, naming `source`, for anything else."""
    if len(text) > MAX_TEXT_BYTES:
        raise InputError(f"{source} is larger than 1 MiB, too large to be a recipe.")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{source} is not readable JSON; the recipe in it is damaged.")
    unknown = sorted(values.keys() - Recipe.model_fields.keys())
    newer = isinstance(values.get("format"), int) and values["format"] > FORMAT
    if unknown or newer:
        keys = ", ".join(repr(key[:40]) for key in unknown[:5])
        raise InputError(
            f"{source} was written by latentdiff {str(values.get('version'))[:40]} in recipe "
            f"format {str(values.get('format'))[:10]}"
            + (f" and has keys ({keys}) that" if unknown else ", which")
            + f" latentdiff {__version__} does not know; update latentdiff."
        )
    return parse(Recipe, values, source)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a PNG: latentdiff's own, or as much as A1111's `parameters` say.

    Raises InputError for a file that is no PNG, is damaged or too large, or holds no recipe.
    Warns UnreadParametersWarning of parameters that have no place in a Recipe.
    """
    from latentdiff.parameters_text import from_parameters

    text = _png_text(Path(path))
    for key in ("latentdiff", "parameters"):
        if len(text.get(key, "")) > MAX_TEXT_BYTES:
            raise InputError(f"The text in {path} is larger than 1 MiB, too large to be a recipe.")
    if "latentdiff" in text:
        return recipe_from_json(text["latentdiff"], f"The recipe in {path}")
    if "parameters" in text:
        return from_parameters(text["parameters"], f"The text in {path}")
    raise InputError(
        f"{path} holds no recipe; it was not made by latentdiff or A1111, or was saved again by a "
        "program that drops PNG text."
    )


def _png_text(path: Path) -> dict[str, str]:
    """Text by keyword. Behind the pixels it is looked for only when there is none before them."""
    if not path.is_file():
        raise InputError(f"There is no picture {path}.")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = {key: str(value) for key, value in image.info.items() if key in _KEYWORDS}
            if not text:
                image.load()
                text = {key: str(value) for key, value in image.info.items() if key in _KEYWORDS}
            return text
    except UnidentifiedImageError:
        raise InputError(f"{path} is no PNG; only a PNG keeps its recipe.") from None
    except Exception as error:  # damaged files make Pillow raise errors of any kind
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as a PNG ({reason}).") from None


_KEYWORDS = ("latentdiff", "parameters")


def same_hash(first: str, second: str) -> bool:
    """Whether two hashes agree as far as the shorter of them goes."""
    length = min(len(first), len(second))
    return length >= 10 and first[:length] == second[:length]


def picture_hash(image: Image.Image) -> str:
    """SHA-256 of a picture's mode, size and pixels, whatever file it came from."""
    head = f"{image.mode} {image.width} {image.height}\n".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def model_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, A1111's model hash, or of what is read of a directory.

    A directory's is over the sorted relative names of its files and the SHA-256 of each. Of a
    model that is model_index.json, vocabulary.json and the parts that the index names: other
    parts, variants of the weights and a card are not in it. Of any other directory, such as a
    VAE's, it is all safetensors and JSON but those variants. A file is read again only when its
    size or time of change differs. Raises InputError where there is no such file, or no
    safetensors in the directory.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return _file_hash(path)
    found = _model_files(path) if (path / "model_index.json").is_file() else _plain_files(path)
    files = {file.relative_to(path).as_posix(): file for file in found}
    if not any(name.endswith(".safetensors") for name in files):
        raise InputError(f"There are no safetensors at {path}; give a model's directory or file.")
    lines = [f"{name}\0{_file_hash(file)}\n" for name, file in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _model_files(path: Path) -> list[Path]:
    """What load_model reads."""
    index = read_json(path / "model_index.json")
    files = [path / "model_index.json", path / "vocabulary.json"]
    for part in NETWORKS + OTHER_PARTS:
        if index.get(part) in (None, [None, None]):
            continue
        if part in NETWORKS:
            files += [path / part / "config.json", *whole_weights(path / part, weights_name(part))]
        else:
            files += [file for kind in ("*.json", "*.txt") for file in (path / part).glob(kind)]
    return [file for file in files if file.is_file()]


def _plain_files(path: Path) -> list[Path]:
    """Weights and configurations, without the variants of files that are there."""
    found = {
        file for file in path.rglob("*") if file.suffix in WEIGHTS_AND_CONFIGS and file.is_file()
    }
    return [
        file
        for file in found
        if VARIANT not in file.name or file.with_name(file.name.replace(VARIANT, "")) not in found
    ]


def _file_hash(path: Path) -> str:
    status = path.stat()
    return _read_hash(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _read_hash(path: Path, size: int, changed: int) -> str:
    return file_digest(path)
