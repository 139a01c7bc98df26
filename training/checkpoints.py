"""Checkpoints of a run: a snapshot in memory, written behind the training's back.

Staged, synced, renamed, the manifest written last; older ones go only after.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.errors import InputError
from latentdiff.model_files import file_digest, one_line, read_json, sync, weight_shapes, write_json
from training.ema import EMA
from training.parallel import Wrapped, agreed

MANIFEST = "manifest.json"
NETWORK, AVERAGES, OPTIMIZER = "network.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE = "state.json"

Tensors = dict[str, Tensor]


class DiskError(InputError, OSError):
    """A checkpoint does not fit on the disk or cannot be written there."""


class Checkpointer:
    """Writes `folder/step-NNNNNN` in a thread of the main process, one at a time.

    Its memory is one whole snapshot on the main process: weights, averages and optimizer state.
    keep: how many of the newest stay. Every process calls every method.
    """

    def __init__(self, folder: Path, keep: int, accelerator: Accelerator) -> None:
        self.folder, self.keep, self.accelerator = folder, keep, accelerator
        self.snapshot: dict[str, Tensors] = {NETWORK: {}, AVERAGES: {}, OPTIMIZER: {}}
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(
        self,
        step: int,
        wrapped: Wrapped,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        state: dict[str, Any],
    ) -> None:
        """Take a snapshot, begin to write it and return; the write before ends first.

        A run's state is a function of its step: what is there whole is not written again.

        Raises DiskError when the write before failed or there is no room for this one; the newest
        checkpoint is then the one from before, and whole.
        """
        tensors = {
            NETWORK: wrapped.state(),
            AVERAGES: ema.state(),
            OPTIMIZER: optimizer_tensors(wrapped, optimizer),
        }
        self.wait(needed=sum(_bytes(values) for values in tensors.values()))
        for name, values in tensors.items():
            wrapped.gathered(values, self.snapshot[name])
        if self.accelerator.is_main_process:
            all_state = {"step": step, "scaler": scaler and scaler.state_dict()} | state
            self.thread = threading.Thread(
                target=self._run, args=(step, all_state), name=f"checkpoint-{step}"
            )
            self.thread.start()

    def wait(self, needed: int = 0) -> None:
        """Until nothing is being written. Raises DiskError when that failed.

        needed: bytes of free space to insist on besides.
        """
        self.join()
        error = self.error
        if error is None and needed and self.accelerator.is_main_process:
            error = self._no_room(needed)
        if (error := agreed(self.accelerator, error)) is not None:
            raise error

    @property
    def failed(self) -> bool:
        """Whether this process knows by now that what it wrote last came to nothing."""
        return self.error is not None

    def join(self) -> None:
        """Until this process writes nothing, whatever came of it; for a run that is failing."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def latest(self) -> Path | None:
        """The newest whole checkpoint, the same one on every process."""
        found = complete(self.folder) if self.accelerator.is_main_process else []
        return agreed(self.accelerator, found[-1] if found else None)

    def _no_room(self, needed: int) -> DiskError | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".staged-*"):
            shutil.rmtree(left)
        missing = needed + needed // 100 + (1 << 20) - shutil.disk_usage(self.folder).free
        if missing <= 0:
            return None
        return DiskError(
            f"There is no room for a checkpoint of {_size(needed)} in {self.folder}; free "
            f"{_size(missing)} or more there and give the same command again. "
            f"{self._whole()}"
        )

    def _whole(self) -> str:
        kept = complete(self.folder)
        return f"The checkpoint {kept[-1].name} is whole." if kept else "There is no earlier one."

    def _run(self, step: int, state: dict[str, Any]) -> None:
        try:
            write(self.folder, step, self.snapshot, state)
            prune(self.folder, self.keep)
        except (OSError, SafetensorError) as error:
            self.error = error
            size = _size(sum(_bytes(tensors) for tensors in self.snapshot.values()))
            self.error = DiskError(
                f"The checkpoint of step {step} could not be written ({one_line(error)}). See "
                f"that {self.folder} has {size} free and may be written to, and give the same "
                f"command again. {self._whole()}"
            )
        except Exception as error:
            self.error = error


