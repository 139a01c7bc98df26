"""The options of studies exist, and what is to be equal is: hours would pass before it showed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.studies import STUDIES, Model, Step, spaces, towers
from latentdiff.config import Config, load_config
from latentdiff.models.unet import UNet
from training.autoencoder import AutoencoderConfig
from training.cache_latents import CacheConfig
from training.clip import ClipConfig
from training.diffusion import DiffusionConfig

CONFIGS: dict[str, type[Config]] = {
    "autoencoder": AutoencoderConfig,
    "cache_latents": CacheConfig,
    "clip": ClipConfig,
    "diffusion": DiffusionConfig,
}
MODELS = [model for study in STUDIES.values() for model in study()]


def load(step: Step) -> Config:
    return load_config(CONFIGS[step.program], step.arguments)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_program_takes_its_options(model: Model) -> None:
    *before, last = map(load, model.training)
    assert isinstance(last, DiffusionConfig)
    assert last.run_dir == model.run_dir
    assert last.unet is not None
    UNet(last.unet)  # its channels divide into groups and heads
    for config in before:
        if isinstance(config, ClipConfig):
            assert config.text.hidden_size == last.unet.cross_attention_dim
        if isinstance(config, AutoencoderConfig):
            levels = len(config.vae.block_out_channels)
            assert config.vae.latent_channels == last.unet.in_channels == last.unet.out_channels
            assert last.unet.sample_size == 64 // 2 ** (levels - 1)
    caches = [config for config in before if isinstance(config, CacheConfig)]
    assert [str(config.run_dir) for config in caches] == [last.cache]
    assert caches[0].autoencoder == last.autoencoder
    assert caches[0].text_encoder == last.text_encoder


def operations(model: Model) -> int:
    config = load(model.training[-1])
    assert isinstance(config, DiffusionConfig)
    assert config.unet is not None
    assert (config.max_steps, config.batch_size) == (model.steps, model.batch_size)
    return model.operations(config.unet)


def test_spaces_are_given_equal_operations() -> None:
    given = [operations(model) for model in spaces()]
    assert max(given) <= 1.01 * min(given)


def test_the_smaller_unet_of_a_text_encoder_takes_a_quarter() -> None:
    given = [operations(model) for model in towers()[:4]]
    for smaller, larger in zip(given[::2], given[1::2], strict=True):
        assert smaller == pytest.approx(larger / 4, rel=0.06)


def test_no_two_runs_share_a_directory() -> None:
    made: dict[Path, Config] = {}
    for model in MODELS:
        for step in model.training:
            config = load(step)
            assert made.setdefault(config.run_dir, config) == config  # type: ignore[attr-defined]
