"""Whole models from disk or hub and back: load_model and save_model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from latentdiff.data.scenes import ScenesConfig
from latentdiff.diffusion.parameterization import Parameterization
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import InputError
from latentdiff.hub import BUNDLED, SINGLE_FILE, download_autoencoder, found_path, model_path
from latentdiff.model_files import (
    staged_directory,
    validated,
    weights_name,
    write_json,
)
from latentdiff.models.unet import UNet
from latentdiff.networks import build_tower, build_unet, build_vae, load_other_vae
from latentdiff.scheduler_config import SchedulerConfig, parse_scheduler
from latentdiff.single_file import SingleFileSource, write_single_file
from latentdiff.sources import DirectorySource, Source, tokenizer_of
from latentdiff.tokenizer_files import write_tokenizer
from latentdiff.weights import load_module, save_weights, stored_tensors

if TYPE_CHECKING:
    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.models.text_encoder import TextEncoder, TextEncoders

M = TypeVar("M", bound=nn.Module)

DIFFUSERS = "0.36.0"
"""The oldest diffusers that is known to open what save_model writes; its inpainting asks."""


@dataclass(frozen=True)
class ModelParts:
    """Everything that a prompt meets on its way to a picture."""

    unet: UNet
    autoencoder: Autoencoder
    text_encoder: TextEncoder | TextEncoders
    """TextEncoders in SDXL's pipelines."""
    scheduler_config: SchedulerConfig
    vocabulary: ScenesConfig | None = None
    """The scenes it was trained on, where it was trained on scenes."""
    directory: Path | None = None
    """Where it was loaded from: a directory or a single file."""
    pipeline: str = "StableDiffusionPipeline"
    """diffusers' pipeline class for it, one of sources.TOWERS."""
    force_zeros_for_empty_prompt: bool = False
    """Whether an empty negative prompt stands for embeddings of zeros (SDXL base)."""
    requires_aesthetics_score: bool = False
    """Whether the size conditioning ends with an aesthetic score (SDXL's refiner)."""
    other_vae: Path | None = None
    """Where the VAE was loaded from, if not with the rest."""
    name: str = ""
    """The model as load_model was given it: a path, a name on the hub, or the bundled one's."""

    schedule: Schedule = field(init=False)
    """The noise schedule that scheduler_config describes."""
    parameterization: Parameterization = field(init=False)
    """What the U-Net predicts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", self.scheduler_config.schedule())
        object.__setattr__(self, "parameterization", self.scheduler_config.parameterization())

    def scenes(self) -> ScenesConfig:
        """The emoji scenes that it was trained on. Raises InputError where it was on none."""
        if self.vocabulary is None:
            raise InputError(
                f"{self.name} has no vocabulary.json: it is no model of emoji scenes, which are "
                "what this is for."
            )
        return self.vocabulary

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net was trained to fill in: with the latents it takes a mask and the
        latents around it (the runwayml inpainting model's 9 channels). Pipelines named Inpaint may
        have a plain one.
        """
        return self.unet.config.in_channels == 2 * self.autoencoder.latent_channels + 1

    @property
    def towers(self) -> dict[str, TextEncoder]:
        """The text encoders by their names in model_index.json."""
        from latentdiff.models.text_encoder import TextEncoder

        encoder = self.text_encoder
        if isinstance(encoder, TextEncoder):
            return {"text_encoder": encoder}
        names = ("text_encoder", "text_encoder_2")[-len(encoder.towers) :]
        return dict(zip(names, encoder.towers, strict=True))


def open_source(
    model: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    own_vae: bool = True,
) -> Source:
    """The parts of a model, before any weights are read; see load_model.

    own_vae: whether the weights of its VAE are wanted.
    """
    path = model_path(model, own_vae)
    return DirectorySource(path) if path.is_dir() else SingleFileSource(path, prediction_type)


