"""A whole text-to-image model, tiny and untrained: every real class, seconds to run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tokenizers import pre_tokenizers
from torch import nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from latentdiff.checkpoint import ModelParts, save_model
from latentdiff.data.scenes import Concept, ScenesConfig
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.pipeline import TextToImage
from latentdiff.scheduler_config import SchedulerConfig

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))


@pytest.fixture(scope="session")
def tiny_parts() -> ModelParts:
    """64 x 64 pictures, latents 4 x 8 x 8, 32 tokens of single bytes, v-prediction."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModelParts(
            lively(tiny_unet()),
            Autoencoder(lively(tiny_vae())),
            TextEncoder(byte_tokenizer(32), lively(tiny_clip())),
            SchedulerConfig(prediction_type="v_prediction"),
            SCENES,
        )


@pytest.fixture(scope="session")
def tiny_model(tiny_parts: ModelParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a model directory; to be read, never changed."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(tiny_parts, directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> TextToImage:
    """The same, loaded."""
    return TextToImage.load(tiny_model)


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[int], CLIPTokenizer]:
    """Makes a tokenizer of single bytes that pads to a number of tokens."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def enliven() -> Callable[[M], M]:
    """Gives a network weights large enough that text, noise and place all show."""
    return lively


M = TypeVar("M", bound=nn.Module)

SCENES = ScenesConfig(
    seed=0,
    resolution=64,
    pair_share=0.5,
    sizes=(32, 40, 48),
    pair_sizes=(24, 28, 32),
    grid=4,
    concepts=(
        Concept(sprite="fox", nouns=("fox",)),
        Concept(sprite="red apple", nouns=("red apple", "apple")),
        Concept(sprite="rocket", nouns=("rocket", "spaceship")),
    ),
    backgrounds={"blue": (40, 80, 200), "dark green": (10, 90, 30)},
)


def tiny_unet() -> UNet:
    return UNet(
        UNetConfig(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=48,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.7,
    )


def tiny_clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def byte_tokenizer(max_length: int) -> CLIPTokenizer:
    """One token a byte, and no merges: any text can be encoded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=numbers, merges=[], model_max_length=max_length)


def lively(network: M) -> M:
    """Weights large enough that text, noise and place all show in the picture."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                nn.init.orthogonal_(parameter, gain=1.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()
