"""Checkpoints: whole or not there, and everything in them comes back."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latentdiff.errors import InputError
from training import checkpoints
from training.ema import EMA

FILES = ["ema.safetensors", "network.safetensors", "optimizer.safetensors", "state.json"]


class Run:
    """A small network in training: channels last, a frozen weight, a buffer."""

    def __init__(self, seed: int, width: int = 6) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1)
            )
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network[0].bias.requires_grad_(False)
        self.ema = EMA(self.network, 0.9)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)

    def step(self, *numbers: int) -> None:
        for number in numbers:
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))
            self.network(images).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.network, number)

    def save(self, folder: Path, step: int, keep: int = 2) -> Path:
        state = {"seed": 0}
        return checkpoints.save(folder, step, self.network, self.ema, self.optimizer, state, keep)

    def load(self, path: Path) -> dict[str, Any]:
        return checkpoints.load(path, self.network, self.ema, self.optimizer)

    def tensors(self) -> dict[str, torch.Tensor]:
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.network.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return {**self.network.state_dict(), **moments} | {
            f"ema/{name}": value for name, value in self.ema.average.items()
        }

    def holds(self, other: Run) -> bool:
        """Whether every value is bit for bit the other's."""
        mine, theirs = self.tensors(), other.tensors()
        assert any(name.endswith("/exp_avg_sq") for name in mine)
        return mine.keys() == theirs.keys() and all(
            value.equal(theirs[name]) for name, value in mine.items()
        )


def test_what_is_saved_is_restored_and_trains_on_alike(tmp_path: Path) -> None:
    run, other = Run(0), Run(1)
    run.step(1, 2, 3)
    path = run.save(tmp_path, 3)
    assert path == tmp_path / "step-000003"
    assert sorted(os.listdir(path)) == sorted([*FILES, "manifest.json"])
    assert other.load(path) == {"step": 3, "seed": 0}
    assert other.holds(run)
    run.step(4, 5)
    other.step(4, 5)
    assert other.holds(run)
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.1, 0.0]


def test_before_the_first_step_there_is_no_optimizer_state(tmp_path: Path) -> None:
    run, other = Run(0), Run(1)
    other.load(run.save(tmp_path, 0))
    run.step(1)
    other.step(1)
    assert other.holds(run)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = Run(0)
    for step in (5, 10, 15, 100, 999_900, 1_000_000):
        run.save(tmp_path, step, keep=2)
    names = ["step-999900", "step-1000000"]
    assert [path.name for path in checkpoints.complete(tmp_path)] == names
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_without_its_manifest_it_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.complete(tmp_path / "absent") == []
    run = Run(0)
    first, second = run.save(tmp_path, 1), run.save(tmp_path, 2)
    (second / "manifest.json").unlink()
    assert checkpoints.complete(tmp_path) == [first]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    run = Run(0)
    run.save(tmp_path, 1)
    for name in (".staged-abc", "step-000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "network.safetensors").write_bytes(b"half")
    run.save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000003"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_refused(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    run = Run(0)
    path = run.save(tmp_path, 1)
    damage(path / file)
    with pytest.raises(InputError, match=f"{file} is damaged; delete .*step-000001 to continue"):
        run.load(path)


@pytest.mark.parametrize("content", ["", "{}", '{"network.saf', '{"state.json": "0"}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    run = Run(0)
    path = run.save(tmp_path, 1)
    (path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="is damaged; delete"):
        run.load(path)


def test_a_network_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = Run(0).save(tmp_path, 1)
    with pytest.raises(InputError, match="another shape; choose another run_dir"):
        Run(0, width=7).load(path)


class Killed(BaseException):
    """The process ends here."""


class Mortal:
    """The file system of a process that dies at operation number `fatal`: nothing works after."""

    def __init__(self, patch: pytest.MonkeyPatch, fatal: int, before: bool) -> None:
        self.fatal, self.before, self.calls = fatal, before, itertools.count()
        self.dead = False
        for owner, name in (
            (checkpoints, "save_file"),
            (checkpoints, "write_json"),
            (os, "fsync"),
            (os, "replace"),
            (os, "unlink"),
            (os, "rmdir"),
        ):
            patch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            now = next(self.calls) == self.fatal
            if self.dead or (now and self.before):
                self.dead = True
                raise Killed
            result = real(*arguments, **named)
            if now:
                self.dead = True
                raise Killed
            return result

        return operation


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("again", [False, True], ids=["next", "again"])
def test_killed_anywhere_a_whole_checkpoint_remains_and_the_next_save_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, again: bool
) -> None:
    """Saving step 3 beside 1 and 2, or step 2 over itself, with each operation the last one."""
    old, new = Run(0), Run(1)
    old.step(1)
    new.step(1)
    step = 2 if again else 3
    for fatal in itertools.count():
        folder = tmp_path / str(fatal)
        old.save(folder, 1)
        old.save(folder, 2)
        with monkeypatch.context() as patch:
            mortal = Mortal(patch, fatal, before)
            try:
                new.save(folder, step)
            except Killed:
                pass
        if not mortal.dead:
            break
        whole = checkpoints.complete(folder)
        assert folder / "step-000001" in whole or folder / "step-000003" in whole
        for path in whole:
            loaded = Run(2)
            assert loaded.load(path)["step"] == int(path.name[-6:])
            assert loaded.holds(old) or (path.name == f"step-{step:06d}" and loaded.holds(new))
        new.save(folder, 4)
        assert len(os.listdir(folder)) == 2
        assert not list(folder.glob(".*"))
        shutil.rmtree(folder)
    assert fatal > 12


def test_nothing_is_published_before_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        real_sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def replace(source: Path, target: Path) -> None:
        files = list(source.iterdir())
        assert sorted(file.name for file in files) == sorted([*FILES, "manifest.json"])
        assert {file.stat().st_ino for file in files} <= synced
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    Run(0).save(tmp_path, 1)
    assert tmp_path.stat().st_ino in synced


def test_the_manifest_holds_the_hash_of_every_file(tmp_path: Path) -> None:
    path = Run(0).save(tmp_path, 1)
    expected = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}
    assert json.loads((path / "manifest.json").read_text()) == expected
