"""A small web of pictures to select and download, with metadata as LAION-Aesthetics v2 has it.

    python -m benchmarks.corpus.make --corpus sprites --output runs/sprites/corpus
    python -m benchmarks.corpus.serve --output runs/sprites/corpus

Writes metadata/*.parquet for training.laion, pictures/, and truth.parquet: what becomes of each
address and which pictures are copies of which, for the server and for tests. All of it is a
function of the arguments. Scores are made up, a function of the address.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from benchmarks.corpus.behaviour import BEHAVIOURS, LINKS
from benchmarks.corpus.drawings import openclipart, sprites
from benchmarks.corpus.pictures import again, encode, place
from latentdiff.errors import InputError, run_command
from latentdiff.model_files import staged_file

SERVER = "127.0.0.1:8793"
"""Where it is served by default: host:port."""
SIDE = 480
"""Pixels of the longer side that vector drawings are drawn at; then made smaller."""
COPIES = {"exact": 0.03, "near": 0.03, "row": 0.01}
"""Shares of addresses that are added: the same file, the same picture in another file, and the
same address and caption once more."""
ROWS = 4096
"""In one file of metadata."""
TRUTH = pa.schema(
    [
        ("path", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("behaviour", pa.string()),
        ("copy", pa.string()),
        ("copy_of", pa.string()),
        ("file", pa.string()),
    ]
)


class Row(NamedTuple):
    """One line of the metadata, and what is behind it."""

    path: str
    """Of the address on the server, and "" for another server's."""
    url: str
    caption: str
    behaviour: str
    """A name of BEHAVIOURS or LINKS."""
    copy: str | None
    """How it is a copy: a name of COPIES."""
    copy_of: str | None
    """The path that it copies."""
    file: str
    """In pictures/."""
    width: int
    height: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", choices=("sprites", "openclipart"), default="sprites")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--svg", type=Path, default=Path("/usr/share/openclipart/svg"))
    parser.add_argument("--count", type=int, help="of the drawings, from the first")
    parser.add_argument("--server", default=SERVER, help="host:port that will serve it")
    options = parser.parse_args()
    if (options.output / "truth.parquet").is_file():
        print(f"{options.output} is there already.")
        return
    make(options.corpus, options.output, options.svg, options.count, options.server)


def make(corpus: str, output: Path, svg: Path, count: int | None, server: str) -> list[Row]:
    """Write it all; truth.parquet last."""
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    rows = copied(pages(corpus, output, svg, count), output)
    if not rows:
        raise InputError("None of the drawings can be drawn.")
    rows = [*behaved(rows), *links(rows)]
    rows.sort(key=lambda row: digest("order", row.url))
    metadata = [described(row) | {"URL": moved(row.url, server)} for row in rows]
    rows = [row._replace(url=moved(row.url, server)) for row in rows]
    (output / "metadata").mkdir(exist_ok=True)
    for first in range(0, len(rows), ROWS):
        with staged_file(output / "metadata" / f"part-{first // ROWS:05d}.parquet") as path:
            pq.write_table(pa.Table.from_pylist(metadata[first : first + ROWS]), path)
    truth = [{name: getattr(row, name) for name in TRUTH.names} for row in rows]
    with staged_file(output / "truth.parquet") as path:
        pq.write_table(pa.Table.from_pylist(truth, TRUTH), path)
    print(f"{len(rows)} addresses, {len({row.file for row in rows})} pictures: {output}")
    return rows


def pages(corpus: str, output: Path, svg: Path, count: int | None) -> list[Row]:
    """A picture and an address for each drawing."""
    drawings = sprites(count) if corpus == "sprites" else openclipart(svg, SIDE, count)
    rows = []
    for number, drawing in enumerate(tqdm(drawings, unit="drawings")):
        rng = Random(f"picture|{drawing.name}")
        picture = place(drawing.picture, rng)
        data, suffix = encode(picture, rng)
        file = f"{number:05d}.{suffix}"
        (output / "pictures" / file).write_bytes(data)
        path, caption = f"/pictures/{file}", drawing.caption
        url = f"http://{SERVER}{path}"
        rows.append(Row(path, url, caption, "picture", None, None, file, *picture.size))
    return rows


