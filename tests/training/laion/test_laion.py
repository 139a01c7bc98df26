"""The whole way of a small subset, from a web of emoji to a locked data set with a card.

What the server knows of its addresses, benchmarks.corpus's truth, is the oracle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.corpus import make
from benchmarks.corpus.behaviour import BEHAVIOURS, LINKS
from benchmarks.corpus.serve import served
from latentdiff.data.cache import LatentCache
from latentdiff.data.decode import decode
from latentdiff.data.images import SourceConfig, open_source
from latentdiff.errors import InputError
from training import cache_latents, clip
from training.laion import __main__ as laion
from training.laion import workers

CONFIGS = Path(__file__).parents[3] / "configs" / "laion" / "sprites"
DRAWINGS = 150
STEPS = ("select", "download", "dedup", "card", "report")


class Subset:
    """A corpus and what training.laion makes of it, below one directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.corpus = root, root / "corpus"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.server = f"127.0.0.1:{free.getsockname()[1]}"
        make.make("sprites", self.corpus, Path(), DRAWINGS, self.server)

    def step(self, name: str, directory: Path | None = None, **overrides: Any) -> None:
        made = {
            "directory": directory or self.root / "sprites",
            "select__metadata": self.corpus / "metadata" / "*.parquet",
            "download__local_hosts": f"['{self.server}']",
            "download__timeout": 5,
            "download__deadline": 8,
            "card__folder": self.root / "data_cards",
        }
        words = [name, "--config", str(CONFIGS / "laion.yaml")]
        for option, value in (made | overrides).items():
            words += ["--" + option.replace("__", "."), str(value)]
        laion.main(words)

    @property
    def lock(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(self.root / "sprites/lock.parquet").to_pylist()
        return rows


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory) -> Subset:
    """Every step taken."""
    subset = Subset(tmp_path_factory.mktemp("laion"))
    with served(subset.corpus, subset.server):
        for name in STEPS:
            subset.step(name)
    return subset


@pytest.fixture(scope="module")
def truth(subset: Subset) -> dict[tuple[str, str], dict[str, Any]]:
    """What is behind an address and caption."""
    rows = pq.read_table(subset.corpus / "truth.parquet").to_pylist()
    return {(row["url"], row["caption"]): row for row in rows}


def test_every_address_ends_under_its_own_reason(subset: Subset, truth: Any) -> None:
    seen = Counter()
    for row in subset.lock:
        known = truth[row["url"], row["caption"]]
        name = known["behaviour"]
        reasons = (BEHAVIOURS.get(name) or LINKS.get(name) or BEHAVIOURS["moved"]).reasons
        if reasons:
            assert row["status"] in reasons, (name, row["status"])
        elif known["copy"] is None:
            assert row["status"] == "kept" or row["status"].startswith("duplicate"), name
        seen[name] += 1
    missing = {*BEHAVIOURS, *LINKS} - set(seen)
    selected = {row["url"] for row in subset.lock}
    assert all(row["url"] not in selected for row in truth.values() if row["behaviour"] in missing)
    assert len(seen) > len(BEHAVIOURS) // 2


def test_what_is_kept_is_known(subset: Subset, truth: Any) -> None:
    kept = [row for row in subset.lock if row["status"] == "kept"]
    assert len(kept) > DRAWINGS // 2
    for row in kept:
        file = subset.corpus / "pictures" / truth[row["url"], row["caption"]]["file"]
        data = file.read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert (row["width"], row["height"]) == decode(data).size
        assert row["bytes"] == len(data)
        assert row["opt_out"] == "allowed"
        assert row["bucket"] == "64x64"
        assert row["split"] in ("train", "validation")
        for score in ("similarity", "punsafe", "pwatermark", "aesthetic_v2"):
            assert row[score] is not None


def test_copies_are_found(subset: Subset, truth: Any) -> None:
    """Every exact one, and of the others most: benchmarks.laion_dedup measures how many."""
    by_path = {truth[row["url"], row["caption"]]["path"]: row for row in subset.lock}
    found: dict[str, list[bool]] = {"exact": [], "near": []}
    for row in by_path.values():
        known = truth[row["url"], row["caption"]]
        other = by_path.get(known["copy_of"])
        if known["copy"] in found and other is not None and row["phash"] and other["phash"]:
            ends = {each["duplicate_of"] or each["key"] for each in (row, other)}
            found[known["copy"]].append(len(ends) == 1)
    assert all(found["exact"])
    assert len(found["exact"]) > 2
    assert sum(found["near"]) >= 0.6 * len(found["near"]) > 1
    kept = [row for row in subset.lock if row["status"] == "kept"]
    assert len({row["sha256"] for row in kept}) == len(kept)


