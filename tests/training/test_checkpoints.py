"""Checkpoints: whole or not there, written behind the training's back, and all comes back."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Adafactor

from latentdiff.errors import InputError
from training import checkpoints
from training.checkpoints import Checkpointer, DiskError
from training.ema import EMA
from training.parallel import parallelize

ROOT = Path(__file__).parents[2]
FILES = ["ema.safetensors", "network.safetensors", "optimizer.safetensors", "state.json"]


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2, fused=True)


def adafactor(groups: Any) -> torch.optim.Optimizer:
    """Of Shazeer & Stern (2018): rows and columns, and numbers that are no tensors."""
    return Adafactor(groups, lr=1e-2, relative_step=False, scale_parameter=False)


class Run:
    """A small network in training: channels last, a frozen weight, a buffer."""

    def __init__(
        self,
        seed: int,
        width: int = 6,
        decays: tuple[float, ...] = (0.9, 0.5),
        optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1)
            )
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network[0].bias.requires_grad_(False)
        self.accelerator = Accelerator(cpu=True)
        self.wrapped = parallelize(self.network, self.accelerator, "no")
        self.ema = EMA(self.network, decays)
        trained = self.wrapped.trained.values()
        self.optimizer = optimizer(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
        )

    def step(self, *numbers: int) -> None:
        for number in numbers:
            images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))
            self.network(images).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(number)

    def checkpointer(self, folder: Path, keep: int = 2) -> Checkpointer:
        return Checkpointer(folder, keep, self.accelerator)

    def begin(self, checkpointer: Checkpointer, step: int) -> None:
        checkpointer.save(step, self.wrapped, self.ema, self.optimizer, None, {"seed": 0})

    def save(self, folder: Path, step: int, keep: int = 2) -> Path:
        checkpointer = self.checkpointer(folder, keep)
        self.begin(checkpointer, step)
        checkpointer.wait()
        return folder / f"step-{step:06d}"

    def load(self, path: Path) -> dict[str, Any]:
        return checkpoints.load(path, self.wrapped, self.ema, self.optimizer, None)

    def tensors(self) -> dict[str, torch.Tensor]:
        state = {
            f"{name}/{key}": torch.as_tensor(value)
            for name, parameter in self.network.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        trained = self.network.state_dict()
        del trained["0.bias"]  # frozen: a function of the seed
        return trained | state | {f"ema/{name}": value for name, value in self.ema.state().items()}

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.tensors().items()}

    def holds(self, other: Run | dict[str, torch.Tensor]) -> bool:
        """Whether every value is bit for bit the other's."""
        mine, theirs = self.tensors(), other.tensors() if isinstance(other, Run) else other
        return mine.keys() == theirs.keys() and all(
            value.equal(theirs[name]) for name, value in mine.items()
        )


@pytest.mark.parametrize("optimizer", [adamw, adafactor])
def test_what_is_saved_is_restored_and_trains_on_alike(
    tmp_path: Path, optimizer: Callable[[Any], torch.optim.Optimizer]
) -> None:
    run, other = Run(0, optimizer=optimizer), Run(1, optimizer=optimizer)
    other.network[0].bias.data.copy_(run.network[0].bias)
    run.step(1, 2, 3)
    path = run.save(tmp_path, 3)
    assert sorted(os.listdir(path)) == sorted([*FILES, "manifest.json"])
    assert other.load(path) == {"step": 3, "seed": 0}
    assert other.holds(run)
    assert any("/" in name for name in run.tensors())
    run.step(4, 5)
    other.step(4, 5)
    assert other.holds(run)
    groups = [(group["weight_decay"], group["lr"]) for group in other.optimizer.param_groups]
    assert groups == [(0.1, 1e-2), (0.0, 1e-2)]


def test_before_the_first_step_there_is_no_optimizer_state(tmp_path: Path) -> None:
    run, other = Run(0), Run(1)
    other.network[0].bias.data.copy_(run.network[0].bias)
    other.load(run.save(tmp_path, 0))
    assert other.holds(run)
    assert not other.optimizer.state
    run.step(1)
    other.step(1)
    assert other.holds(run)


