"""The training programs run in this process, on the CPU, in directories of their own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from latentdiff.config import Config, load_config
from training import autoencoder, cache_latents, clip, diffusion
from training.autoencoder import AutoencoderConfig, AutoencoderProgram
from training.cache_latents import CacheConfig
from training.clip import ClipConfig, ClipProgram
from training.diffusion import DiffusionConfig, DiffusionProgram
from training.loop import make_accelerator, train

ROOT = Path(__file__).parents[2]
CONFIGS: dict[str, type[Config]] = {
    "autoencoder": AutoencoderConfig,
    "clip": ClipConfig,
    "cache_latents": CacheConfig,
    "diffusion": DiffusionConfig,
}
PROGRAMS: dict[str, Any] = {
    "autoencoder": AutoencoderProgram,
    "clip": ClipProgram,
    "diffusion": DiffusionProgram,
}
MAINS = {
    "autoencoder": autoencoder.main,
    "clip": clip.main,
    "cache_latents": cache_latents.main,
    "diffusion": diffusion.main,
}


class Chain:
    """One folder of configs with everything it writes and reads moved below `root`."""

    def __init__(self, configs: str, root: Path) -> None:
        self.configs, self.root = ROOT / "configs" / configs, root

    def run_dir(self, program: str) -> Path:
        return self.root / program

    def arguments(self, program: str, **overrides: Any) -> list[str]:
        """The command line; `a__b=1` means `--a.b 1`."""
        made: dict[str, Any] = {"run_dir": self.run_dir(program)}
        if program == "diffusion":
            made["cache"] = self.run_dir("cache_latents")
        if program in ("cache_latents", "diffusion"):
            made["autoencoder"] = self.run_dir("autoencoder") / "model"
            made["text_encoder"] = self.run_dir("clip") / "model"
        scenes = "source__path" if program == "cache_latents" else "scenes"
        made[scenes] = self.configs / "scenes.yaml"
        words = ["--config", str(self.configs / f"{program}.yaml")]
        for name, value in (made | overrides).items():
            words += ["--" + name.replace("__", "."), str(value)]
        return words

    def config(self, program: str, **overrides: Any) -> Any:
        return load_config(CONFIGS[program], self.arguments(program, **overrides))

    def program(self, program: str, **overrides: Any) -> Any:
        """The program before its first step."""
        return PROGRAMS[program](self.config(program, **overrides))

    def train(self, program: Any) -> None:
        """Run it to the end, or on to the end."""
        reset()
        train(program, program.config, make_accelerator(program.config))

    def run(self, program: str, **overrides: Any) -> None:
        """The program's own main."""
        reset()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program, *self.arguments(program, **overrides)])
            MAINS[program]()


def reset() -> None:
    """Forget the last Accelerator, as a new process would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    reset()
    yield
    with contextlib.suppress(AttributeError):
        reset()


@pytest.fixture(scope="session")
def chain() -> type[Chain]:
    return Chain


@pytest.fixture(scope="session")
def tiny_chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A VAE and a CLIP of two steps and a cache of 32 scenes; to be read, never changed."""
    chain = Chain("tiny", tmp_path_factory.mktemp("tiny"))
    few = {"max_steps": 2, "checkpoint_every": 2, "sample_every": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        chain.run("autoencoder", **few)
        chain.run("clip", **few)
        chain.run("cache_latents", source__count=32, shard_size=8, batch_size=4)
    return chain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """12 pictures of one colour each at their left, black at their right, of several shapes; the
    fourth is damaged.
    """
    import datasets

    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        pixels = np.zeros((40 + number, 60, 3), dtype=np.uint8)
        pixels[:, :30] = 20 * number + 10
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}")
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:-60])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield folder
