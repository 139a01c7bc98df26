"""Takedown: what is listed is out from the next epoch on, in every process and for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.laion_dedup import jpeg, lay_out
from latentdiff.checkpoint import ModelParts
from latentdiff.data.buckets import SizesConfig
from latentdiff.data.images import SourceConfig
from latentdiff.data.lockfile import read_rows
from latentdiff.data.order import Plan, Share
from latentdiff.errors import InputError
from tests.training.laion.lock_of import lock, row
from training.data import StepOrder, planned_orders
from training.laion.dedup import DedupConfig, dedup
from training.laion.lists import read_takedown
from training.latents import LiveConfig, LiveLatents
from training.takedown import Removal, TakedownConfig, _digests, first_decides, listed_samples

COUNTS = (13, 3, 21)
PLAN = Plan(5, COUNTS, batch_size=4)
STEPS = PLAN.steps_per_epoch
LISTED = [0, 7, 12, 16, 30]
NOWHERE = Path("no", "such", "takedown.json")


def orders(steps: range, share: Share = Share()) -> list[StepOrder]:  # noqa: B008
    return list(planned_orders(steps, PLAN, share))


def bucket(sample: int) -> int:
    return int(np.searchsorted(PLAN.offsets, sample, side="right")) - 1


def replaced(removal: Removal, found: list[StepOrder]) -> list[StepOrder]:
    """What is read for orders."""
    return [
        StepOrder(epoch, [[removal.instead(epoch, each) for each in batch] for batch in batches])
        for epoch, batches in found
    ]


def read(found: list[StepOrder]) -> list[int]:
    return [sample for _, batches in found for batch in batches for sample in batch]


# Samples


@settings(max_examples=50, deadline=None)
@given(listed=st.sets(st.integers(0, sum(COUNTS) - 1), max_size=9), step=st.integers(0, 3 * STEPS))
def test_what_is_listed_is_out_from_the_next_epoch_on(listed: set[int], step: int) -> None:
    if {13, 14, 15} <= listed or set(range(13)) <= listed:
        return
    removal = Removal(PLAN, "digest", NOWHERE, listed)
    removal.begin(step)
    steps = range(step, step + 2 * STEPS)
    planned = orders(steps)
    first = -(-step // STEPS)
    for before, after in zip(planned, replaced(removal, planned), strict=True):
        assert after.epoch == before.epoch
        for old, new in zip(read([before]), read([after]), strict=True):
            out = old in listed and before.epoch >= first
            assert (new != old) == out
            assert bucket(new) == bucket(old)
            assert not out or new not in listed


def test_two_processes_are_one_run() -> None:
    removal = Removal(PLAN, "digest", NOWHERE, LISTED)
    removal.begin(0)
    steps = range(3 * STEPS)
    whole = replaced(removal, orders(steps))
    assert not set(read(whole)) & set(LISTED)
    halves = [replaced(removal, orders(steps, Share(rank, 2, 1))) for rank in range(2)]
    for step, order in enumerate(whole):
        (samples,) = order.micro_batches
        for rank in range(2):
            assert halves[rank][step].micro_batches == [[each] for each in samples[rank::2]]


def test_without_a_list_nothing_changes(tmp_path: Path) -> None:
    removal = Removal(PLAN, "digest", tmp_path / "takedown.json")
    removal.begin(3, write=True)
    assert replaced(removal, orders(range(20))) == orders(range(20))
    assert list(tmp_path.iterdir()) == []


# The record


def resumed(run_dir: Path, listed: list[int], step: int) -> list[StepOrder]:
    """What the steps of three epochs take, where the run goes on at `step`."""
    removal = Removal(PLAN, "digest", run_dir / "takedown.json", listed)
    removal.begin(step, write=True)
    return replaced(removal, orders(range(3 * STEPS)))


def test_a_resumed_run_replaces_the_same(tmp_path: Path) -> None:
    first = resumed(tmp_path, LISTED[:2], 0)
    assert not set(read(first)) & set(LISTED[:2])
    more = resumed(tmp_path, LISTED, STEPS + 1)
    assert more[: 2 * STEPS] == first[: 2 * STEPS]
    assert set(read(more[: 2 * STEPS])) & set(LISTED[2:])
    assert not set(read(more[2 * STEPS :])) & set(LISTED)
    for listed, step in ((LISTED, 0), (LISTED, 2 * STEPS + 1), ([], 1)):
        assert resumed(tmp_path, listed, step) == more


def test_how_many_are_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for listed, told in (
        (LISTED[:2], "2 samples are out from epoch 0 on;"),
        (LISTED, "3 samples are out from epoch 1 on, 2 are out since earlier;"),
        (LISTED, "takedown: 5 are out since earlier;"),
        ([], "the lists name none of this run's samples."),
    ):
        resumed(tmp_path, listed, 1 if len(listed) > 2 else 0)
        assert told in capsys.readouterr().out


def test_the_first_process_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def share(values: list[Any], src: int) -> None:
        assert src == 0
        if values[0] is None:
            values[0] = sent[-1]
        else:
            sent.append(values[0])

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast_object_list", share)
    monkeypatch.setenv("RANK", "0")
    first = first_decides(lambda: Removal(PLAN, "digest", NOWHERE, LISTED))
    monkeypatch.setenv("RANK", "1")
    assert first_decides(lambda: Removal(PLAN, "digest", NOWHERE, [1])) is first
    monkeypatch.setenv("RANK", "0")
    for _ in range(2):
        with pytest.raises(InputError, match="All 13"):
            first_decides(lambda: Removal(PLAN, "digest", NOWHERE, range(13)))
        monkeypatch.setenv("RANK", "1")


def test_the_record_is_of_its_data(tmp_path: Path) -> None:
    resumed(tmp_path, LISTED, 0)
    with pytest.raises(InputError, match="other data"):
        Removal(PLAN, "another", tmp_path / "takedown.json")
    (tmp_path / "takedown.json").write_text('{"latents": "digest"}')
    with pytest.raises(InputError, match="damaged"):
        Removal(PLAN, "digest", tmp_path / "takedown.json")


def test_a_bucket_of_which_nothing_is_left_is_refused() -> None:
    Removal(PLAN, "digest", NOWHERE, [13, 14, 15])  # a bucket that fills no batch
    with pytest.raises(InputError, match="All 13 samples"):
        Removal(PLAN, "digest", NOWHERE, range(13))


# Lists


@pytest.fixture(scope="module")
def lockfile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve different pictures."""
    directory = tmp_path_factory.mktemp("locked")
    random = np.random.default_rng(0)
    small = (random.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(12))
    pictures = [Image.fromarray(each).resize((64, 64), Image.Resampling.BOX) for each in small]
    lay_out(directory, [(jpeg(picture, 95), {}) for picture in pictures])
    dedup(DedupConfig(validation_share=0), "noise", directory)
    assert set(read_rows(directory / "lock.parquet")["status"].to_pylist()) == {"kept"}
    return directory / "lock.parquet"


