"""One run on one, two and four processes, replicated and in shards, as a user launches it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentdiff.checkpoint import load_model
from latentdiff.model_files import read_json
from tests.launched import launch, printed_by

STEPS = 12
OPTIONS = {
    "max_steps": STEPS,
    "batch_size": 4,
    "micro_batch_size": 1,
    "log_every": 1,
    "checkpoint_every": 4,
    "checkpoints_kept": 3,
    "sample_every": STEPS,
    "validate_every": 6,
    "validation_samples": 8,
}

SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


class Runs:
    """The same run under different names."""

    def __init__(self, chain: Any, root: Path) -> None:
        self.chain, self.root = chain, root

    def options(self, name: str) -> dict[str, Any]:
        options = {"run_dir": self.root / name} | OPTIONS
        if name.startswith("measured"):
            options |= {"evaluate_every": STEPS, "evaluation": self.root / "protocol.yaml"}
            options |= {"best__figure": "features.clip.clip_score"}
        if name.startswith("distilled"):
            options |= {"init_from": self.root / "teacher", "distillation__steps": 10}
            options |= {"objective__min_snr_gamma": "null"}
            options |= {"scheduler": "null", "text_encoder": "null"}
        return options | {"validation_cache": self.chain.run_dir("cache_latents")}

    def arguments(self, name: str) -> list[str]:
        words: list[str] = self.chain.arguments("diffusion", **self.options(name))
        return words

    def alone(self, name: str) -> None:
        self.chain.run("diffusion", **self.options(name))

    def together(
        self, name: str, processes: int, more: Sequence[str] = (), **environment: str
    ) -> None:
        arguments = [*self.arguments(name), *more]
        printed_by(launch("training.diffusion", arguments, processes, **environment))

    def continued(self, name: str, before: str, step: int) -> None:
        """A run directory that another run would have left after `step` steps."""
        checkpoint = Path("checkpoints", f"step-{step:06d}")
        shutil.copytree(self.root / before / checkpoint, self.root / name / checkpoint)
        shutil.copy(self.root / before / "metrics.jsonl", self.root / name)

    def last_line(self, name: str) -> dict[str, Any]:
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def curve(self, name: str, figure: str) -> dict[int, float]:
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["step"]: row[figure] for row in rows if figure in row}

    def check_like(self, name: str, other: str) -> None:
        """The losses of every step, what is measured between them, and the finished weights."""
        for figure in ("loss", "grad_norm", "validation/loss", "validation/loss_ema_0.9"):
            curve, expected = self.curve(name, figure), self.curve(other, figure)
            assert list(curve) == list(expected) != []
            assert curve == pytest.approx(expected, rel=1e-5), figure
        assert len(self.curve(name, "loss")) == STEPS
        mine, theirs = (
            load_file(self.root / run / "checkpoints" / "step-000012" / "network.safetensors")
            for run in (name, other)
        )
        assert mine.keys() == theirs.keys()
        apart = sum(float((mine[key] - theirs[key]).square().sum()) for key in mine)
        size = sum(float(value.square().sum()) for value in theirs.values())
        assert apart < 1e-8 * size


@pytest.fixture(scope="module")
def runs(tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tiny_chain, tmp_path_factory.mktemp("processes"))
    runs.alone("one")
    runs.together("two", 2)
    return runs


def test_two_processes_are_one(runs: Runs) -> None:
    runs.check_like("two", "one")


def test_a_run_goes_from_two_processes_to_one_to_four(runs: Runs) -> None:
    runs.continued("changing", "two", 4)
    runs.alone("changing")
    runs.check_like("changing", "one")
    runs.continued("changing again", "changing", 8)
    runs.together("changing again", 4)
    runs.check_like("changing again", "one")


def test_shards_are_replicas(runs: Runs) -> None:
    """FSDP2, which samples and saves the finished model as well."""
    runs.together("shards", 2, **SHARDS)
    runs.check_like("shards", "two")
    mine, theirs = (load_model(runs.root / name / "model") for name in ("shards", "two"))
    for name, value in mine.unet.state_dict().items():
        torch.testing.assert_close(value, theirs.unet.state_dict()[name], atol=1e-3, rtol=1e-3)
    grid = Path("samples", "step-000012.png")
    assert (runs.root / "shards" / grid).is_file()


def test_distillation_on_two_processes_and_in_shards_is_that_of_one(runs: Runs) -> None:
    shutil.copytree(runs.root / "one" / "model", runs.root / "teacher")
    runs.alone("distilled")
    runs.together("distilled by two", 2)
    runs.check_like("distilled by two", "distilled")
    runs.together("distilled in shards", 2, **SHARDS)
    runs.check_like("distilled in shards", "distilled")


@pytest.fixture(scope="module")
def measured(runs: Runs) -> Runs:
    """What one process measures of finished training: the weights of a checkpoint, to the bit."""
    (runs.root / "protocol.yaml").write_text(
        "{name: quick, count: 18, num_inference_steps: 2, features: [{type: clip}], "
        "prompts: {type: scenes, kinds: [one, two_held_out]}, "
        "reference: {type: renders, count: 6}}"
    )
    runs.continued("measured", "one", STEPS)
    runs.alone("measured")
    return runs


@pytest.mark.parametrize("environment", [{}, SHARDS], ids=["replicas", "shards"])
def test_two_processes_measure_what_one_does(measured: Runs, environment: dict[str, str]) -> None:
    """A piece each, where one makes both; and the best is the same model."""
    name = f"measured by {'shards' if environment else 'replicas'}"
    measured.continued(name, "one", STEPS)
    measured.together(name, 2, **environment)
    mine, theirs = (measured.root / run for run in (name, "measured"))
    folder = Path("evaluations", f"step-{STEPS:06d}")
    rows = sorted(path.name for path in (theirs / folder / "drawn").glob("*.npy"))
    assert rows == ["clip.npy", "clip_text.npy", "scenes.npy"]
    for file in rows:
        found, expected = (np.load(run / folder / "drawn" / file) for run in (mine, theirs))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    figures = [key for key in measured.last_line("measured") if key.startswith("evaluation/")]
    assert {"evaluation/one.objects", "evaluation/features.clip.frechet"} <= {*figures}
    for figure in figures:
        expected = pytest.approx(measured.curve("measured", figure), rel=1e-3, abs=1e-4)
        assert measured.curve(name, figure) == expected, figure
    bests = [json.loads((run / "best" / "best.json").read_text()) for run in (mine, theirs)]
    assert bests[0].pop("value") == pytest.approx(bests[1].pop("value"), rel=1e-4)
    assert bests[0] == bests[1]
    file = Path("unet", "diffusion_pytorch_model.safetensors")
    assert (mine / "best" / file).read_bytes() == (theirs / "best" / file).read_bytes()
    identities = [read_json(run / folder / "drawn" / "identity.json") for run in (mine, theirs)]
    assert identities[0] == identities[1]


def test_shards_in_half_precision_draw_and_measure(measured: Runs) -> None:
    """In the arithmetic that large networks are trained in, and then go on."""
    name = "measured in bf16"
    measured.continued(name, "one", 8)
    more = ["--mixed_precision", "bf16", "--evaluate_every", "10"]
    measured.together(name, 2, more, **SHARDS)
    assert (measured.root / name / "samples" / f"step-{STEPS:06d}.png").is_file()
    assert list(measured.curve(name, "evaluation/one.objects")) == [10, STEPS]
    rows = [
        np.load(measured.root / run / "evaluations" / f"step-{STEPS:06d}" / "drawn" / "clip.npy")
        for run in (name, "measured")
    ]
    lengths = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
    assert ((rows[0] * rows[1]).sum(axis=1) > 0.95 * lengths).all()


def test_a_lost_process_ends_the_others_promptly(runs: Runs) -> None:
    """Not after the ten minutes that a silent one is waited for."""
    arguments = [*runs.arguments("lost"), "--max_steps", "100000", "--sample_every", "100000"]
    arguments += ["--validate_every", "100000"]
    with launch("training.diffusion", arguments) as run:
        checkpoints = runs.root / "lost" / "checkpoints"
        end = time.monotonic() + 300
        while not list(checkpoints.glob("step-*/manifest.json")):
            assert run.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), 9)
        run.communicate(timeout=100)
    assert run.returncode != 0
    assert not any(Path(f"/proc/{child}").exists() for child in children)