def copied(rows: list[Row], output: Path) -> list[Row]:
    """The same with copies of some under new addresses, and some rows twice."""
    result = list(rows)
    for copy, share in COPIES.items():
        for row in chosen(rows, round(share * len(rows)), f"copies {copy}"):
            if copy == "row":
                result.append(row)
                continue
            path = f"/{copy}{row.path}"
            new = row._replace(path=path, url=f"http://{SERVER}{path}", copy=copy, copy_of=row.path)
            new = new._replace(caption=row.caption.partition(",")[0])
            if copy == "near":
                data, suffix = again((output / "pictures" / row.file).read_bytes(), Random(path))
                new = new._replace(file=f"near-{Path(path).stem}.{suffix}")
                (output / "pictures" / new.file).write_bytes(data)
            result.append(new)
    return result


def behaved(rows: list[Row]) -> list[Row]:
    """The same; some addresses answer as addresses on the web do. What has copies, and they, do
    not, so that it is known which copies are there to be found.
    """
    spared = {row.path for row in rows if row.copy} | {row.copy_of for row in rows}
    seen: set[str] = set()
    free = []
    for row in rows:
        if row.path not in spared and row.path not in seen:
            free.append(row)
        seen.add(row.path)
    kinds: dict[str, str] = {}
    for name, behaviour in BEHAVIOURS.items():
        left = [row for row in free if row.path not in kinds]
        number = max(1, round(behaviour.share * len(rows)))
        kinds |= {row.path: name for row in chosen(left, number, name)}
    return [row._replace(behaviour=kinds.get(row.path, "picture")) for row in rows]


def links(rows: list[Row]) -> list[Row]:
    """One row for each address that nobody may follow."""
    path, port = rows[0].path, SERVER.rpartition(":")[2]
    return [
        Row("", link.url.format(port=port, path=path), name, name, None, None, "", 512, 512)
        for name, link in LINKS.items()
    ]


def moved(url: str, server: str) -> str:
    """An address of SERVER or its port where it is served; order and scores stay as they are."""
    old, new = (f":{each.rpartition(':')[2]}" for each in (SERVER, server))
    return url.replace(SERVER, server) if SERVER in url else url.replace(old, new)


def described(row: Row) -> dict[str, Any]:
    """A row of metadata. Sizes are what somebody saw once, scores made up, some of each missing."""
    rng = Random(f"scores|{row.url}|{row.caption}")
    known: dict[str, Any] = {
        "similarity": round(min(0.5, rng.gauss(0.33, 0.025)), 6),
        "punsafe": round(rng.betavariate(0.25, 12), 6),
        "pwatermark": round(rng.betavariate(0.5, 6), 6),
        "AESTHETIC_SCORE": round(rng.gauss(5.4, 0.4), 6),
        "LANGUAGE": "en" if rng.random() < 0.98 else "it",
    }
    scores = {name: value if rng.random() > 0.002 else None for name, value in known.items()}
    scale = 1.0 if rng.random() < 0.97 else 0.5
    return {
        "URL": row.url,
        "TEXT": row.caption,
        "WIDTH": float(round(row.width * scale)),
        "HEIGHT": float(round(row.height * scale)),
        **scores,
        "hash": int(digest("hash", row.url + row.caption)[:16], 16) - (1 << 63),
    }


def chosen(rows: list[Row], number: int, name: str) -> list[Row]:
    """So many of the rows, by hash, in their order."""
    keys = {row.path: digest(name, row.path) for row in rows}
    taken = set(sorted(keys.values())[: max(number, 1)])
    return [row for row in rows if keys[row.path] in taken]


def digest(name: str, text: str) -> str:
    return hashlib.sha256(f"{name}|{text}".encode()).hexdigest()


if __name__ == "__main__":
    run_command(main)