def write(folder: Path, step: int, files: Mapping[str, Tensors], state: dict[str, Any]) -> None:
    """Write `folder/step-NNNNNN`, whole or not at all."""
    target = folder / f"step-{step:06d}"
    if (target / MANIFEST).exists():
        return
    staged = folder / f".staged-{uuid.uuid4().hex}"
    staged.mkdir()
    try:
        for name, tensors in files.items():
            save_file(tensors, staged / name)
        write_json(state, staged / STATE)
        for name in (*files, STATE):
            sync(staged / name)
        write_json(
            {name: file_digest(staged / name) for name in (*files, STATE)}, staged / MANIFEST
        )
        sync(staged / MANIFEST)
        sync(staged)
        _remove(target)
        os.replace(staged, target)
        sync(folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`, and what is not whole. Other names are left alone."""
    kept = complete(folder)[-keep:]
    for path in [*_steps(folder), *folder.glob(".staged-*")]:
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """The manifest goes first: what is half removed is no checkpoint."""
    if path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        sync(path)
        shutil.rmtree(path)


def complete(folder: Path) -> list[Path]:
    """The checkpoints that have a manifest, oldest first."""
    return [path for path in _steps(folder) if (path / MANIFEST).is_file()]


def _steps(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def optimizer_tensors(wrapped: Wrapped, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state as "parameter/state": its own tensors, and its numbers as new ones."""
    return {
        f"{name}/{key}": value if isinstance(value, Tensor) else _number(value)
        for name, parameter in wrapped.trained.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def load(
    path: Path,
    wrapped: Wrapped,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> dict[str, Any]:
    """Restore everything from one checkpoint and return its state, on every process.

    Only the main process reads it. Raises InputError when a file differs from the manifest, or the
    network, the averages or the optimizer are others.
    """
    is_main = wrapped.accelerator.is_main_process
    _start_optimizer(wrapped, optimizer)
    targets = {
        NETWORK: wrapped.state(),
        AVERAGES: ema.state(),
        OPTIMIZER: optimizer_tensors(wrapped, optimizer),
    }
    problem = _problem(path, targets) if is_main else None
    if (problem := agreed(wrapped.accelerator, problem)) is not None:
        raise InputError(problem)
    # A parameter that never had a gradient has no state.
    saved = set(weight_shapes(path / OPTIMIZER)) if is_main else set()
    saved = agreed(wrapped.accelerator, saved)
    targets[OPTIMIZER] = {n: value for n, value in targets[OPTIMIZER].items() if n in saved}
    with ExitStack() as files:
        for name, tensors in targets.items():
            file = files.enter_context(safe_open(path / name, framework="pt")) if is_main else None
            wrapped.scatter_(tensors, lambda key, file=file: file.get_tensor(key))  # type: ignore
    _put_numbers(wrapped, optimizer, targets[OPTIMIZER])
    state = json.loads((path / STATE).read_text()) if is_main else {}
    state = agreed(wrapped.accelerator, state)
    known = state.pop("scaler")
    if scaler is not None and known is not None:
        scaler.load_state_dict(known)
    return state


@torch.no_grad()
def _start_optimizer(wrapped: Wrapped, optimizer: torch.optim.Optimizer) -> None:
    """A step with a gradient and a rate of zero, for whatever state the optimizer keeps.

    So every optimizer makes its own tensors, in its own shapes, dtypes, memory formats and shards.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in wrapped.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _put_numbers(wrapped: Wrapped, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Numbers that are no tensors back into the optimizer; state without a value out of it."""
    for name, parameter in wrapped.trained.items():
        state = optimizer.state.get(parameter, {})
        for key, value in list(state.items()):
            if f"{name}/{key}" not in tensors:
                del state[key]
            elif not isinstance(value, Tensor):
                state[key] = type(value)(tensors[f"{name}/{key}"].item())
        if not state:
            optimizer.state.pop(parameter, None)


def _problem(path: Path, targets: Mapping[str, Tensors]) -> str | None:
    """What is wrong with a checkpoint for these tensors, in a sentence."""
    try:
        digests = read_json(path / MANIFEST)
    except InputError:
        digests = {}
    for name in (*targets, STATE):
        if not (path / name).is_file() or file_digest(path / name) != digests.get(name):
            return f"{path / name} is damaged; delete {path} to continue from the one before it."
    for name, what in (
        (NETWORK, "a network of another shape"),
        (AVERAGES, "averages of other lengths (ema_decays)"),
        (OPTIMIZER, "another optimizer"),
    ):
        wanted = {key: list(value.shape) for key, value in targets[name].items()}
        found = weight_shapes(path / name)
        if name == OPTIMIZER:
            parameters = {key.rsplit("/", 1)[0] for key in found}
            wanted = {k: v for k, v in wanted.items() if k.rsplit("/", 1)[0] in parameters}
        if found != wanted:
            return f"{path} belongs to {what}; choose another run_dir."
    return None


def _bytes(tensors: Tensors) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
