"""Write the data card of the emoji scenes; every number in it is computed.

python -m training.emoji_card
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff.config import load_yaml
from latentdiff.data.scenes import (
    HELD_OUT_COLOURS,
    HELD_OUT_PAIRS,
    EmojiScenes,
    Scene,
    ScenesConfig,
    is_held_out_colour,
    is_held_out_pair,
)
from latentdiff.data.sprites import SIDE, SPRITES_FILE, load_sprites
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

```python
from latentdiff.config import load_yaml
from latentdiff.data.scenes import EmojiScenes, ScenesConfig

scenes = EmojiScenes(load_yaml(ScenesConfig, "configs/emoji/scenes.yaml"), split="train")
scenes[0]  # {{"image": uint8 array [{resolution}, {resolution}, 3], "caption": "{first}"}}
```

## The art

- **Sprites:** {sprites} glyphs of Noto Color Emoji 2.042, drawn by people at Google, rendered at
  {side} x {side} px RGBA by `python -m training.emoji_sprites` into one parquet file of
  {megabytes:.1f} MB, `latentdiff/data/sprites.parquet`.
- **Licence:** the SIL Open Font License 1.1. Its text lies beside the sprites, in `OFL.txt`.
- **sha256 of the file:** `{sha256}`
- **Groups:** {groups}.
- Names, search words and groups are Unicode's (emoji-test 15.0, CLDR 41). Flags, letters, digits,
  keycaps, other signs, skin-tone variants and joined sequences (professions, families) are left
  out.

## A scene

- **Concepts:** {concepts} visually distinct sprites, with {nouns} nouns: {noun_list}.
- **Backgrounds:** {backgrounds} colours: {colours}.
- **Pictures** are {resolution} x {resolution} px, 8-bit sRGB.
- **Objects** stand in square boxes whose corners are at multiples of {grid} px. One object has
  a box of {sizes} px, whose middle is {alone}; of
  two, each has a half of the picture for itself, so they never overlap, and a box of
  {pair_sizes} px.

Among the first {sample:,} scenes of the split `train`:

| the first object is | scenes | median size | sizes |
|---|---|---|---|
{layouts}

Sizes are sides of the boxes in pixels. Every concept is in {rarest:,} to {commonest:,} of these
scenes, and every background in {rarest_colour:,} to {commonest_colour:,}.

## Captions

Written by templates with varied wording: with and without articles, with and without the
background, from either object's side ({reading_order:.0%} from that of the left or the upper
one), with synonyms. Those {sample:,} scenes have {distinct:,} different captions, {median:g} words
long at the median; {coloured:.1%} name the background.

| words | captions |
|---|---|
{lengths}

The first ten:

{examples}

## Splits

What is held out never trains a model. It is decided by hashes of the names, which depend neither on
the seed nor on what else is in the configuration: BLAKE2b-64 of `pair|a|b` (the two canonical nouns
in alphabetical order) below {pair_threshold:.0%} of its range holds out a pair of objects, and of
`colour|noun|background` below {colour_threshold:.0%} an object on a background.

| held out | of | share |
|---|---|---|
| {pairs_out} pairs of objects | {pairs} | {pairs_share:.1%} |
| {colours_out} objects on a background | {colour_pairs} | {colours_share:.1%} |

Scenes of the split `train` show none of them: {leaks} of the {sample:,} do. In the split `held_out`
every pair of objects is a held-out pair, and every single object stands on a background held out
for it: {held} of its first {sample:,} scenes are so.

## Uses and limits

- Meant for training and testing text-to-image systems where every claim can be checked: the
  pictures are simple enough that a program can tell what they show.
- Objects never overlap, are never rotated, cropped or recoloured, and there are at most two. Each
  concept has one drawing: a model can learn it by heart.
- Backgrounds are plain. Captions have no verbs, counts or negations, and no adjectives but in names
  such as "red apple".
- It says nothing about how a model does on photographs. It holds no personal data.
"""


def describe(config: ScenesConfig) -> str:
    """The card of one configuration of the scenes."""
    train, held_out = EmojiScenes(config), EmojiScenes(config, split="held_out")
    sample = [train.scene(index) for index in range(SAMPLE)]
    return TEMPLATE.format(
        **_about_sprites(),
        **_about_scenes(sample),
        **_about_captions(sample),
        **_about_splits(config),
        grid=config.grid,
        reading_order=config.reading_order,
        sizes=_alternatives(config.sizes),
        pair_sizes=_alternatives(config.pair_sizes),
        alone=_alone(train),
        concepts=len(config.concepts),
        nouns=sum(len(concept.nouns) for concept in config.concepts),
        noun_list=", ".join(" / ".join(concept.nouns) for concept in config.concepts),
        backgrounds=len(config.backgrounds),
        colours=", ".join(config.backgrounds),
        resolution=config.resolution,
        sample=SAMPLE,
        leaks=sum(any(_held_out(scene)) for scene in sample),
        held=f"{sum(_held_out(held_out.scene(index))[0] for index in range(SAMPLE)):,}",
    )