def test_moments_lie_in_memory_as_their_parameters_do(tmp_path: Path) -> None:
    """Fused AdamW walks both in the order of memory."""
    run, other = Run(0), Run(1)
    run.step(1)
    other.load(run.save(tmp_path, 1))
    weight = other.network[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    for key in ("exp_avg", "exp_avg_sq"):
        assert other.optimizer.state[weight][key].stride() == weight.stride()


def test_the_scaler_of_half_precision_comes_back(tmp_path: Path) -> None:
    run = Run(0)
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (96.5, 2.0))
    scaler.scale(torch.ones(()))  # makes its tensors
    checkpointer = run.checkpointer(tmp_path)
    checkpointer.save(1, run.wrapped, run.ema, run.optimizer, scaler, {})
    checkpointer.wait()
    path = tmp_path / "step-000001"
    state = checkpoints.load(path, run.wrapped, run.ema, run.optimizer, other)
    assert state == {"step": 1}
    assert other.state_dict() == scaler.state_dict()
    assert other.state_dict()["scale"] == 96.5


def test_only_the_newest_are_kept_and_what_has_another_name(tmp_path: Path) -> None:
    run = Run(0)
    (tmp_path / "step-000005-kept").mkdir()
    for step in (5, 10, 15, 100, 999_900, 1_000_000):
        run.save(tmp_path, step, keep=2)
    names = ["step-999900", "step-1000000"]
    assert [path.name for path in checkpoints.complete(tmp_path)] == names
    assert run.checkpointer(tmp_path).latest() == tmp_path / "step-1000000"
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "step-000005-kept"])