def test_the_training_programs_read_what_is_kept(
    subset: Subset, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = subset.root / "sprites" / "lock.parquet"
    splits = Counter(row["split"] for row in subset.lock if row["status"] == "kept")
    for split, count in splits.items():
        source = open_source(SourceConfig(type="lockfile", path=lock, split=split))
        assert len(source) == count
        assert {source.caption(row) for row in range(count)} == {
            row["caption"] for row in subset.lock if row["split"] == split
        }
    words = ["--config", str(CONFIGS / "cache_latents.yaml"), "--model", str(tiny_model)]
    words += ["--run_dir", str(subset.root / "latents"), "--source.path", str(lock)]
    monkeypatch.setattr(sys, "argv", ["cache_latents", *words])
    cache_latents.main()
    assert len(LatentCache(subset.root / "latents")) == splits["train"]
    words = ["--config", str(CONFIGS / "clip.yaml"), "--run_dir", str(subset.root / "clip")]
    words += ["--pictures.source.path", str(lock), "--pictures.held_out.path", str(lock)]
    words += ["--max_steps", "2", "--checkpoint_every", "2", "--sample_every", "2"]
    monkeypatch.setattr(sys, "argv", ["clip", *words])
    clip.main()
    assert (subset.root / "clip" / "model" / "text_encoder").is_dir()


def test_again_from_nothing_it_is_the_same_lockfile(
    subset: Subset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "START", "fork")  # without img2dataset's imports
    other, metadata = subset.root / "other" / "sprites", subset.root / "other" / "metadata"
    shutil.copytree(subset.corpus / "metadata", metadata)
    with served(subset.corpus, subset.server):
        for name in ("select", "download", "dedup"):
            options = {"download__shard_size": 250, "select__metadata": metadata / "*.parquet"}
            subset.step(name, other, **options)
    assert (other / "lock.parquet").read_bytes() == (
        subset.root / "sprites" / "lock.parquet"
    ).read_bytes()


def test_steps_taken_again_change_nothing(subset: Subset) -> None:
    before = contents(subset.root / "sprites"), contents(subset.root / "data_cards")
    for name in STEPS:  # nobody serves any more
        subset.step(name)
    assert (contents(subset.root / "sprites"), contents(subset.root / "data_cards")) == before


def test_the_card_is_checked(subset: Subset, tmp_path: Path) -> None:
    subset.step("card", card__check="true")
    cards = tmp_path / "data_cards"
    shutil.copytree(subset.root / "data_cards", cards)
    text = (cards / "sprites.md").read_text()
    kept = str(sum(row["status"] == "kept" for row in subset.lock))
    assert kept in text
    (cards / "sprites.md").write_text(text.replace(kept, "7"))
    with pytest.raises(SystemExit) as end:
        subset.step("card", card__check="true", card__folder=cards)
    assert end.value.code == 1
    croissant = json.loads((cards / "sprites.croissant.json").read_text())
    assert croissant["name"] == "sprites"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("words", [[], ["train"], ["--config", "a.yaml"]])
def test_a_step_must_be_named(words: list[str]) -> None:
    with pytest.raises(InputError, match="Name a step before the options: select, download"):
        laion.main(words)


def test_help_names_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    laion.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"training.laion {name}" in printed for name in STEPS)


def test_corpora_are_functions_of_their_arguments(subset: Subset, tmp_path: Path) -> None:
    make.make("sprites", tmp_path / "again", Path(), DRAWINGS, subset.server)
    assert contents(tmp_path / "again") == contents(subset.corpus)
    rows = pq.read_table(subset.corpus / "truth.parquet")
    assert {*BEHAVIOURS, *LINKS, "picture"} == set(rows["behaviour"].to_pylist())
    scores = pq.read_table(subset.corpus / "metadata")
    assert np.mean(scores["similarity"].drop_null()) == pytest.approx(0.33, abs=0.02)
