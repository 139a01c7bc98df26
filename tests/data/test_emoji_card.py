"""The data card's numbers are those of the data."""

from latentdiff.config import load_yaml
from latentdiff.data.scenes import ScenesConfig
from training.emoji_card import CARD, CONFIG, describe


def test_the_committed_card_is_what_the_program_writes() -> None:
    assert CARD.read_text(encoding="utf-8") == describe(load_yaml(ScenesConfig, CONFIG))