def load_model(
    model: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    vae: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
) -> ModelParts:
    """Read a whole model. All weights become `dtype`, whatever they were stored in.

    Args:
        model: a directory in diffusers' layout; one .safetensors file in CompVis/A1111 layout
            (single_file.SingleFileSource); owner/name or owner/name@revision on the Hugging Face
            hub; or "emoji", the default, which is bundled.
        vae: another VAE: a directory with its config.json or with a vae/, a name on the hub, or
            one .safetensors file. A directory or a whole checkpoint says how its latents are
            scaled; a file with a VAE alone does not, and takes the scale of the model's own.
        prediction_type: what the U-Net predicts, where the model says otherwise or nothing.

    Only safetensors are read, and no file can run code. Raises InputError, before any weights are
    read, for a model that is missing, incomplete or unsupported, and then for weights that are
    damaged or do not fit.
    """
    other_vae = None if vae is None else found_path(vae, download_autoencoder, "VAE")
    source = open_source(model, prediction_type, own_vae=vae is None)
    load_vae = None if other_vae is None else load_other_vae(other_vae, source)
    parts = [name for name in source.networks if name != "vae" or vae is None]
    for name in parts:
        source.files(name)
    configs = {name: source.config(name) for name in parts}
    for tower in source.towers:
        source.check_tokenizer(tower)
    values = source.config("scheduler")
    if prediction_type is not None:
        values = {**values, "prediction_type": prediction_type}
    scheduler_config = parse_scheduler(values, source.config_path("scheduler"))
    vocabulary = read_scenes(source)
    if vae is None:
        source.check_vae()

    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.models.text_encoder import TextEncoder, TextEncoders

    def part(component: str, build: Callable[[dict[str, Any]], M]) -> M:
        file = source.files(component)[0]
        module = load_module(
            build,
            configs[component],
            source.config_path(component),
            source.tensors(component),
            file,
            dtype,
        )
        return module.to(device)

    unet = part("unet", build_unet)
    autoencoder = load_vae(dtype).to(device) if load_vae else part("vae", build_vae)
    towers = [
        TextEncoder(source.tokenizer(tower), part(tower, build_tower(source.class_name(tower))))
        for tower in source.towers
    ]
    xl = "XL" in source.pipeline
    loaded = ModelParts(
        unet,
        Autoencoder(autoencoder),
        TextEncoders(towers) if xl else towers[0],
        scheduler_config,
        vocabulary,
        source.path,
        source.pipeline,
        source.flag("force_zeros_for_empty_prompt", True) if xl else False,
        source.flag("requires_aesthetics_score", False) if xl else False,
        other_vae,
        BUNDLED if model is None else str(model),
    )
    _check_fit(loaded)
    return loaded