def a_list(folder: Path, lockfile: Path, name: str, numbers: list[int]) -> TakedownConfig:
    values = read_rows(lockfile)[name].to_pylist()
    (folder / "list.txt").write_text("\n".join(values[number] for number in numbers))
    return TakedownConfig(lists=(folder / "list.txt",), lockfile=lockfile)


@pytest.mark.parametrize("name", ["key", "sample_id", "sha256", "url"])
def test_live_pictures_are_found_by_any_name(
    lockfile: Path, tiny_parts: ModelParts, tmp_path: Path, name: str
) -> None:
    config = LiveConfig(
        source=SourceConfig(type="lockfile", path=lockfile), sizes=SizesConfig(resolution=64)
    )
    latents = LiveLatents(config, tiny_parts, 0, tmp_path / "scan")
    takedown = a_list(tmp_path, lockfile, name, [2, 5]).model_copy(update={"lockfile": None})
    assert listed_samples(takedown, latents) == [2, 5]
    assert listed_samples(None, latents) is None


def test_a_duplicate_takes_down_what_is_there_in_its_place(tmp_path: Path) -> None:
    content = [
        row(0, url="https://kept.example/0.jpg"),
        row(1, "duplicate: near", sha256="1" * 64, url="https://gone.example/1.jpg"),
        row(2),
    ]
    directory = lock(tmp_path, content)
    (tmp_path / "list.txt").write_text("gone.example\n")
    found = _digests(read_takedown((tmp_path / "list.txt",)), directory / "lock.parquet")
    assert found == {content[0]["sha256"], "1" * 64}


