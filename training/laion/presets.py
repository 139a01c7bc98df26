"""Conditions under which well-known data sets and models were made, with where it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.laion.filters import FiltersConfig

PresetName = Literal[
    "none",
    "sd12",
    "sd15",
    "sd2_base",
    "sd2_base_512",
    "sd21_base",
    "laion_high_resolution",
    "laion_aesthetics_v1",
    "laion_art",
]


@dataclass(frozen=True)
class Preset:
    filters: FiltersConfig
    source: str


V1_SOURCE = "https://github.com/LAION-AI/laion-datasets/blob/main/laion-aesthetic.md"
SD2_SOURCE = "https://huggingface.co/stabilityai/stable-diffusion-2-base"

PRESETS = {
    "none": Preset(FiltersConfig(), "Nothing is asked for."),
    "sd12": Preset(
        FiltersConfig(min_width=512, min_height=512, above_aesthetic_v2=5, below_pwatermark=0.5),
        'https://huggingface.co/CompVis/stable-diffusion-v1-2: "laion-improved-aesthetics" has an '
        "original size >= 512x512, an aesthetics score > 5.0, a watermark probability < 0.5.",
    ),
    "sd15": Preset(
        FiltersConfig(min_aesthetic_v2=5),
        'https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5: "laion-aesthetics v2 '
        '5+", of which no smallest size is said.',
    ),
    "sd2_base": Preset(
        FiltersConfig(max_punsafe=0.1, min_aesthetic_v2=4.5),
        f"{SD2_SOURCE}: the first stage, punsafe=0.1 and an aesthetic score >= 4.5.",
    ),
    "sd2_base_512": Preset(
        FiltersConfig(max_punsafe=0.1, min_aesthetic_v2=4.5, min_width=512, min_height=512),
        f"{SD2_SOURCE}: the second stage, the same with a resolution >= 512x512.",
    ),
    "sd21_base": Preset(
        FiltersConfig(max_punsafe=0.98, min_aesthetic_v2=4.5, min_width=512, min_height=512),
        "https://huggingface.co/stabilityai/stable-diffusion-2-1-base: punsafe=0.98 on the same "
        "data set as stable-diffusion-2-base.",
    ),
    "laion_high_resolution": Preset(
        FiltersConfig(min_width=1024, min_height=1024),
        "https://huggingface.co/datasets/laion/laion-high-resolution: >= 1024x1024.",
    ),
    "laion_aesthetics_v1": Preset(
        FiltersConfig(above_aesthetic_v1=7, below_pwatermark=0.8, below_punsafe=0.5),
        f"{V1_SOURCE}: aesthetic > 7, pwatermark < 0.8, punsafe < 0.5.",
    ),
    "laion_art": Preset(
        FiltersConfig(above_aesthetic_v1=8, below_pwatermark=0.8, below_punsafe=0.5),
        f"{V1_SOURCE}: the same with aesthetic > 8.",
    ),
}


def resolved(preset: PresetName, filters: FiltersConfig) -> FiltersConfig:
    """The preset's conditions, each replaced where `filters` sets it, if only to null."""
    given = {name: getattr(filters, name) for name in filters.model_fields_set}
    return PRESETS[preset].filters.model_copy(update=given)