def _alternatives(sizes: tuple[int, ...]) -> str:
    return " or ".join(map(str, sizes))


def _alone(scenes: EmojiScenes) -> str:
    config = scenes.config
    if config.spread == 0.5:
        return "anywhere"
    off = [
        abs(place + (size - config.resolution) / 2)
        for size in config.sizes
        for place in scenes.middle(size, config.spread)
    ]
    return f"at most {max(off):g} px from the picture's, each way"


def _about_sprites() -> dict[str, Any]:
    sprites = load_sprites()
    groups = Counter(sprite.group for sprite in sprites.values())
    return {
        "sprites": f"{len(sprites):,}",
        "side": SIDE,
        "megabytes": SPRITES_FILE.stat().st_size / 1e6,
        "sha256": hashlib.sha256(SPRITES_FILE.read_bytes()).hexdigest(),
        "groups": ", ".join(f"{name} {count}" for name, count in groups.items()),
    }


def _about_scenes(sample: Sequence[Scene]) -> dict[str, Any]:
    names = {"left": "left of the second", "right": "right of the second"}
    names |= {"above": "above the second", "below": "below the second"}
    sizes: dict[str, list[int]] = {name: [] for name in ("alone", *names.values())}
    counts: Counter[str] = Counter()
    for scene in sample:
        layout = names[scene.relation] if scene.relation else "alone"
        sizes[layout] += [placed.size for placed in scene.objects]
        counts[layout] += 1
    seen = Counter(placed.concept for scene in sample for placed in scene.objects)
    colours = Counter(scene.background for scene in sample)
    return {
        "layouts": "\n".join(
            f"| {name} | {counts[name] / len(sample):.1%} | {statistics.median(sizes[name]):g} "
            f"| {min(sizes[name])} to {max(sizes[name])} |"
            for name in sizes
        ),
        "rarest": min(seen.values()),
        "commonest": max(seen.values()),
        "rarest_colour": min(colours.values()),
        "commonest_colour": max(colours.values()),
    }


def _about_captions(sample: Sequence[Scene]) -> dict[str, Any]:
    captions = [scene.caption for scene in sample]
    lengths = [len(caption.split()) for caption in captions]
    labels = ("1 to 4", "5 to 8", "9 to 12", "13 to 16", f"17 to {max(lengths)}")
    bins = Counter(labels[min((length - 1) // 4, 4)] for length in lengths)
    return {
        "first": captions[0],
        "distinct": len(set(captions)),
        "median": statistics.median(lengths),
        "lengths": "\n".join(f"| {label} | {bins[label] / len(sample):.1%} |" for label in labels),
        "coloured": sum(map(_names_background, sample)) / len(sample),
        "examples": "\n".join(f"- {caption}" for caption in captions[:10]),
    }


def _about_splits(config: ScenesConfig) -> dict[str, Any]:
    nouns = [concept.nouns[0] for concept in config.concepts]
    pairs = [is_held_out_pair(*pair) for pair in itertools.combinations(nouns, 2)]
    colours = [is_held_out_colour(*pair) for pair in itertools.product(nouns, config.backgrounds)]
    return {
        "pair_threshold": HELD_OUT_PAIRS,
        "colour_threshold": HELD_OUT_COLOURS,
        "pairs_out": sum(pairs),
        "pairs": f"{len(pairs):,}",
        "pairs_share": statistics.fmean(pairs),
        "colours_out": sum(colours),
        "colour_pairs": len(colours),
        "colours_share": statistics.fmean(colours),
    }


def _names_background(scene: Scene) -> bool:
    return f"{scene.background} background" in scene.caption or scene.caption.endswith(
        f" on {scene.background}"
    )


def _held_out(scene: Scene) -> tuple[bool, bool]:
    """Whether it belongs to the split `held_out`, and whether it shows a held-out colour."""
    nouns = [placed.concept for placed in scene.objects]
    colour = any(is_held_out_colour(noun, scene.background) for noun in nouns)
    return (is_held_out_pair(nouns[0], nouns[1]) if len(nouns) == 2 else colour), colour


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data card of the emoji scenes.")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output", type=Path, default=CARD)
    options = parser.parse_args()
    options.output.write_text(describe(load_yaml(ScenesConfig, options.config)), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    run_command(main)
