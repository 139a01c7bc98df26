"""CLIP: near misses that differ in one thing, and the loss written out."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from latentdiff.config import load_yaml
from latentdiff.data.held_out import HeldOut
from latentdiff.data.order import Share
from latentdiff.data.scenes import EmojiScenes, Scene, ScenesConfig
from training.pairs import NearMisses

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def misses(tiny_chain: Any) -> NearMisses:
    scenes = EmojiScenes(load_yaml(ScenesConfig, ROOT / "configs/emoji/scenes.yaml"))
    return NearMisses(scenes, tiny_chain.program("clip", tokenizer_captions=50).tokenizer)


@pytest.fixture(scope="module")
def program(tiny_chain: Any) -> Any:
    return tiny_chain.program("clip")


def differences(scene: Scene, miss: Scene) -> set[str]:
    """What a near miss changed, places and sizes apart."""
    found = set()
    if miss.background != scene.background:
        found.add("background")
    pairs = list(zip(scene.objects, miss.objects, strict=True))
    # Not even the corner of a box may move.
    assert all(replace(old, concept=new.concept) == new for old, new in pairs)
    assert miss.relation == scene.relation
    return found | {f"object {n}" for n, (old, new) in enumerate(pairs) if old != new}


def test_scenes_come_in_fours_that_differ_as_is_said(misses: NearMisses) -> None:
    kinds: Counter[tuple[int, bool, str]] = Counter()
    for number in range(300):
        scene, *near = (misses.scene(4 * number + variant) for variant in range(4))
        assert scene == misses.scenes.scene(number)
        pair = len(scene.objects) == 2
        for variant, miss in enumerate(near, start=1):
            changed = differences(scene, miss)
            kinds[variant, pair, " and ".join(sorted(changed))] += 1
            if changed == {"object 0", "object 1"}:
                first, second = scene.objects
                assert [o.concept for o in miss.objects] == [second.concept, first.concept]
    allowed = {
        (1, False, "background"),
        (1, True, "background"),
        (1, True, "object 0 and object 1"),
        (2, False, "object 0"),
        (3, False, "object 0"),
        (2, True, "object 0"),
        (3, True, "object 1"),
    }
    assert set(kinds) == allowed
    swapped, recoloured = kinds[1, True, "object 0 and object 1"], kinds[1, True, "background"]
    assert abs(swapped - recoloured) < 5 * np.sqrt(swapped + recoloured)


def test_a_sample_is_its_scenes_picture_and_caption(misses: NearMisses) -> None:
    for index in range(8):
        scene, sample = misses.scene(index), misses[index]
        picture = misses.scenes.render(scene)
        np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), picture)
        text = misses.tokenizer.decode(sample["ids"], skip_special_tokens=True)
        assert text.replace(" ,", ",").strip() == scene.caption
        assert sample["ids"].shape == (32,)


def test_the_loss_is_symmetric_cross_entropy(program: Any) -> None:
    """Radford et al. (2021), figure 3, in NumPy."""
    (batch,) = next(program.batches(range(1), Share()))
    losses = program.losses(program.network, batch, CPU)
    with torch.no_grad():
        images = batch.data["image"].float() / 255 * 2 - 1
        output = program.network.clip(input_ids=batch.data["ids"], pixel_values=images)
    texts, pictures = output.text_embeds.numpy(), output.image_embeds.numpy()
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(pictures, axis=1), 1, rtol=1e-5)
    scale = program.network.clip.logit_scale.exp().item()
    logits = scale * pictures.astype(float) @ texts.T.astype(float)

    def cross_entropy(rows: np.ndarray) -> float:
        peak = rows.max(axis=1, keepdims=True)
        logs = rows - peak - np.log(np.exp(rows - peak).sum(axis=1, keepdims=True))
        return float(-np.diag(logs).mean())

    expected = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    assert losses.loss.item() == pytest.approx(expected, rel=1e-4)
    right = logits.argmax(axis=1) == np.arange(len(logits))
    assert float(losses.figures["accuracy"]) == pytest.approx(right.mean())
    assert float(losses.figures["scale"]) == pytest.approx(scale)


def test_both_towers_learn_from_the_loss(program: Any) -> None:
    network = copy.deepcopy(program.network)
    (batch,) = next(program.batches(range(1), Share()))
    program.losses(network, batch, CPU).loss.backward()
    idle = {
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert idle == set()


def test_similarity_is_the_cosine_of_the_towers(program: Any) -> None:
    scenes = program.pairs.scenes
    shown = [scenes.scene(index) for index in range(6)]
    images = np.stack([scenes.render(scene) for scene in shown])
    pairs = HeldOut([s.caption for s in shown], torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        found = program.similarity(pairs, CPU)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        ids = program.tokenizer(
            [scene.caption for scene in shown], padding="max_length", return_tensors="pt"
        )["input_ids"]
        output = program.network.clip(input_ids=ids, pixel_values=pixels)
    expected = output.logits_per_text / program.network.clip.logit_scale.exp()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_finished_tower_is_that_of_the_whole(tiny_chain: Any) -> None:
    directory = tiny_chain.run_dir("clip") / "model"
    whole = CLIPModel.from_pretrained(directory / "clip").eval()
    tower = CLIPTextModel.from_pretrained(directory / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer")
    ids = tokenizer(["a fox", "a robot"], padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            tower(ids).last_hidden_state, whole.text_model(ids).last_hidden_state
        )
