"""Model directories in diffusers' layout: load_model and save_model."""

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
from latentdiff.model_files import (
    CLASSES,
    MAX_TOKENIZER_BYTES,
    WEIGHTS,
    check_file,
    model_directory,
    one_line,
    read_json,
    staged_directory,
    validated,
    weights_file,
    write_json,
)
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.scheduler_config import SchedulerConfig, parse_scheduler
from latentdiff.weights import load_module, save_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.models.text_encoder import TextEncoder

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ModelParts:
    """Everything that a prompt meets on its way to a picture."""

    unet: UNet
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    scheduler_config: SchedulerConfig
    vocabulary: ScenesConfig | None = None
    """The scenes it was trained on, where it was trained on scenes."""
    directory: Path | None = None
    """Where it was loaded from."""

    schedule: Schedule = field(init=False)
    """The noise schedule that scheduler_config describes."""
    parameterization: Parameterization = field(init=False)
    """What the U-Net predicts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", self.scheduler_config.schedule())
        object.__setattr__(self, "parameterization", self.scheduler_config.parameterization())


def load_model(
    model: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> ModelParts:
    """Read a model directory; by default, or by the name "emoji", the one that is bundled.

    All weights become `dtype`, whatever they were stored in. Only safetensors are read, and no
    file can run code. Raises InputError, before any weights are read, for a directory that is
    missing, incomplete or unsupported, and then for weights that are damaged or do not fit.
    """
    directory = model_directory(model)
    files = {component: weights_file(directory, component) for component in WEIGHTS}
    configs = {component: read_json(directory / component / "config.json") for component in WEIGHTS}
    scheduler_path = directory / "scheduler" / "scheduler_config.json"
    scheduler_config = parse_scheduler(read_json(scheduler_path), scheduler_path)
    vocabulary = read_vocabulary(directory)
    _check_tokenizer(directory / "tokenizer")

    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.models.text_encoder import TextEncoder

    def part(component: str, build: Callable[[dict[str, Any]], M]) -> M:
        module = load_module(build, configs[component], files[component], dtype)
        return module.to(device)

    parts = ModelParts(
        part("unet", _unet),
        Autoencoder(part("vae", _vae)),
        TextEncoder(_tokenizer(directory / "tokenizer"), part("text_encoder", _clip)),
        scheduler_config,
        vocabulary,
        directory,
    )
    _check_fit(parts)
    return parts


def save_model(
    parts: ModelParts, directory: str | os.PathLike[str], dtype: torch.dtype = torch.float32
) -> None:
    """Write a model directory that load_model and diffusers.StableDiffusionPipeline open.

    Weights are stored as `dtype`. Equal parts make equal bytes. The directory appears whole or
    not at all; a model already there is replaced. Raises InputError when something else is.
    """
    vae = parts.autoencoder.vae
    text_model = parts.text_encoder.model
    configs = {
        "unet": parts.unet.config.to_diffusers(),
        "vae": {"_class_name": "AutoencoderKL", **_public(vae.config)},
        # transformers would otherwise compute in the dtype of the file, beside a U-Net in float32.
        "text_encoder": {**_public(text_model.config.to_dict()), "dtype": "float32"},
    }
    modules = {"unet": parts.unet, "vae": vae, "text_encoder": text_model}
    with staged_directory(Path(directory)) as staging:
        for component, module in modules.items():
            (staging / component).mkdir()
            write_json(configs[component], staging / component / "config.json")
            save_weights(module, staging / component / WEIGHTS[component], dtype)
        _write_tokenizer(parts.text_encoder.tokenizer, staging / "tokenizer")
        (staging / "scheduler").mkdir()
        scheduler_path = staging / "scheduler" / "scheduler_config.json"
        write_json(parts.scheduler_config.to_json(), scheduler_path)
        if parts.vocabulary is not None:
            write_json(parts.vocabulary.model_dump(mode="json"), staging / "vocabulary.json")
        write_json(_index(parts), staging / "model_index.json")


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what libraries note for themselves, such as the path it was read from."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def read_vocabulary(directory: Path) -> ScenesConfig | None:
    """The scenes that a model was trained on, None for one trained on something else."""
    path = directory / "vocabulary.json"
    return validated(ScenesConfig, read_json(path), path) if path.exists() else None


def _index(parts: ModelParts) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", CLASSES["unet"][0]],
        "vae": ["diffusers", CLASSES["vae"][0]],
        "text_encoder": ["transformers", CLASSES["text_encoder"][0]],
        "tokenizer": ["transformers", CLASSES["tokenizer"][0]],
        "scheduler": ["diffusers", parts.scheduler_config.class_name],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }


def _unet(config: dict[str, Any]) -> UNet:
    return UNet(UNetConfig.from_diffusers(config))


def _vae(config: dict[str, Any]) -> AutoencoderKL:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL.from_config(config)
    assert isinstance(vae, AutoencoderKL)
    return vae


def _clip(config: dict[str, Any]) -> CLIPTextModel:
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    if config.get("use_attention_mask"):
        raise InputError("A text encoder with use_attention_mask is not supported.")
    return CLIPTextModel(CLIPTextConfig.from_dict(config))


def _tokenizer(directory: Path) -> CLIPTokenizer:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(
            f"{directory} holds no CLIP tokenizer that can be read ({one_line(error)})."
        ) from None


def _write_tokenizer(tokenizer: CLIPTokenizer, directory: Path) -> None:
    """tokenizer.json for transformers 5, vocab.json and merges.txt for those before."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # the last call's, which would be stored and differ from run to run
    backend.no_padding()
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    backend.model.save(str(directory))
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.model_max_length}
    config |= {name: str(getattr(tokenizer, name)) for name in names}
    write_json(config, directory / "tokenizer_config.json")


def _check_tokenizer(directory: Path) -> None:
    read_json(directory / "tokenizer_config.json")
    if (directory / "tokenizer.json").is_file():
        read_json(directory / "tokenizer.json", MAX_TOKENIZER_BYTES)
    else:
        read_json(directory / "vocab.json", MAX_TOKENIZER_BYTES)
        check_file(directory / "merges.txt", MAX_TOKENIZER_BYTES)


def _check_fit(parts: ModelParts) -> None:
    unet, latents = parts.unet.config, parts.autoencoder.latent_channels
    if unet.in_channels != latents:
        raise InputError(
            f"The U-Net takes {unet.in_channels} channels but the latents have {latents}; "
            "unet/ and vae/ belong to different models."
        )
    if unet.cross_attention_dim != parts.text_encoder.hidden_size:
        raise InputError(
            f"The U-Net attends to embeddings {unet.cross_attention_dim} wide but the text "
            f"encoder's are {parts.text_encoder.hidden_size}; unet/ and text_encoder/ belong to "
            "different models."
        )
