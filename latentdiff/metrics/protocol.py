"""Protocols: all that a figure depends on beside the model, in one YAML file with an id.

The same weights of Stable Diffusion read FID 13 or 24 by the prompts, sampler, guidance, number of
pictures, resize filter and reference (Parmar et al. 2022; Podell et al. 2023, appendix F). Figures
whose protocols have one id may be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from latentdiff.data.buckets import fit
from latentdiff.drawing import DrawingConfig
from latentdiff.errors import InputError
from latentdiff.metrics.features import FeatureConfig
from latentdiff.metrics.identity import digest_of, first_difference
from latentdiff.metrics.prompts import PromptsConfig
from latentdiff.metrics.references import ReferenceConfig, TrainingConfig

EDITION = 2
"""Raised whenever a figure of the same pictures is computed in another way. 2: objects that nobody
asked for make a picture of a scene wrong; by kinds, resamples keep the pictures of each; renders to
compare with repeat no scene."""

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


class Protocol(DrawingConfig):
    """What is drawn and measured, and how."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """What people call it."""
    prompts: PromptsConfig
    """What is drawn."""
    count: int | None = Field(default=None, gt=0, le=1_000_000)
    """Prompts: the first so many, of scenes or captions in groups of each kind or category; by
    default all there are."""
    height: int | None = Field(default=None, gt=0)
    """Of the pictures as they are drawn, in pixels; by default what the model was trained at."""
    width: int | None = Field(default=None, gt=0)
    """The same."""
    size: int | None = Field(default=None, gt=0)
    """Side in pixels of the squares that features are taken of, drawn and real; by default as
    they are drawn."""
    resize: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"
    """Pillow's filter, which averages what it leaves out, by which pictures come to that size. Real
    ones of another shape are scaled until they cover it, and their middle is cut out."""
    features: tuple[FeatureConfig, ...] = ()
    """What pictures are compared by."""
    reference: ReferenceConfig | None = None
    """The real pictures; without them there are only figures of each picture by itself."""
    training: TrainingConfig | None = None
    """What the model learned from: each picture's nearest neighbour is sought in it."""
    free: tuple[Literal["num_inference_steps", "guidance_scale", "sampler", "seed"], ...] = ()
    """What a sweep may vary: these are no part of the id."""

    @model_validator(mode="after")
    def _whole(self) -> Protocol:
        names = [feature.name for feature in self.features]
        taken = ("scenes", "pixels", *(f"{name}_text" for name in names))
        if len({*names, *taken}) < len(names) + len(taken):
            raise ValueError(f"features need names of their own, other than {', '.join(taken)}")
        if (self.reference is not None or self.training is not None) and not names:
            raise ValueError("name the features that pictures are compared by")
        return self


def fixed(protocol: Protocol, digests: Mapping[str, Any]) -> dict[str, Any]:
    """All that a figure depends on beside the model, as plain values.

    digests: of prompts, reference, training and each of the features, which stand for what the
    protocol says of them: where files lie plays no part.
    """
    told = ("prompts", "features", "reference", "training")
    values = protocol.model_dump(mode="json", exclude={"free", *told, *protocol.free})
    return values | dict(digests) | {"edition": EDITION}


def protocol_id(values: Mapping[str, Any]) -> str:
    """The first 12 hexadecimal digits of the sha256 of what `fixed` returns, in canonical JSON."""
    return digest_of(values)[:12]


def refuse_unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raises InputError unless two evaluations have one id; it names the first field that differs.

    a, b: the contents of evaluation.json, of which `id` and `fixed` are read.
    """
    if a["id"] != b["id"]:
        differs = first_difference(a["fixed"], b["fixed"])
        raise InputError(
            f"Figures of protocol {a['id']} ({a['model']}) and {b['id']} ({b['model']}) do not "
            f"compare: they differ in {differs}; evaluate both by one protocol."
        )


def brought(image: Image.Image, shape: tuple[int, int], resize: str) -> np.ndarray:
    """uint8 [H, W, 3] of shape (W, H), by one of FILTERS; one of that shape stays as it is."""
    return np.asarray(fit(image, shape, FILTERS[resize])[0])
