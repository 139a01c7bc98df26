"""What a model trained on emoji scenes knows, and which words of a prompt it does not."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from latentdiff.data.scenes import PHRASES, SIDES, STYLES

if TYPE_CHECKING:
    from latentdiff.data.scenes import ScenesConfig

JOINTS = ("a", "an", "and", "on", "in front of", "with", "background")
"""What captions say between nouns, colours and relations."""


class UnknownWordWarning(UserWarning):
    """A prompt says a word that no training caption did."""


class Vocabulary:
    """Every word of the training captions.

    concepts: canonical nouns; nouns: those and their synonyms; colours: of backgrounds;
    relations: the phrases for each.
    """

    def __init__(self, scenes: ScenesConfig) -> None:
        self.concepts = [concept.nouns[0] for concept in scenes.concepts]
        self.nouns = [noun for concept in scenes.concepts for noun in concept.nouns]
        self.colours = list(scenes.backgrounds)
        self.relations = {str(name): list(phrases) for name, phrases in PHRASES.items()}
        self.resolution = scenes.resolution
        sides = [side for pair in SIDES.values() for side in pair]
        phrases = [phrase for phrases in self.relations.values() for phrase in phrases]
        templates = [*phrases, *sides, *STYLES, *JOINTS]
        self._words = {
            word for text in [*self.nouns, *self.colours, *templates] for word in _words(text)
        }
        self._names = [*self.nouns, *self.colours, *sorted(self._words)]

    def unknown(self, prompt: str) -> dict[str, list[str]]:
        """The words of `prompt` that no caption had, each with the three nearest in spelling."""
        missing = [word for word in _words(prompt) if word not in self._words]
        return {
            word: difflib.get_close_matches(word, dict.fromkeys(self._names), n=3, cutoff=0.0)
            for word in missing
        }

    def warn(self, prompts: Iterable[str]) -> None:
        """Warns UnknownWordWarning of each unknown word, for the caller of the caller's caller."""
        unknown = {word: near for prompt in prompts for word, near in self.unknown(prompt).items()}
        for word, near in unknown.items():
            warnings.warn(
                f"This model never saw the word {word!r}; the nearest it knows: {', '.join(near)}.",
                UnknownWordWarning,
                stacklevel=4,
            )

    def describe(self) -> dict[str, Any]:
        """Plain values for `latentdiff info`."""
        return {
            "concepts": self.concepts,
            "colours": self.colours,
            "relations": self.relations,
            "resolution": self.resolution,
        }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
