"""The data card's numbers are those of the data."""

from __future__ import annotations

import yaml

from latentdiff.config import load_yaml
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from training.emoji_card import CARD, CONFIG, describe


def test_the_committed_card_is_what_the_program_writes() -> None:
    assert CARD.read_text(encoding="utf-8") == describe(load_yaml(ScenesConfig, CONFIG))


def test_the_front_matter_names_licence_and_task() -> None:
    _, front, body = CARD.read_text(encoding="utf-8").split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["license"] == "ofl-1.1"
    assert values["task_categories"] == ["text-to-image"]
    assert body.startswith("\n# ")


def test_the_example_in_the_card_is_scene_zero() -> None:
    scenes = EmojiScenes(load_yaml(ScenesConfig, CONFIG))
    assert f'"caption": "{scenes[0]["caption"]}"' in CARD.read_text(encoding="utf-8")