def test_without_its_manifest_it_is_no_checkpoint(tmp_path: Path) -> None:
    run = Run(0)
    assert run.checkpointer(tmp_path / "absent").latest() is None
    first, second = run.save(tmp_path, 1), run.save(tmp_path, 2)
    (second / "manifest.json").unlink()
    assert checkpoints.complete(tmp_path) == [first]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    run = Run(0)
    run.save(tmp_path, 1)
    for name in (".staged-abc", "step-000002", "step-000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "network.safetensors").write_bytes(b"half")
    Run(1).load(run.save(tmp_path, 3))
    assert sorted(os.listdir(tmp_path)) == ["step-000001", "step-000003"]


# In the background


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No tensor is written before it is set."""
    gate, real = threading.Event(), checkpoints.save_file

    def save_file(*arguments: Any) -> None:
        assert gate.wait(60)
        real(*arguments)

    monkeypatch.setattr(checkpoints, "save_file", save_file)
    return gate


def test_training_goes_on_and_what_is_written_is_the_state_when_it_was_saved(
    tmp_path: Path, gate: threading.Event
) -> None:
    run, other = Run(0), Run(1)
    run.step(1, 2)
    saved = run.copy()
    checkpointer = run.checkpointer(tmp_path)
    run.begin(checkpointer, 2)
    run.step(3, 4)
    assert checkpoints.complete(tmp_path) == []
    gate.set()
    checkpointer.wait()
    other.load(tmp_path / "step-000002")
    assert other.holds(saved)
    assert not other.holds(run)


def test_a_second_save_waits_for_the_first_and_takes_its_memory(
    tmp_path: Path, gate: threading.Event
) -> None:
    run, other = Run(0), Run(1)
    run.step(1)
    checkpointer = run.checkpointer(tmp_path)
    run.begin(checkpointer, 1)
    places = {
        (file, name): value.data_ptr()
        for file, tensors in checkpointer.snapshot.items()
        for name, value in tensors.items()
    }
    threading.Timer(0.2, gate.set).start()
    run.step(2)
    run.begin(checkpointer, 2)
    assert checkpoints.complete(tmp_path) == [tmp_path / "step-000001"]
    checkpointer.wait()
    assert places == {
        (file, name): value.data_ptr()
        for file, tensors in checkpointer.snapshot.items()
        for name, value in tensors.items()
    }
    other.load(tmp_path / "step-000002")
    assert other.holds(run)


# A full disk


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_whole(tmp_path: Path) -> None:
    """The system itself refuses to write more than a few bytes into a file."""
    run, other = Run(0), Run(1)
    run.step(1)
    first = run.save(tmp_path, 1)
    saved = run.copy()
    run.step(2)
    checkpointer = run.checkpointer(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
        run.begin(checkpointer, 2)
        with pytest.raises(DiskError, match=r"step 2 could .*too large.* step-000001 is whole"):
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == [first.name]
    other.load(first)
    assert other.holds(saved)
    other.load(run.save(tmp_path, 2))
    assert other.holds(run)


def test_a_save_that_failed_stops_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    run = Run(0)
    checkpointer = run.checkpointer(tmp_path)
    monkeypatch.setattr(checkpoints, "sync", refuse)
    run.begin(checkpointer, 1)
    with pytest.raises(InputError, match=r"No space left.*MB free.*There is no earlier one"):
        run.begin(checkpointer, 2)
    assert os.listdir(tmp_path) == []


def test_room_is_made_certain_of_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(0)
    run.save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match=r"no room .* free 1\.\d\d MB or more .*step-000001"):
        run.begin(run.checkpointer(tmp_path), 2)
    assert os.listdir(tmp_path) == ["step-000001"]


# What is refused


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


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"network.saf', '{"state.json": "0"}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    run = Run(0)
    path = run.save(tmp_path, 1)
    (path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="is damaged; delete"):
        run.load(path)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"width": 7}, "a network of another shape"),
        ({"decays": (0.9,)}, "averages of other lengths"),
        ({"optimizer": adafactor}, "another optimizer"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path, values: dict[str, Any], what: str
) -> None:
    run = Run(0)
    run.step(1)
    path = run.save(tmp_path, 1)
    with pytest.raises(InputError, match=f"belongs to {what}.*; choose another run_dir"):
        Run(0, **values).load(path)


# Killed


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
def test_killed_anywhere_a_whole_checkpoint_remains_and_the_next_save_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Saving step 3 beside 1 and 2, with each operation the last one."""
    old, new = Run(0), Run(0)
    old.step(1)
    new.step(1, 2)
    files = {
        "network.safetensors": new.wrapped.gathered(new.wrapped.state()),
        "ema.safetensors": new.wrapped.gathered(new.ema.state()),
        "optimizer.safetensors": new.wrapped.gathered(
            checkpoints.optimizer_tensors(new.wrapped, new.optimizer)
        ),
    }
    state = {"step": 3, "scaler": None}
    for fatal in itertools.count():
        folder = tmp_path / str(fatal)
        old.save(folder, 1)
        old.save(folder, 2)
        with monkeypatch.context() as patch:
            mortal = Mortal(patch, fatal, before)
            try:
                checkpoints.write(folder, 3, files, state)
                checkpoints.prune(folder, 2)
            except Killed:
                pass
        if not mortal.dead:
            break
        whole = checkpoints.complete(folder)
        assert folder / "step-000002" in whole
        for path in whole:
            loaded = Run(2)
            loaded.load(path)
            assert loaded.holds(new if path.name == "step-000003" else old)
        new.save(folder, 4)
        assert len(os.listdir(folder)) == 2
        assert not list(folder.glob(".*"))
        shutil.rmtree(folder)
    assert fatal > 12


def test_a_run_killed_by_the_system_goes_on_and_ends_as_if_it_had_not_been() -> None:
    """A short form of the benchmark, which kills at every step of a save."""
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill_sweep", "--kills", "20", "--stride", "40"],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    kills = int(result.stdout.splitlines()[-1].split()[0])
    assert kills >= 20


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
        assert {file.stat().st_ino for file in (source, *files)} <= synced
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    Run(0).save(tmp_path, 1)
    assert tmp_path.stat().st_ino in synced


def test_the_manifest_holds_the_hash_of_every_file(tmp_path: Path) -> None:
    path = Run(0).save(tmp_path, 1)
    expected = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES}
    assert json.loads((path / "manifest.json").read_text()) == expected
