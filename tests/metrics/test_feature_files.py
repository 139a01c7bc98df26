"""Rows in files: the same whoever makes them, in whatever order, and however often killed."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from latentdiff.errors import InputError
from latentdiff.metrics import feature_files
from latentdiff.metrics.feature_files import PIECE, FeatureFiles

WIDTHS = {"one": 3, "two": 1}


def rows(numbers: range) -> dict[str, np.ndarray]:
    """Row i depends on i alone."""
    column = np.array(numbers, np.float32)[:, None]
    return {"one": column * [1, 10, 100], "two": -column}


def files(folder: Path, count: int) -> FeatureFiles:
    return FeatureFiles(folder, count, WIDTHS, {"seed": 0})


def check(found: dict[str, np.ndarray], count: int) -> None:
    assert found.keys() == WIDTHS.keys()
    for name, expected in rows(range(count)).items():
        assert isinstance(found[name], np.memmap)
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], expected)


@given(st.integers(1, 3 * PIECE), st.integers(1, 4), st.data())
def test_processes_make_all_rows_once(
    tmp_path_factory: pytest.TempPathFactory, count: int, processes: int, data: st.DataObject
) -> None:
    """They run one after another here, and some are killed in the middle."""
    folder, made = tmp_path_factory.mktemp("rows"), list[range]()

    def until_killed(numbers: range) -> dict[str, np.ndarray]:
        if data.draw(st.booleans()):
            raise KeyboardInterrupt
        made.append(numbers)
        return rows(numbers)

    for rank in range(processes):
        try:
            files(folder, count).fill(until_killed, rank, processes)
        except KeyboardInterrupt:
            continue

    def at_last(numbers: range) -> dict[str, np.ndarray]:
        made.append(numbers)
        return rows(numbers)

    last, told = files(folder, count), list[int]()
    last.fill(at_last, 0, processes, told.append)
    assert told == sorted(told)
    assert told[-1] == count
    check(last.finish(), count)
    assert sorted(number for numbers in made for number in numbers) == list(range(count))
    assert not list(folder.glob("pieces*"))


def test_each_process_begins_with_its_own(tmp_path: Path) -> None:
    begun = []

    def note(numbers: range) -> dict[str, np.ndarray]:
        begun.append(numbers.start // PIECE)
        return rows(numbers)

    files(tmp_path, 5 * PIECE).fill(note, 1, 2)
    assert begun[:2] == [1, 3]
    assert sorted(begun[2:]) == [0, 2, 4]


def test_what_is_whole_is_not_made_again(tmp_path: Path) -> None:
    first = files(tmp_path, 40)
    first.fill(rows)
    check(first.finish(), 40)
    again = files(tmp_path, 40)
    assert again.whole

    def never(numbers: range) -> dict[str, np.ndarray]:
        raise AssertionError(numbers)

    again.fill(never)
    check(again.finish(), 40)


def test_a_straggler_writes_nothing_into_what_is_whole(tmp_path: Path) -> None:
    """It made a piece that the first process made and gathered meanwhile."""

    def slowly(numbers: range) -> dict[str, np.ndarray]:
        first = files(tmp_path, 40)
        first.fill(rows)
        first.finish()
        return rows(numbers)

    files(tmp_path, 40).fill(slowly, 1, 2)
    assert not list(tmp_path.glob("pieces*"))
    check(files(tmp_path, 40).finish(), 40)


def test_gathering_continues_where_it_was_killed(tmp_path: Path) -> None:
    made = files(tmp_path, 40)
    made.fill(rows)
    np.save(tmp_path / "one.npy", rows(range(40))["one"].astype(np.float32))
    assert not made.whole
    check(made.finish(), 40)


@pytest.mark.parametrize("read", range(6))
def test_two_evaluations_gather_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    """One is through, its pieces gone, while the other has read so many of them."""
    count = 3 * PIECE
    slow, fast = files(tmp_path, count), files(tmp_path, count)
    slow.fill(rows)
    seen: list[object] = []

    def load(path: Path) -> dict[str, np.ndarray]:
        seen.append(path)
        if len(seen) == read + 1:
            check(fast.finish(), count)
        return load_file(path)

    monkeypatch.setattr(feature_files, "load_file", load)
    check(slow.finish(), count)
    assert len(seen) > read


def test_pieces_that_are_lost_are_missed(tmp_path: Path) -> None:
    made = files(tmp_path, 40)
    made.fill(rows)
    next(tmp_path.glob("pieces*/000001.*")).unlink()
    with pytest.raises(FileNotFoundError):
        made.finish()


def work(folder: Path, rank: int, barrier: Barrier) -> None:
    """A process of four, each with pieces of its own, of which one has but one."""
    barrier.wait()
    mine = files(folder, 5 * PIECE + 3)
    mine.fill(rows, rank, 4)
    if rank == 0:
        check(mine.finish(), 5 * PIECE + 3)


def test_four_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    workers = [context.Process(target=work, args=(tmp_path, rank, barrier)) for rank in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    check(files(tmp_path, 5 * PIECE + 3).finish(), 5 * PIECE + 3)
    assert not list(tmp_path.glob("pieces*"))


@pytest.mark.parametrize(
    ("widths", "identity", "words"),
    [
        (WIDTHS, {"seed": 1}, "seed: 0 and 1"),
        (WIDTHS | {"three": 2}, {"seed": 0}, "widths.three: null and 2"),
    ],
)
def test_rows_of_something_else_are_refused(
    tmp_path: Path, widths: dict[str, int], identity: dict[str, int], words: str
) -> None:
    files(tmp_path, 5)
    with pytest.raises(InputError, match=words):
        FeatureFiles(tmp_path, 5, widths, identity)
