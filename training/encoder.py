"""What turns pictures and captions into latents and token ids: a model's VAE and tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latentdiff.checkpoint import open_source
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AnyVAE, Autoencoder
from latentdiff.models.pooled import PooledVAE
from latentdiff.networks import build_vae, load_tokenizer, load_vae
from latentdiff.sources import Source
from latentdiff.weights import load_module

ENCODER_CONFIG = ("act_fn", "down_block_types", "layers_per_block", "norm_num_groups")
"""Of a VAE's config.json what its encoder is besides its weights."""
ENCODER = ("encoder.", "quant_conv.")
"""How the names of its weights begin."""


def load_encoder(
    model: str | None, autoencoder: Path | None, text_encoder: Path | None
) -> tuple[Autoencoder, list[PreTrainedTokenizerBase]]:
    """The VAE in fp32 and the tokenizers of a model, and no other network of it.

    A directory with vae/ and one with tokenizer/ take the place of the model's, or both of a model.
    Raises InputError when they are missing or cannot be read.
    """
    source = None if model is None else open_source(model, own_vae=autoencoder is None)
    if text_encoder is not None:
        tokenizers = [load_tokenizer(_trained(text_encoder / "tokenizer"))]
    else:
        assert source is not None
        tokenizers = [source.tokenizer(tower) for tower in source.towers]
    if autoencoder is not None:
        _trained(autoencoder / "vae")
        vae = load_vae(autoencoder)
    else:
        assert source is not None
        vae = read_vae(source)
    return Autoencoder(vae).requires_grad_(False), tokenizers


def vae_to_train(model: str) -> AnyVAE:
    """The VAE of a model, or of a directory with vae/ alone, as training.autoencoder writes it."""
    directory = Path(model)
    if (directory / "vae").is_dir() and not (directory / "model_index.json").exists():
        return load_vae(directory)
    return read_vae(open_source(model))


def read_vae(source: Source) -> AnyVAE:
    """A model's own VAE in fp32. Raises InputError when it is missing or cannot be read."""
    source.check_vae()
    return load_module(
        build_vae,
        source.config("vae"),
        source.config_path("vae"),
        source.tensors("vae"),
        source.files("vae")[0],
        torch.float32,
    )


def _trained(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; train it first.")
    return folder


def encoder_digest(autoencoder: Autoencoder) -> str:
    """sha256 of what latents are a function of: the encoder's weights, its kind and the scale."""
    vae = autoencoder.vae
    kind = {name: vae.config.get(name) for name in ENCODER_CONFIG}
    if isinstance(vae, PooledVAE):
        kind["factor"] = autoencoder.scale_factor
    kind |= {"scaling": autoencoder.scaling, "shift": autoencoder.shift}
    weights = vae.state_dict().items()
    encoder = {n: t for n, t in weights if n.startswith(ENCODER)}
    words = json.dumps(kind, sort_keys=True) + tensors_digest(encoder)
    return hashlib.sha256(words.encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors, their names and shapes, as fp32."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"|{name}|{list(tensor.shape)}|".encode())
        total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
