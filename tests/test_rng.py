"""Noise is a function of its key alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from latentdiff.rng import generator, keyed_normal, keyed_uniform, picture_noise

ROOT = Path(__file__).parents[1]
exactly = {"rtol": 0.0, "atol": 0.0}

keys = st.tuples(
    st.integers(-(2**40), 2**63),
    st.text(st.sampled_from("ab|019"), max_size=6),
    st.integers(0, 10**6),
    st.integers(0, 2**40),
)


def first_draw(key: tuple[int, str, int, int]) -> Tensor:
    seed, stream, epoch, sample = key
    return torch.randn(4, generator=generator(seed, stream, epoch, sample), dtype=torch.float64)


@settings(deadline=None)
@given(keys, keys)
def test_two_keys_draw_the_same_only_if_they_are_the_same(
    one: tuple[int, str, int, int], other: tuple[int, str, int, int]
) -> None:
    """The stream's text holds the separator and digits here, so that fields could run together."""
    assert torch.equal(first_draw(one), first_draw(other)) == (one == other)
    assert_close(first_draw(one), first_draw(one), **exactly)


@pytest.mark.parametrize(
    "other", [(2, "noise", 3, 4), (1, "drop", 3, 4), (1, "noise", 4, 4), (1, "noise", 3, 5)]
)
def test_every_field_of_the_key_counts(other: tuple[int, str, int, int]) -> None:
    assert not torch.equal(first_draw((1, "noise", 3, 4)), first_draw(other))


def test_digits_do_not_run_together() -> None:
    one, other = first_draw((1, "noise", 1, 23)), first_draw((1, "noise", 12, 3))
    assert not torch.equal(one, other)
    assert not torch.equal(first_draw((1, "2", 3, 4)), first_draw((12, "", 3, 4)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_sample_s_noise_knows_nothing_of_its_batch(
    samples: list[int], rearrange: random.Random
) -> None:
    """Any order, with repetitions, alone or in a batch, first call or second."""
    normal = keyed_normal(5, "noise", 2, samples, (2, 3))
    uniform = keyed_uniform(5, "timestep", 2, samples)
    assert normal.shape == (len(samples), 2, 3)
    assert uniform.shape == (len(samples),)
    order = list(range(len(samples)))
    rearrange.shuffle(order)
    shuffled = [samples[place] for place in order]
    assert_close(keyed_normal(5, "noise", 2, shuffled, (2, 3)), normal[order], **exactly)
    assert_close(keyed_uniform(5, "timestep", 2, shuffled), uniform[order], **exactly)
    for row, sample in enumerate(samples):
        assert_close(keyed_normal(5, "noise", 2, [sample], (2, 3))[0], normal[row], **exactly)
        assert_close(keyed_uniform(5, "timestep", 2, [sample])[0], uniform[row], **exactly)


def test_the_same_in_another_process() -> None:
    """Python's own hash of a text differs from process to process."""
    program = (
        "from latentdiff.rng import generator; import torch; "
        "print(torch.randint(2**62, (), generator=generator(7, 'noise', 1, 2)).item())"
    )
    expected = torch.randint(2**62, (), generator=generator(7, "noise", 1, 2)).item()
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout) == expected


def test_normal_within_a_sample_and_across_samples() -> None:
    """Kolmogorov-Smirnov along both axes, and no correlation between neighbouring samples.

    The bounds are those of one false alarm in 10,000; the seed is fixed.
    """
    noise = keyed_normal(0, "noise", 0, range(4000), (32,)).double()
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4
    assert stats.kstest(noise[:, 0].numpy(), "norm").pvalue > 1e-4
    count = noise.numel()
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    neighbours = (noise[1:] * noise[:-1]).mean()
    assert abs(neighbours) < 4 / count**0.5


def test_uniform_across_samples() -> None:
    values = keyed_uniform(0, "timestep", 0, range(4000))
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-4
    assert abs(values.mean() - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
    other_epoch = keyed_uniform(0, "timestep", 1, range(4000))
    assert abs(np.corrcoef(values, other_epoch)[0, 1]) < 4 / 4000**0.5


def test_pictures_start_from_diffusers_noise() -> None:
    seeds, shape = [0, 7, 2**53, 7], (4, 8, 6)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    expected = randn_tensor((len(seeds), *shape), generator=generators)
    assert_close(picture_noise(seeds, shape), expected, **exactly)
    assert_close(picture_noise(seeds[2:3], shape)[0], expected[2], **exactly)


def test_global_generators_are_neither_read_nor_moved() -> None:
    def draw() -> list[Tensor]:
        return [
            keyed_normal(1, "noise", 0, [3, 4], (5,)),
            keyed_uniform(1, "noise", 0, [3, 4]),
            picture_noise([1, 2], (5,)),
        ]

    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch_state, python_state = torch.get_rng_state(), random.getstate()
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        first = draw()
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert random.getstate() == python_state
        np.testing.assert_equal(np.random.get_state(legacy=False), numpy_state)  # noqa: NPY002
        torch.manual_seed(2)
        assert_close(draw(), first, **exactly)
