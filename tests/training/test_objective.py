"""The objective against diffusers' training example, and what it draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.parameterization import PARAMETERIZATIONS
from latentdiff.diffusion.schedule import Schedule
from latentdiff.diffusion.timesteps import TimestepConfig
from latentdiff.rng import keyed_normal, keyed_uniform
from training.objective import ObjectiveConfig

SAMPLES = (4, 0, 9, 2, 7, 30)
X0 = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
PLAIN = Schedule.scaled_linear(0.00085, 0.012, 1000)
ZERO = PLAIN.zero_terminal_snr()


class Keyed:
    """As training.diffusion draws, keeping the names of the streams."""

    def __init__(self, samples: tuple[int, ...] = SAMPLES) -> None:
        self.samples = samples
        self.streams: list[str] = []

    def __call__(self, stream: str, shape: tuple[int, ...] | None) -> Tensor:
        self.streams.append(stream)
        if shape is None:
            return keyed_uniform(1, stream, 2, self.samples)
        return keyed_normal(1, stream, 2, self.samples, shape)


def network(x: Tensor, timestep: Tensor, cond: Any) -> Tensor:
    return torch.tanh(x.roll(1, -1) + timestep[:, None, None, None] / 500)


def denoiser(name: str = "epsilon", schedule: Schedule = PLAIN) -> Denoiser:
    return Denoiser(network, schedule, PARAMETERIZATIONS[name])


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_it_is_diffusers_training_example(name: str, gamma: float | None) -> None:
    """With offset noise, input perturbation and min-SNR, as train_text_to_image.py has them."""
    config = ObjectiveConfig(min_snr_gamma=gamma, offset_noise=0.1, input_perturbation=0.1)
    ours, t = config.losses(denoiser(name), X0, Keyed(), None)

    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=name
    )
    draw, shape = Keyed(), tuple(X0.shape[1:])
    timestep = (draw("timestep", None).double() * 1000).long()
    noise = draw("noise", shape) + 0.1 * draw("offset", (3, 1, 1))
    new_noise = noise + 0.1 * draw("perturbation", shape)
    target = noise if name == "epsilon" else scheduler.get_velocity(X0, noise, timestep)
    predicted = network(scheduler.add_noise(X0, new_noise, timestep), timestep.float(), None)
    expected = (predicted - target).square().mean(dim=(1, 2, 3))
    if gamma is not None:
        snr = scheduler.alphas_cumprod[timestep] / (1 - scheduler.alphas_cumprod[timestep])
        expected *= snr.clamp(max=gamma) / (snr if name == "epsilon" else snr + 1)
    assert_close(t, timestep)
    assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_drawn_that_is_not_used() -> None:
    draw = Keyed()
    ObjectiveConfig().losses(denoiser(), X0, draw, None)
    assert draw.streams == ["timestep", "noise"]


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("perturbation", [0.0, 0.1])
def test_streams_are_all_that_is_drawn(offset: float, perturbation: float) -> None:
    """So that what is drawn ahead suffices, and is of the shape that is asked for."""
    config = ObjectiveConfig(offset_noise=offset, input_perturbation=perturbation)
    keyed, asked = Keyed(), list[tuple[str, tuple[int, ...] | None]]()

    def draw(stream: str, shape: tuple[int, ...] | None) -> Tensor:
        asked.append((stream, shape))
        return keyed(stream, shape)

    config.dropped(draw)
    config.losses(denoiser(), X0, draw, None)
    assert sorted(asked, key=str) == sorted(config.streams(tuple(X0.shape[1:])), key=str)


@pytest.mark.parametrize(
    "options",
    [{}, {"offset_noise": 0.1, "input_perturbation": 0.2, "min_snr_gamma": 5.0}],
)
def test_a_samples_loss_does_not_depend_on_its_batch(options: dict[str, float]) -> None:
    config = ObjectiveConfig(**options)  # type: ignore[arg-type]
    together, t = config.losses(denoiser(), X0, Keyed(), None)
    for row, sample in enumerate(SAMPLES):
        alone, own = config.losses(denoiser(), X0[row : row + 1], Keyed((sample,)), None)
        assert_close(alone, together[row : row + 1])
        assert own[0] == t[row]


def test_the_configured_timesteps_are_drawn() -> None:
    config = ObjectiveConfig(timesteps=TimestepConfig(first=300, last=301))
    _, t = config.losses(denoiser(), X0, Keyed(), None)
    assert {300, 301} >= set(t.tolist())


def test_captions_are_dropped_in_their_share() -> None:
    draw = Keyed(tuple(range(4000)))
    for share in (0.0, 0.1, 1.0):
        dropped = ObjectiveConfig(caption_dropout=share).dropped(draw)
        assert dropped.float().mean().item() == pytest.approx(share, abs=0.025)
    assert draw.streams == ["caption"] * 3


@pytest.mark.parametrize("gamma", [None, 0.5, 5.0])
@pytest.mark.parametrize("schedule", [PLAIN, ZERO, Schedule.flow(3.0, 1000)])
@pytest.mark.parametrize("name", list(PARAMETERIZATIONS))
def test_no_timestep_is_left_out_or_shouted(
    name: str, schedule: Schedule, gamma: float | None
) -> None:
    """Between 0 and the uniform weight of 1, x0's between 0 and gamma; at the noisy end of
    schedules without a signal there, as much as anywhere.
    """
    weights = ObjectiveConfig(min_snr_gamma=gamma).weights(schedule, PARAMETERIZATIONS[name])
    assert weights.shape == (1000,)
    assert weights.isfinite().all()
    assert (weights > 0).all()
    assert weights.max() <= (max(1.0, gamma or 1) if name == "sample" else 1.0001)
    if schedule is not PLAIN:
        assert weights[-1] >= 0.49 if gamma == 0.5 else weights[-1] >= 0.99


def test_ordinary_schedules_have_the_papers_weights() -> None:
    snr = PLAIN.alphas_cumprod / (1 - PLAIN.alphas_cumprod)
    weights = ObjectiveConfig(min_snr_gamma=5.0).weights(PLAIN, PARAMETERIZATIONS["v_prediction"])
    assert_close(weights.double(), snr.clamp(max=5) / (snr + 1), rtol=1e-5, atol=0)