def save_model(
    parts: ModelParts, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> None:
    """Write a model that load_model opens, and diffusers but for a PooledVAE.

    Weights are stored as `dtype`. A path that ends in .safetensors becomes one file in
    CompVis/A1111 layout, for `from_single_file`; any other a directory in the layout of diffusers'
    `from_pretrained`. Equal parts make equal bytes. The model appears whole or not at all; one
    already there is replaced.
    Raises InputError when something else is, and when a single file has no place for a part.
    """
    path = Path(path)
    index, configs = _index(parts), _configs(parts)
    modules = {"unet": parts.unet, "vae": parts.autoencoder.vae}
    towers = parts.towers
    modules |= {name: tower.model for name, tower in towers.items()}
    tokenizers = {tokenizer_of(name): tower.tokenizer for name, tower in towers.items()}
    vocabulary = parts.vocabulary.model_dump(mode="json") if parts.vocabulary else None
    if path.suffix == SINGLE_FILE:
        states = {name: stored_tensors(module, dtype) for name, module in modules.items()}
        write_single_file(path, index, configs, tokenizers, states, vocabulary)
        return
    with staged_directory(path) as staging:
        for name, module in modules.items():
            (staging / name).mkdir()
            write_json(configs[name], staging / name / "config.json")
            save_weights(module, staging / name / f"{weights_name(name)}{SINGLE_FILE}", dtype)
        for name, tokenizer in tokenizers.items():
            write_tokenizer(tokenizer, staging / name)
        (staging / "scheduler").mkdir()
        write_json(configs["scheduler"], staging / "scheduler" / "scheduler_config.json")
        if vocabulary is not None:
            write_json(vocabulary, staging / "vocabulary.json")
        write_json(index, staging / "model_index.json")


def _configs(parts: ModelParts) -> dict[str, dict[str, Any]]:
    """What describes each part in JSON, but the tokenizers."""
    # transformers would otherwise compute in the dtype of the file, beside a U-Net in float32.
    towers = {
        name: {**_public(tower.model.config.to_dict()), "dtype": "float32"}
        for name, tower in parts.towers.items()
    }
    vae = type(parts.autoencoder.vae)
    return {
        "unet": parts.unet.config.to_diffusers(),
        "vae": {"_class_name": vae.__name__, **_public(parts.autoencoder.vae.config)},
        "scheduler": parts.scheduler_config.to_json(),
        **towers,
    }


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what libraries note for themselves, such as the path it was read from."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def read_scenes(source: Source) -> ScenesConfig | None:
    """The scenes that a model was trained on, None for one trained on something else."""
    values = source.vocabulary()
    path = source.path / "vocabulary.json" if source.path.is_dir() else source.path
    return None if values is None else validated(ScenesConfig, values, path)


def _index(parts: ModelParts) -> dict[str, Any]:
    """The contents of model_index.json."""
    vae = type(parts.autoencoder.vae)
    index: dict[str, Any] = {
        "_class_name": parts.pipeline,
        "_diffusers_version": DIFFUSERS,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [vae.__module__.partition(".")[0], vae.__name__],
        "scheduler": ["diffusers", parts.scheduler_config.class_name],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if "XL" in parts.pipeline:
        index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
        index["force_zeros_for_empty_prompt"] = parts.force_zeros_for_empty_prompt
        if parts.pipeline != "StableDiffusionXLPipeline":
            index["requires_aesthetics_score"] = parts.requires_aesthetics_score
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    for name, tower in parts.towers.items():
        index[name] = ["transformers", type(tower.model).__name__]
        index[tokenizer_of(name)] = ["transformers", type(tower.tokenizer).__name__]
    return index


def _check_fit(parts: ModelParts) -> None:
    """Raises InputError for parts of different models."""
    unet, latents = parts.unet.config, parts.autoencoder.latent_channels
    if parts.inpaints and "Inpaint" not in parts.pipeline:
        raise InputError(
            f"The U-Net takes {unet.in_channels} channels, as for inpainting, but the model is a "
            f"{parts.pipeline}; correct _class_name in model_index.json."
        )
    if unet.in_channels != latents and not parts.inpaints:
        raise InputError(
            f"The U-Net takes {unet.in_channels} channels but the latents have {latents}; "
            "unet/ and vae/ belong to different models."
        )
    if unet.out_channels != latents:
        raise InputError(
            f"The U-Net gives {unet.out_channels} channels but the latents have {latents}; "
            "unet/ and vae/ belong to different models, or it predicts variances too, which is not "
            "supported."
        )
    if unet.cross_attention_dim != parts.text_encoder.hidden_size:
        raise InputError(
            f"The U-Net attends to embeddings {unet.cross_attention_dim} wide but the text "
            f"encoder's are {parts.text_encoder.hidden_size}; unet/ and text_encoder/ belong to "
            "different models."
        )
    pooled = getattr(parts.text_encoder, "pooled_size", None)
    if (pooled is None) != (unet.addition_embed_type is None):
        raise InputError(
            f"The U-Net's config.json has addition_embed_type {unet.addition_embed_type!r}, which "
            f"does not go with a {parts.pipeline}."
        )
    if pooled is not None:
        numbers = 5 if parts.requires_aesthetics_score else 6
        width = pooled + numbers * (unet.addition_time_embed_dim or 0)
        if unet.projection_class_embeddings_input_dim != width:
            raise InputError(
                f"The U-Net expects {unet.projection_class_embeddings_input_dim} numbers of pooled "
                f"text and sizes but the model makes {width}; unet/ and text_encoder_2/ belong to "
                "different models, or requires_aesthetics_score in model_index.json is wrong."
            )
