"""How many planted duplicates dedup finds, and how many different pictures it takes for one.

    python -m benchmarks.laion_dedup [--pictures FOLDER] [--count 2000] [--processes 2]

Takes pictures that differ, the emoji sprites that come with latentdiff or a folder of drawings,
plants disguised copies of each third one, gives them to the step dedup as if they had been
downloaded, and prints two tables: how many copies of each disguise are found (recall), and how many
pictures are taken for a copy of one that they are no copy of (false matches; in a folder of other
people's drawings some of those are copies that nobody has planted), for each picture that differs.
It also counts copies on the other side of the split, which must be none. Exits with status 1 where
fewer than 95% of the copies are found, there is more than one false match for 100 pictures, or a
copy is on the other side.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from latentdiff.data.decode import UnreadableImage, decode
from latentdiff.data.lockfile import DUPLICATES, LOCKFILE, read_rows
from latentdiff.data.sprites import load_sprites
from latentdiff.errors import run_command
from latentdiff.model_files import write_json
from training.laion.dedup import DedupConfig, dedup

SHARD = 1000
SHARD_DIGITS = 5
SIZES = ((256, 256), (320, 240), (240, 320), (512, 384))
Disguise = Callable[[Image.Image, np.random.Generator], Image.Image]
TABLE = pa.schema(
    [
        ("sample_id", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("meta_width", pa.int32()),
        ("meta_height", pa.int32()),
        ("similarity", pa.float32()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("sha256", pa.string()),
        ("opt_out", pa.string()),
        ("http_status", pa.int32()),
        ("bytes", pa.int64()),
        ("format", pa.string()),
    ]
)
"""Of the columns that the step download writes, those that dedup and report read."""


def resized(image: Image.Image, random: np.random.Generator) -> Image.Image:
    factor = 2 ** random.uniform(-1, 1)
    size = [max(16, round(side * factor)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """2 to 4% of width and height, anywhere."""
    share = random.uniform(0.02, 0.04)
    box = []
    for side, at in zip(image.size, random.uniform(size=2), strict=True):
        box.append((round(share * side * at), side - round(share * side * (1 - at))))
    return image.crop((box[0][0], box[1][0], box[0][1], box[1][1]))


def brightened(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(random.uniform(0.9, 1.1))


def contrasted(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(random.uniform(0.9, 1.1))


def grey(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return image.convert("L").convert("RGB")


def watermarked(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A half transparent name in the lower right corner."""
    layer = Image.new("RGBA", image.size)
    ImageDraw.Draw(layer).text(
        (image.width * 0.97, image.height * 0.97),
        "example.org",
        fill=(128, 128, 128, 128),
        anchor="rs",
        font_size=max(9, image.height // 14),
    )
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def bordered(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """1 to 4% of the shorter side, in black, white or grey."""
    width = max(2, round(min(image.size) * random.uniform(0.01, 0.04)))
    return ImageOps.expand(image, width, ("black", "white", "grey")[int(random.integers(3))])


def unchanged(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return image


DISGUISES: dict[str, Disguise] = {
    "JPEG, quality 60 to 90": unchanged,
    "resized, 0.5 to 2 times": resized,
    "cropped by 2 to 4%": cropped,
    "brightness ±10%": brightened,
    "contrast ±10%": contrasted,
    "greyscale": grey,
    "watermark": watermarked,
    "border of 1 to 4%": bordered,
}
"""Each is saved as a JPEG of quality 60 to 90 besides."""


def jpeg(image: Image.Image, quality: int) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def sprites() -> Iterator[Image.Image]:
    """Every emoji on white, in pictures of several shapes."""
    for number, sprite in enumerate(load_sprites().values()):
        width, height = SIZES[number % len(SIZES)]
        side = round(0.8 * min(width, height))
        picture = Image.new("RGB", (width, height), "white")
        drawn = sprite.image.resize((side, side), Image.Resampling.LANCZOS)
        picture.paste(drawn, ((width - side) // 2, (height - side) // 2), drawn)
        yield picture


def drawings(folder: Path) -> Iterator[Image.Image]:
    """The readable pictures of a folder, by name, no two of the same bytes."""
    seen = set()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            data = path.read_bytes()
            if hashlib.sha256(data).digest() not in seen:
                seen.add(hashlib.sha256(data).digest())
                with contextlib.suppress(UnreadableImage):
                    yield decode(data)


def lay_out(directory: Path, samples: Iterable[tuple[bytes | None, dict[str, Any]]]) -> int:
    """Write selected/ and images/ as the steps before dedup do, and return the number of samples.

    samples: a picture's file and other values of its row; without a file error_message says why.
    """
    images = directory / "images"
    images.mkdir(parents=True)
    shards: list[list[dict[str, Any]]] = []
    tar: tarfile.TarFile | None = None
    digits = math.ceil(math.log10(SHARD))
    for data, values in samples:
        if not shards or len(shards[-1]) == SHARD:
            if tar is not None:
                tar.close()
            tar = tarfile.open(images / f"{len(shards):0{SHARD_DIGITS}d}.tar", "w")  # noqa: SIM115
            shards.append([])
        number = (len(shards) - 1) * SHARD + len(shards[-1])
        row: dict[str, Any] = {
            "key": f"{(len(shards) - 1) * 10**digits + len(shards[-1]):0{SHARD_DIGITS + digits}d}",
            "sample_id": f"{number:016x}",
            "url": f"https://example.org/{number}.jpg",
            "caption": f"picture {number}",
            "status": "failed_to_download",
        }
        if data is not None:
            assert tar is not None
            member = tarfile.TarInfo(f"{row['key']}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            row |= {
                "status": "success",
                "sha256": hashlib.sha256(data).hexdigest(),
                "opt_out": "allowed",
                "http_status": 200,
                "bytes": len(data),
                "format": "JPEG",
            }
        shards[-1].append(row | values)
    if tar is not None:
        tar.close()
    for number, rows in enumerate(shards):
        stem = f"{number:0{SHARD_DIGITS}d}"
        filled = [dict.fromkeys(TABLE.names) | row for row in rows]
        pq.write_table(pa.Table.from_pylist(filled, TABLE), images / f"{stem}.parquet")
        (images / f"{stem}_stats.json").write_text(json.dumps({"count": len(rows)}))
    (directory / "selected").mkdir()
    count = sum(map(len, shards))
    write_json({"rows": count, "parts": []}, directory / "selected" / "manifest.json")
    return count


def planted(
    pictures: Iterable[Image.Image], truth: list[tuple[int, str]]
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every picture, and every third one once more in one disguise after the other.

    truth: gets (number of the picture, name of the disguise) for each of them.
    """
    for number, picture in enumerate(pictures):
        truth.append((number, ""))
        yield jpeg(picture, 92), {}
        if number % 3 == 0:
            random = np.random.default_rng(number)
            for name, disguise in DISGUISES.items():
                truth.append((number, name))
                yield jpeg(disguise(picture, random), int(random.integers(60, 91))), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=Path, help="a folder; the emoji sprites by default")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    made = drawings(options.pictures) if options.pictures else sprites()
    truth: list[tuple[int, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        chosen = (picture for _, picture in zip(range(options.count), made, strict=False))
        count = lay_out(directory, planted(chosen, truth))
        config = DedupConfig(processes=options.processes, validation_share=0.2)
        started = time.perf_counter()
        dedup(config, "benchmark", directory)
        seconds = time.perf_counter() - started
        rows = read_rows(directory / LOCKFILE).to_pylist()
    text, good = table(rows, truth)
    print(text)
    print(f"\n{count:,} pictures in {seconds:.1f} s, {options.processes} processes")
    if not good:
        raise SystemExit(1)


RECALL, FALSE = 0.95, 0.01
"""At least, of the copies; at most, of the pictures that differ."""


def table(rows: list[dict[str, Any]], truth: list[tuple[int, str]]) -> tuple[str, bool]:
    """Recall by disguise, false matches, and copies across the split, in Markdown, and whether they
    are good enough.

    A copy is found when one picture at most stays of it and its original: that is, when the two end
    at the same picture, be it either of them or another.
    """
    place = {row["key"]: number for number, row in enumerate(rows)}
    ends = [place[row["duplicate_of"] or row["key"]] for row in rows]
    original = {number: index for index, (number, name) in enumerate(truth) if not name}
    found: dict[str, list[bool]] = {name: [] for name in DISGUISES}
    for index, (number, name) in enumerate(truth):
        if name:
            found[name].append(ends[index] == ends[original[number]])
    false = sum(
        truth[ends[index]][0] != number
        for index, (number, _) in enumerate(truth)
        if rows[index]["status"] in DUPLICATES
    )
    splits: dict[int, set[str]] = {}
    for (number, _), row in zip(truth, rows, strict=True):
        if row["split"]:
            splits.setdefault(number, set()).add(row["split"])
    crossing = sum(len(each) > 1 for each in splits.values())
    every = [each for values in found.values() for each in values]
    lines = ["| disguise | copies | found |", "|---|---|---|"]
    for name, values in {**found, "all": every}.items():
        lines.append(f"| {name} | {len(values):,} | {np.mean(values):.1%} |")
    lines += [
        "",
        f"false matches: {false:,} for {len(original):,} pictures ({false / len(original):.2%})",
        f"pictures on both sides of the split: {crossing}",
    ]
    good = bool(np.mean(every) >= RECALL) and false <= FALSE * len(original) and not crossing
    return "\n".join(lines), good


if __name__ == "__main__":
    run_command(main)