def test_what_is_read_in_anothers_place_has_its_noise(
    lockfile: Path, tiny_parts: ModelParts, tmp_path: Path
) -> None:
    config = LiveConfig(
        source=SourceConfig(type="lockfile", path=lockfile), sizes=SizesConfig(resolution=64)
    )
    latents = LiveLatents(config, tiny_parts, 0, tmp_path / "scan")
    plain = next(latents.batches([StepOrder(0, [[3, 4]])]))[0]
    latents.removal = Removal(Plan(0, latents.counts, 4), latents.digest, NOWHERE, [3])
    latents.removal.begin(0)
    other = latents.removal.instead(0, 3)
    (batch,) = next(latents.batches([StepOrder(0, [[3, other]])]))
    assert batch.samples == [3, other]
    assert batch.images is not None
    torch.testing.assert_close(batch.images[0], batch.images[1])
    noise = batch.draw("noise", (2,))
    torch.testing.assert_close(noise[0], plain.draw("noise", (2,))[0])
    assert (noise[0] != noise[1]).all()


def test_an_unreadable_sample_is_not_replaced_by_one_that_is_out(
    lockfile: Path, tiny_parts: ModelParts, tmp_path: Path
) -> None:
    config = LiveConfig(
        source=SourceConfig(type="lockfile", path=lockfile), sizes=SizesConfig(resolution=64)
    )
    latents = LiveLatents(config, tiny_parts, 0, tmp_path / "scan")
    plan = Plan(0, latents.counts, 4)
    latents.removal = Removal(plan, latents.digest, NOWHERE, range(2, 12))
    latents.removal.begin(0)
    assert latents.substitute(0, 0, 0) == 1
    with pytest.raises(InputError, match="can be read"):
        latents.substitute(0, 0, 1)


def test_a_run_from_a_cache_reads_nothing_that_is_out(
    tiny_chain: Any, lockfile: Path, tmp_path: Path
) -> None:
    """By the whole program, whose batches are what it learns from."""
    cache = tmp_path / "cache"
    source = {"source__type": "lockfile", "source__path": lockfile, "source__count": 12}
    tiny_chain.run("cache_latents", run_dir=cache, source__split="train", **source)
    takedown = a_list(tmp_path, lockfile, "url", [1, 8])
    options = {"cache": cache, "run_dir": tmp_path / "run", "batch_size": 4}
    options["validation_cache"] = cache

    def samples(**more: Any) -> list[list[int]]:
        program = tiny_chain.program("diffusion", **options, **more)
        numbers: list[list[int]] = []
        read = program.latents.cache.read

        def noted(samples: list[int], *rest: Any) -> Any:
            numbers.append(list(samples))
            return read(samples, *rest)

        program.latents.cache.read = noted
        batches = program.batches(range(9), Share())
        keyed = [batch.samples for step in batches for batch in step]
        batches.close()
        assert not planned or keyed == planned
        planned[:] = keyed
        return numbers[: len(keyed)]

    planned: list[list[int]] = []
    plain = samples()
    assert {each for batch in plain for each in batch} == set(range(12))
    listed = {"takedown__lists": f"[{takedown.lists[0]}]", "takedown__lockfile": lockfile}
    found = samples(**listed)
    assert {each for batch in found for each in batch} == set(range(12)) - {1, 8}
    kept = [[each for each in batch if each not in (1, 8)] for batch in plain]
    for batch, left in zip(found, kept, strict=True):
        assert set(left) <= set(batch)
    assert samples() == found  # what was taken down once stays out
    held_out = tiny_chain.program("diffusion", **options).held_out.removal
    assert held_out.since == {1: 0, 8: 0}
    with pytest.raises(InputError, match=r"takedown\.lockfile"):
        samples(takedown__lists=listed["takedown__lists"])
