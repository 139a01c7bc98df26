"""Watching, cancelling, and where the networks are meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.errors import InputError
from latentdiff.pipeline import TextToImage

SETTINGS: dict[str, Any] = {"seed": 3, "num_inference_steps": 4}


def test_a_step_at_a_time_to_what_generate_makes(tiny: TextToImage) -> None:
    prompts = ["fox"] * 10
    *steps, last = tiny.stream(prompts, **SETTINGS)
    assert [step.step for step in steps] == list(range(1, 8))  # two batches of four steps
    assert {step.total for step in steps} == {8}
    assert [len(step.images) for step in steps] == [8, 8, 8, 8, 2, 2, 2]
    assert {image.size for step in steps for image in step.images} == {(64, 64)}
    assert (last.step, last.total) == (8, 8)
    expected = tiny.generate(prompts, **SETTINGS)
    assert [image.tobytes() for image in last.images] == [image.tobytes() for image in expected]


def test_previews_come_to_look_like_the_picture() -> None:
    """Of the bundled model: the tiny one's VAE is random, and no colour of it is linear."""
    *steps, last = TextToImage.load().stream("a fox on a blue background", **SETTINGS)
    final = np.asarray(last.images[0].resize((8, 8), Image.Resampling.BOX), dtype=float)
    errors = [
        np.abs(np.asarray(step.images[0].resize((8, 8), Image.Resampling.BOX)) - final).mean()
        for step in steps
    ]
    assert errors[-1] < 0.8 * errors[0]


def test_errors_come_before_the_first_step(tiny: TextToImage) -> None:
    with pytest.raises(InputError, match="no sampler"):
        tiny.stream("fox", sampler="x")


def test_leaving_the_loop_ends_the_work(tiny: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], tiny.parts.unet.forward

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny.parts.unet, "forward", spy)
    for progress in tiny.stream("fox", **SETTINGS):
        if progress.step == 2:
            break
    assert len(calls) == 2
    assert not torch.is_inference_mode_enabled()


def test_a_bar_on_stderr_when_asked(tiny: TextToImage, capfd: pytest.CaptureFixture[str]) -> None:
    tiny.generate("fox", **SETTINGS)
    assert capfd.readouterr() == ("", "")
    tiny.generate("fox", progress=True, **SETTINGS)
    out, err = capfd.readouterr()
    assert out == ""
    assert "4/4" in err


def test_offloaded_networks_move_only_while_they_work(
    tiny: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, never two at once, and back again."""
    model = TextToImage(tiny.parts, offload_to="cpu")
    moves: list[tuple[str, str]] = []
    networks = {
        "unet": tiny.parts.unet,
        "vae": tiny.parts.autoencoder,
        "text": tiny.parts.text_encoder,
    }
    for name, network in networks.items():
        there = iter(["device", "cpu"] * 10)
        monkeypatch.setattr(
            network, "to", lambda *_, name=name, there=there: moves.append((name, next(there)))
        )
    *_, last = model.stream("fox", **SETTINGS)
    (made,) = last.images
    monkeypatch.undo()
    on: set[str] = set()
    for name, place in moves:
        on = on | {name} if place == "device" else on - {name}
        assert len(on) <= 1
    assert not on
    assert {name for name, _ in moves} == set(networks)
    expected = tiny.generate("fox", **SETTINGS)
    assert isinstance(expected, Image.Image)
    assert made.tobytes() == expected.tobytes()


def test_strips_decode_to_the_same_picture(tiny: TextToImage) -> None:
    whole = tiny.generate("fox", height=128, **SETTINGS)
    strips = tiny.generate("fox", height=128, tile=3, **SETTINGS)
    assert np.abs(np.asarray(whole, dtype=int) - np.asarray(strips, dtype=int)).max() <= 1
