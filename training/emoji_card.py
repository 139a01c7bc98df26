"""Write the data card of the emoji scenes; every number in it is computed.

python -m training.emoji_card
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import statistics
from collections import Counter
from pathlib import Path

from latentdiff.config import load_yaml
from latentdiff.data.scenes import (
    PAIR_SIZE,
    SINGLE_SIZE,
    EmojiScenes,
    ScenesConfig,
    is_held_out_colour,
    is_held_out_pair,
)
from latentdiff.data.sprites import SPRITES_FILE, load_sprites
from latentdiff.errors import run_command

CARD = Path(__file__).parent.parent / "data_cards" / "emoji_scenes.md"
CONFIG = Path(__file__).parent.parent / "configs" / "emoji" / "scenes.yaml"
SAMPLE = 10_000

TEMPLATE = """\
---
license: ofl-1.1
language:
- en
pretty_name: Emoji scenes
task_categories:
- text-to-image
size_categories:
- n>1T
annotations_creators:
- machine-generated
source_datasets:
- original
---

# Emoji scenes

<!-- Written by `python -m training.emoji_card`. Edit the program, not this file. -->

Small pictures of one or two emoji on a plain background, each with an English caption. Scene number
`index` is a pure function of `(seed, index)`: nothing is downloaded and nothing is stored but the
sprites, so the set has no end and every copy of it is the same. It trains the model that comes with
latentdiff, and it is small enough that a network can be asked to get everything right.

## The art

- **Sprites:** {sprites} glyphs of Noto Color Emoji 2.042, drawn by people at Google and published
  under the SIL Open Font License 1.1, rendered at 128 x 128 px RGBA by
  `python -m training.emoji_sprites` into one parquet file of {megabytes:.1f} MB.
- sha256 of the file: `{sha256}`
- **Groups:** {groups}.
- Names, search words and groups are Unicode's (emoji-test 15.0, CLDR 41). Flags, letters, digits,
  keycaps, other signs, skin-tone variants and joined sequences (professions, families) are left out.

## A scene

- **Concepts:** {concepts} visually distinct sprites, with {nouns} nouns: {noun_list}.
- **Backgrounds:** {backgrounds} colours: {colours}.
- **One object** in {single:.1%} of scenes, its box {single_low:.0%} to {single_high:.0%} of the
  picture's side, anywhere in the picture. **Two objects** in the others, each {pair_low:.0%} to
  {pair_high:.0%}, one in each half, left, right, above or below one another.
- **Pictures** are {resolution} x {resolution} px, 8-bit sRGB.

| relation of the first object to the second | share of all scenes |
|---|---|
{relations}

## Captions

Written by templates with varied wording: with and without articles, with and without the
background, from either object's side, with synonyms. Among the first {sample:,} there are
{distinct:,} different ones, {shortest} to {longest} words long, {median:g} at the median;
{coloured:.1%} name the background. Examples:

{examples}

## Splits

Fixed hashes of the names, independent of seed and configuration, keep some things out of training
for ever:

| held out | of | share |
|---|---|---|
| {pairs_out} pairs of objects | {pairs} | {pairs_share:.1%} |
| {colours_out} (object, background) pairs | {colour_pairs} | {colours_share:.1%} |

Scenes of the split `train` never show one of them. In the split `held_out` every pair of objects is
a held-out pair, and every single object stands on a background held out for it.

## Uses and limits

- Meant for training and testing text-to-image systems where every claim can be checked: the
  pictures are simple enough that a program can tell what they show.
- Objects never overlap, are never rotated, cropped or recoloured, and there are at most two.
- The captions have no verbs, counts, adjectives of the objects or negations.
- It says nothing about how a model does on photographs. There are no people's data in it.
"""


def describe(config: ScenesConfig) -> str:
    """The card of one configuration of the scenes."""
    sprites = load_sprites()
    scenes = EmojiScenes(config)
    sample = [scenes.scene(index) for index in range(SAMPLE)]
    captions = [scene.caption for scene in sample]
    lengths = [len(caption.split()) for caption in captions]
    named = sum(scene.background in scene.caption.split() for scene in sample)
    relations = Counter(scene.relation or "one object" for scene in sample)
    nouns = [concept.nouns[0] for concept in config.concepts]
    pairs = list(itertools.combinations(nouns, 2))
    pairs_out = sum(is_held_out_pair(*pair) for pair in pairs)
    colour_pairs = list(itertools.product(nouns, config.backgrounds))
    colours_out = sum(is_held_out_colour(*pair) for pair in colour_pairs)
    groups = Counter(sprite.group for sprite in sprites.values())
    return TEMPLATE.format(
        sprites=f"{len(sprites):,}",
        megabytes=SPRITES_FILE.stat().st_size / 1e6,
        sha256=hashlib.sha256(SPRITES_FILE.read_bytes()).hexdigest(),
        groups=", ".join(f"{name} {count}" for name, count in groups.items()),
        concepts=len(nouns),
        nouns=sum(len(concept.nouns) for concept in config.concepts),
        noun_list=", ".join(" / ".join(concept.nouns) for concept in config.concepts),
        backgrounds=len(config.backgrounds),
        colours=", ".join(config.backgrounds),
        single=relations["one object"] / SAMPLE,
        single_low=SINGLE_SIZE[0],
        single_high=SINGLE_SIZE[1],
        pair_low=PAIR_SIZE[0],
        pair_high=PAIR_SIZE[1],
        resolution=config.resolution,
        relations="\n".join(
            f"| {name} | {relations[name] / SAMPLE:.1%} |" for name in sorted(relations)
        ),
        sample=SAMPLE,
        distinct=len(set(captions)),
        shortest=min(lengths),
        longest=max(lengths),
        median=statistics.median(lengths),
        coloured=named / SAMPLE,
        examples="\n".join(f"- {caption}" for caption in captions[:10]),
        pairs_out=pairs_out,
        pairs=f"{len(pairs):,}",
        pairs_share=pairs_out / len(pairs),
        colours_out=colours_out,
        colour_pairs=len(colour_pairs),
        colours_share=colours_out / len(colour_pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data card of the emoji scenes.")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output", type=Path, default=CARD)
    options = parser.parse_args()
    options.output.write_text(describe(load_yaml(ScenesConfig, options.config)), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    run_command(main)
