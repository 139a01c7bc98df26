"""Checkpoints of a run: staged, synced, renamed, the manifest written last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdiff.errors import InputError
from latentdiff.model_files import sync, write_json
from training.ema import EMA

MANIFEST = "manifest.json"
NETWORK, AVERAGE, OPTIMIZER = "network.safetensors", "ema.safetensors", "optimizer.safetensors"
STATE = "state.json"


def parameter_names(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in the order in which its state numbers them."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's tensors as "parameter.name/state", for safetensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[number]}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, values in state.items()
        for key, value in values.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]
) -> None:
    """The inverse of optimizer_tensors.

    Moments take their parameter's memory format: fused AdamW walks both in the order of memory.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("/", 1)
        like = parameters[numbers[parameter]].detach()
        if tensor.shape == like.shape:
            tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(numbers[parameter], {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def save(
    folder: Path,
    step: int,
    network: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-NNNNNN`, then prune all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = parameter_names(network, optimizer)
    staged = Path(tempfile.mkdtemp(prefix=".staged-", dir=folder))
    try:
        weights = {name: value.contiguous() for name, value in network.state_dict().items()}
        save_file(weights, staged / NETWORK)
        save_file(ema.state_dict(), staged / AVERAGE)
        save_file(optimizer_tensors(optimizer, names), staged / OPTIMIZER)
        write_json({"step": step} | state, staged / STATE)
        files = sorted(staged.iterdir())
        for file in files:
            sync(file)
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        write_json(digests, staged / MANIFEST)
        sync(staged / MANIFEST)
        target = folder / f"step-{step:06d}"
        _remove(target)
        os.replace(staged, target)
        sync(folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    kept = complete(folder)[-keep:]
    for path in [*folder.glob("step-*"), *folder.glob(".staged-*")]:
        if path not in kept:
            _remove(path)
    return target


def _remove(path: Path) -> None:
    """The manifest goes first: what is half removed is no checkpoint."""
    if path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def complete(folder: Path) -> list[Path]:
    """The checkpoints that have a manifest, oldest first."""
    found = [path.parent for path in folder.glob(f"step-*/{MANIFEST}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load(
    path: Path, network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore everything from one checkpoint and return its state.

    Raises InputError when a file differs from the manifest or the network has another shape.
    """
    try:
        digests = json.loads((path / MANIFEST).read_text())
    except ValueError:
        digests = {}
    for name in (NETWORK, AVERAGE, OPTIMIZER, STATE):
        file = path / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digests.get(name):
            raise InputError(
                f"{file} is damaged; delete {path} to continue from the one before it."
            )
    try:
        network.load_state_dict(load_file(path / NETWORK))
        ema.load_state_dict(load_file(path / AVERAGE))
    except RuntimeError:
        raise InputError(
            f"{path} belongs to a network of another shape; choose another run_dir."
        ) from None
    tensors = load_file(path / OPTIMIZER)
    restore_optimizer(optimizer, parameter_names(network, optimizer), tensors)
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state
