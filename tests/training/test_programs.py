"""The whole chain: two processes as a user starts them, and every model's configs at full size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentdiff.data.cache import LatentCache
from latentdiff.data.order import Share
from latentdiff.pipeline import TextToImage
from tests.launched import launch, printed_by
from training import autoencoder, clip

ROOT = Path(__file__).parents[2]
ORDER = ("autoencoder", "clip", "cache_latents", "diffusion")


def state(chain: Any, program: str) -> dict[str, Tensor]:
    newest = max((chain.run_dir(program) / "checkpoints").iterdir())
    return load_file(newest / "network.safetensors")


@pytest.fixture(scope="module")
def two(chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny chain made by two processes."""
    two = chain("tiny", tmp_path_factory.mktemp("two"))
    for program in ORDER:
        printed = printed_by(launch(f"training.{program}", two.arguments(program)))
        # One process speaks for both; but those that cache do not meet, and may finish at once.
        assert printed.count("finished: ") in ((1, 2) if program == "cache_latents" else (1,)), (
            printed
        )
    return two


def test_two_processes_make_a_model_that_draws(two: Any) -> None:
    model = two.run_dir("diffusion") / "model"
    (picture,) = TextToImage.load(model).generate(
        ["a fox on a blue background"], seed=0, num_inference_steps=3
    )
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
    assert np.asarray(picture).std() > 1
    assert json.loads((model / "vocabulary.json").read_text())["resolution"] == 64


def test_two_processes_make_the_cache_of_one(two: Any) -> None:
    config = two.config("cache_latents")
    one = two.root / "one"
    two.run("cache_latents", run_dir=one)
    mine, theirs = LatentCache(one), LatentCache(config.run_dir)
    assert mine.key == theirs.key
    assert mine.captions() == theirs.captions()
    a, b = mine.read(range(256)), theirs.read(range(256))
    for name in ("mean", "logvar", "ids", "sizes"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=2e-3, rtol=2e-3)


def test_two_processes_leave_a_finished_run_alone(two: Any) -> None:
    printed = printed_by(launch("training.clip", two.arguments("clip")))
    assert printed.count("is finished") == 1


@pytest.mark.parametrize("program", ["autoencoder", "clip", "diffusion"])
def test_two_processes_train_as_one_does(two: Any, program: str) -> None:
    """But for rounding, which Adam enlarges where a gradient is nearly zero."""
    one = two.program(program, run_dir=two.root / f"one-{program}")
    start = {name: value.clone() for name, value in one.network.state_dict().items()}
    two.train(one)
    alone, together = one.network.state_dict(), state(two, program)
    trained = {name for name, value in one.network.named_parameters() if value.requires_grad}
    assert trained <= together.keys() <= alone.keys()
    apart = sum(float((alone[name] - together[name]).square().sum()) for name in together)
    moved = sum(float((alone[name] - start[name]).square().sum()) for name in together)
    assert apart < 0.01 * moved


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("autoencoder", {}),
        ("autoencoder", {"vae": "null", "init_from": "emoji", "decoder_only": True}),
        ("autoencoder", {"scenes": "null"}),  # pictures of files, three steps an epoch
        ("clip", {}),
        ("diffusion", {}),
        ("diffusion", {"distillation__steps": 10, "objective__min_snr_gamma": "null"}),
    ],
)
def test_a_program_twice_and_resumed_gives_the_same_bytes(
    tiny_chain: Any, folder: Path, tmp_path: Path, program: str, options: dict[str, Any]
) -> None:
    few = {"max_steps": 6, "checkpoint_every": 2, "sample_every": 6, **options}
    if "scenes" in options:
        source = {"type": "folder", "path": str(folder)}
        few["pictures"] = json.dumps({"source": source, "held_out": source, "resolution": 32})
    if "distillation__steps" in options:
        few |= {"init_from": tmp_path / "teacher", "scheduler": "null", "text_encoder": "null"}
        tiny_chain.program("diffusion").finish(few["init_from"], torch.device("cpu"))

    def run(name: str, stop: int | None) -> None:
        made = tiny_chain.program(program, run_dir=tmp_path / name, **few)
        batches = made.batches

        def mortal(steps: range, share: Share) -> Iterator[Any]:
            for step, batch in zip(steps, batches(steps, share), strict=True):
                if step == stop:
                    raise Killed
                yield batch

        made.batches = mortal
        tiny_chain.train(made)

    run("whole", None)
    with pytest.raises(Killed):
        run("parts", 3)
    run("parts", None)
    whole, parts = (tmp_path / name / "checkpoints" / "step-000006" for name in ("whole", "parts"))
    for file in whole.iterdir():
        assert file.read_bytes() == (parts / file.name).read_bytes(), file.name


def test_resumed_with_another_network_it_is_refused_in_one_sentence(
    tiny_chain: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny_chain.arguments("clip", text__hidden_size=64, max_steps=4)
    result = subprocess.run(
        [sys.executable, "-m", "training.clip", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("latentdiff: ")
    assert result.stderr.splitlines()[-1].endswith("another shape; choose another run_dir.")
    assert "Traceback" not in result.stderr


# The configs of the models that are meant to be good, at their true sizes


SHORT = {"max_steps": 2, "checkpoint_every": 1, "sample_every": 2, "log_every": 1}
PLAIN = {"compile": "false", "mixed_precision": "no", "workers": 0}


@pytest.mark.parametrize(("configs", "resolution"), [("emoji", 64), ("emoji_gpu", 128)])
def test_every_program_runs_with_the_true_networks(
    chain: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    configs: str,
    resolution: int,
) -> None:
    model = chain(configs, tmp_path)
    # Over a few scenes, not a thousand.
    monkeypatch.setattr(autoencoder, "MEASURED", 64)
    monkeypatch.setattr(autoencoder, "UNSEEN", 12)
    model.run("autoencoder", batch_size=2, crop=32, **SHORT, **PLAIN)
    model.run("clip", batch_size=4, tokenizer_captions=2000, **SHORT, **PLAIN)
    cache = {name: value for name, value in PLAIN.items() if name != "compile"}
    model.run("cache_latents", source__count=4, batch_size=2, **cache)
    plain = {name: value for name, value in PLAIN.items() if name != "workers"}
    prompts = "[a fox to the left of a red apple on a blue background]"
    model.run("diffusion", batch_size=2, sample_prompts=prompts, **SHORT, **plain)

    config = model.config("diffusion")
    latents = LatentCache(config.cache)
    side = config.unet.sample_size
    assert latents.latent_shapes == [(16, side, side)]
    assert side * 8 == resolution

    directory = config.run_dir / "model"
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    assert size <= 32_000_000
    text_to_image = TextToImage.load(directory)
    (picture,) = text_to_image.generate(["a rocket"], seed=1, num_inference_steps=1)
    assert picture.size == (resolution, resolution)

    # The tokenizer splits no noun of the vocabulary beyond the tower's length.
    tokens = clip.TextEncoder(
        text_to_image.parts.text_encoder.tokenizer, text_to_image.parts.text_encoder.model
    ).tokenize(latents.captions())
    assert tokens[:, -1].unique().tolist() == [len(text_to_image.parts.text_encoder.tokenizer) - 1]
