"""One run on one, two and four processes, replicated and in shards, as a user launches it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentdiff.checkpoint import load_model

ROOT = Path(__file__).parents[2]
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
    "evaluate_every": STEPS,
    "evaluation_prompts": 4,
}


def launch(processes: int, arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """training.diffusion by accelerate, on CPUs."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    command += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    own = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "-m", "training.diffusion", *arguments],
        cwd=ROOT,
        env=own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Runs:
    """The same run under different names."""

    def __init__(self, chain: Any, root: Path) -> None:
        self.chain, self.root = chain, root

    def arguments(self, name: str) -> list[str]:
        options = OPTIONS | {"validation_cache": self.chain.run_dir("cache_latents")}
        words: list[str] = self.chain.arguments("diffusion", run_dir=self.root / name, **options)
        return words

    def alone(self, name: str) -> None:
        options = OPTIONS | {"validation_cache": self.chain.run_dir("cache_latents")}
        self.chain.run("diffusion", run_dir=self.root / name, **options)

    def together(self, name: str, processes: int, **environment: str) -> None:
        with launch(processes, self.arguments(name), **environment) as run:
            _, errors = run.communicate(timeout=600)
        assert run.returncode == 0, errors[-4000:]

    def continued(self, name: str, before: str, step: int) -> None:
        """A run directory that another run would have left after `step` steps."""
        checkpoint = Path("checkpoints", f"step-{step:06d}")
        shutil.copytree(self.root / before / checkpoint, self.root / name / checkpoint)
        shutil.copy(self.root / before / "metrics.jsonl", self.root / name)

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
        assert self.curve(name, "evaluation/one") == self.curve(other, "evaluation/one")
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
    """FSDP2, which samples, evaluates and saves the finished model as well."""
    runs.together("shards", 2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    runs.check_like("shards", "two")
    mine, theirs = (load_model(runs.root / name / "model") for name in ("shards", "two"))
    for name, value in mine.unet.state_dict().items():
        torch.testing.assert_close(value, theirs.unet.state_dict()[name], atol=1e-3, rtol=1e-3)
    grid = Path("samples", "step-000012.png")
    assert (runs.root / "shards" / grid).is_file()


def test_a_lost_process_ends_the_others_promptly(runs: Runs) -> None:
    """Not after the ten minutes that a silent one is waited for."""
    arguments = [*runs.arguments("lost"), "--max_steps", "100000", "--sample_every", "100000"]
    arguments += ["--validate_every", "100000", "--evaluate_every", "100000"]
    with launch(2, arguments) as run:
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
