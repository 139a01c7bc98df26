"""The networks of a model, built from their config.json; a VAE in place of a model's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.compvis_names import UNET, VAE, Layout, vae_names
from latentdiff.errors import InputError
from latentdiff.model_files import (
    read_json,
    read_shards,
    read_weights,
    weight_shapes,
    weights_files,
    weights_name,
)
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.single_file import SingleFileSource
from latentdiff.sources import TOWER_CLASSES, Source
from latentdiff.tokenizer_files import CLASSES, check_tokenizer, read_tokenizer
from latentdiff.weights import load_module

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from latentdiff.models.autoencoder import AnyVAE
    from latentdiff.models.text_encoder import TextEncoder

TOWER_TYPES = {
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "bert": "BertModel",
    "gpt2": "GPT2Model",
}
"""Classes by the model_type of a config.json that names none."""
NOT_OF_VAE = ("loss.", "model_ema.")
"""What the training of a VAE leaves beside its weights."""


def build_unet(config: dict[str, Any]) -> UNet:
    """From a UNet2DConditionModel's config.json. Raises InputError for what is not supported."""
    return UNet(UNetConfig.from_diffusers(config))


def build_vae(config: dict[str, Any]) -> AnyVAE:
    """From the config.json of an AutoencoderKL, which is what one names that names none, or of a
    PooledVAE.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from latentdiff.models.pooled import PooledVAE

    cls = PooledVAE if config.get("_class_name") == "PooledVAE" else AutoencoderKL
    vae = cls.from_config(config)
    assert isinstance(vae, (AutoencoderKL, PooledVAE))
    return vae


def load_vae(directory: Path) -> AnyVAE:
    """The VAE in vae/, in fp32, as save_pretrained of diffusers writes it. Raises InputError."""
    folder = directory / "vae"
    files, path = weights_files(folder, weights_name("vae")), folder / "config.json"
    return load_module(
        build_vae, read_json(path), path, read_shards(files), files[0], torch.float32
    )


def build_tower(class_name: str) -> Callable[[dict[str, Any]], PreTrainedModel]:
    """What builds a text encoder of that class of transformers."""
    import transformers

    cls = getattr(transformers, class_name)
    clip = class_name.startswith("CLIP")
    config_class = transformers.CLIPTextConfig if clip else cls.config_class

    def build(config: dict[str, Any]) -> PreTrainedModel:
        if config.get("use_attention_mask"):
            raise InputError("A text encoder with use_attention_mask is not supported.")
        return cls(config_class.from_dict(config))

    return build


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`, of the class that it names. Raises InputError."""
    check_tokenizer(directory)
    path = directory / "tokenizer_config.json"
    name = read_json(path).get("tokenizer_class")
    if name not in CLASSES:
        raise InputError(f"{path} names a {name}; only {', '.join(CLASSES)} can be read.")
    return read_tokenizer(directory, name)


def load_text_encoder(directory: Path) -> TextEncoder:
    """The tower in text_encoder/, CLIP's or T5, BERT or GPT-2, and its tokenizer in tokenizer/.

    As save_pretrained of transformers writes them. Raises InputError when they cannot be read.
    """
    from latentdiff.models.text_encoder import TextEncoder

    folder = directory / "text_encoder"
    path = folder / "config.json"
    config = read_json(path)
    named = [name for name in config.get("architectures") or () if name in TOWER_CLASSES]
    name = named[0] if named else TOWER_TYPES.get(str(config.get("model_type")))
    if name is None:
        raise InputError(f"{path} describes none of {', '.join(TOWER_CLASSES)}.")
    files = weights_files(folder, weights_name("text_encoder"))
    build = build_tower(name)
    tower = load_module(build, config, path, read_shards(files), files[0], torch.float32)
    return TextEncoder(load_tokenizer(directory / "tokenizer"), tower)


def load_other_vae(path: Path, source: Source) -> Callable[[torch.dtype], AnyVAE]:
    """What loads the VAE at `path` to take the place of `source`'s own; see checkpoint.load_model.

    Its config and the names of its tensors are read at once, the weights when the result is called.
    Both raise InputError.
    """

    def load(dtype: torch.dtype) -> AnyVAE:
        return load_module(build_vae, config, config_path, tensors(), file, dtype)

    config_path = file = path
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        config_path = folder / "config.json"
        config = read_json(config_path)
        files = weights_files(folder, weights_name("vae"))
        file, tensors = files[0], functools.partial(read_shards, files)
        return load
    shapes = weight_shapes(path)
    if any(name.startswith(UNET) for name in shapes):
        other = SingleFileSource(path)
        other.files("vae")
        config, tensors = other.config("vae"), functools.partial(other.tensors, "vae")
    else:
        config = source.config("vae")
        tensors = functools.partial(_vae_alone, path, config)
    return load


def _vae_alone(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """From a file with a VAE alone, under the names of diffusers or CompVis."""
    tensors = read_weights(path, lambda name: not name.startswith(NOT_OF_VAE))
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        return tensors
    prefix = VAE if any(name.startswith(VAE) for name in tensors) else ""
    return Layout(prefix, vae_names(config)).read(tensors)
