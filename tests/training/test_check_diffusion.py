"""What training.check says of what a run of training.diffusion learns from."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from latentdiff.data.order import Plan, Share
from latentdiff.diffusion.parameterization import PARAMETERIZATIONS
from latentdiff.diffusion.schedule import Schedule
from latentdiff.rng import keyed_normal
from tests.training.checked import context, run_config
from training import check_diffusion
from training.check import Finding
from training.distillation import DistillationConfig
from training.objective import ObjectiveConfig


def levels(findings: Iterator[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_buckets_that_fill_no_batch_are_named() -> None:
    findings = list(
        check_diffusion.check_order(
            context(run_config(), plan=Plan(0, [40, 3, 0, 8], batch_size=4))
        )
    )
    assert [finding.level for finding in findings] == ["ok", "warning"]
    assert "12 steps takes 48 of 51 samples" in findings[0].sentence
    assert "Bucket 1 holds 3 samples" in findings[1].sentence
    assert levels(check_diffusion.check_order(context(run_config(), plan=Plan(0, [7], 4)))) == [
        "warning"
    ]


class Drawn:
    """A micro-batch whose noise is keyed by sample, or all alike."""

    def __init__(self, samples: list[int], keyed: bool = True) -> None:
        self.samples, self.keyed = samples, keyed

    def draw(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        samples = self.samples if self.keyed else [0] * len(self.samples)
        return keyed_normal(0, stream, 0, samples, shape)


@pytest.mark.parametrize(
    ("batches", "level"),
    [
        ([Drawn([3, 1]), Drawn([2, 7])], "ok"),
        ([Drawn([3, 1]), Drawn([1, 7])], "FAIL"),
        ([Drawn([3, 1], keyed=False)], "FAIL"),
    ],
)
def test_noise_that_comes_twice_fails(batches: list[Drawn], level: str) -> None:
    def of_steps(steps: range, share: Share) -> Iterator[list[Drawn]]:
        yield batches

    assert levels(check_diffusion.check_noise(context(run_config(), batches=of_steps))) == [level]


@pytest.mark.parametrize(
    ("dropout", "measured", "expected"),
    [(0.1, 0.1, ["ok"]), (0.1, 0.0, ["FAIL"]), (0.1, 0.2, ["FAIL"]), (0, 0, ["ok", "warning"])],
)
def test_caption_dropout_is_measured(dropout: float, measured: float, expected: list[str]) -> None:
    class Objective(ObjectiveConfig):
        def dropped(self, draw: Any) -> Tensor:
            return draw("caption", None) < measured

    config = run_config(objective=Objective(caption_dropout=dropout), distillation=None)
    latents = SimpleNamespace(cut=(0.05, 77))
    found = levels(check_diffusion.check_captions(context(config, latents=latents)))
    assert found == ["ok", *expected]


def test_a_student_needs_no_dropout() -> None:
    objective, distillation = ObjectiveConfig(caption_dropout=0), DistillationConfig()
    config = run_config(objective=objective, distillation=distillation)
    latents = SimpleNamespace(cut=(0.05, 77))
    looked_at = context(config, latents=latents)
    assert levels(check_diffusion.check_captions(looked_at)) == ["ok", "ok"]
    assert levels(check_diffusion.check_loss_weights(looked_at)) == []


def test_captions_that_are_cut_are_counted() -> None:
    config = run_config(objective=ObjectiveConfig(), distillation=None)
    latents = SimpleNamespace(cut=(0.15, 77))
    first, _ = check_diffusion.check_captions(context(config, latents=latents))
    assert first.level == "warning"
    assert "15.0% of the captions are longer than the 77 tokens" in first.sentence


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_loss_weights_must_be_finite_and_positive(bad: float) -> None:
    class Objective(ObjectiveConfig):
        def weights(self, schedule: Any, parameterization: Any) -> Tensor:
            weights = super().weights(schedule, parameterization)
            weights[-3] = bad
            return weights

    schedule = Schedule.scaled_linear(0.00085, 0.012, 1000)
    parts = SimpleNamespace(schedule=schedule, parameterization=PARAMETERIZATIONS["epsilon"])
    config = run_config(objective=ObjectiveConfig(min_snr_gamma=5), distillation=None)
    good = context(config, parts=parts)
    assert levels(check_diffusion.check_loss_weights(good)) == ["ok"]
    config = run_config(objective=Objective(min_snr_gamma=5), distillation=None)
    (finding,) = check_diffusion.check_loss_weights(context(config, parts=parts))
    assert finding.level == "FAIL"
    assert "at timestep 997" in finding.sentence
    assert "at 1 of 1000" in finding.sentence
