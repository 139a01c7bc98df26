"""LoRA (Hu et al. 2021): adapters for whole networks, several at once, attached or fused.

A weight W becomes W + weight * alpha / r * up down, with down [r, in, ...] and up [out, r].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from latentdiff.errors import InputError
from latentdiff.weights import TOWER

Adaptable: TypeAlias = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class LoRALayer:
    """What one LoRA adds to one matrix or convolution."""

    down: Tensor
    """[r, in], or [r, in, k, k] with the kernel of the convolution that it adapts."""
    up: Tensor
    """[out, r]."""
    alpha: float
    """Divided by r, the scale of up down."""

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.up.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it adapts; a matrix and a 1 x 1 kernel are the same."""
        return _bare((self.up.shape[0], *self.down.shape[1:]))

    def delta(self, device: torch.device) -> Tensor:
        """alpha / r * up down in float32, of the shape [out, in, ...]."""
        down, up = self.down.to(device).float(), self.up.to(device).float()
        return self.scale * torch.einsum("or,r...->o...", up, down)


LoRA: TypeAlias = dict[str, dict[str, LoRALayer]]
"""Layers by part ("unet", "text_encoder", "text_encoder_2") and by module, as published files
name it: for a text encoder "text_model.encoder.layers.0...", whatever transformers calls it."""


class _Branch(nn.Module):
    """One layer beside the module that it adapts; moves with it, and is in no state dict."""

    down: Tensor
    up: Tensor

    def __init__(self, base: Adaptable, layer: LoRALayer, weight: float) -> None:
        super().__init__()
        r, kernel = layer.up.shape[1], base.weight.shape[1:]
        down = layer.down.reshape(r, *kernel).to(base.weight)
        up = layer.up.reshape(-1, r, *(1 for _ in kernel[1:])).to(base.weight)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.layer = layer
        self.weight = weight
        self.fused = False

    def hook(self, base: Adaptable, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The base module's output and the branch's."""
        if self.fused or self.weight == 0:
            return output
        if isinstance(base, nn.Linear):
            branch = F.linear(F.linear(inputs[0], self.down), self.up)
        else:
            stride, padding, dilation = base.stride, base.padding, base.dilation
            branch = F.conv2d(inputs[0], self.down, None, stride, padding, dilation)
            branch = F.conv2d(branch, self.up)
        return torch.add(output, branch, alpha=self.weight * self.layer.scale)


class Adapters:
    """The LoRAs of a model's networks. Where none is attached the networks are as they were.

    Attached, a LoRA is computed beside the weights, which stay as they are, also in a saved
    model. Fused, it is in the weights and costs no time; unfusing restores them bit by bit.
    Gradients reach a layer's tensors where they have its network's dtype and device.

    Args:
        parts: networks by the names that LoRA files have for them: "unet", "text_encoder" and,
            of SDXL, "text_encoder_2".
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._parts = dict(parts)
        self._branches: dict[str, list[tuple[Adaptable, _Branch, RemovableHandle]]] = {}
        self._weights: dict[str, float] = {}
        self._originals: list[tuple[Adaptable, Tensor]] | None = None

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each LoRA by name, in the order of adding."""
        return dict(self._weights)

    @property
    def fused(self) -> bool:
        """Whether the LoRAs are in the networks' weights now."""
        return self._originals is not None

    def add(self, name: str, lora: LoRA, weight: float = 1.0) -> None:
        """Attach a LoRA under a new name; any number, of either sign, is a weight.

        Raises InputError, and changes nothing, when the LoRA does not fit the networks, the name
        is taken, the weight is not finite or LoRAs are fused.
        """
        self._check_unfused()
        _check_weight(name, weight)
        if name in self._branches:
            raise InputError(f"There is a LoRA named {name!r} already; remove it or choose a name.")
        fitted = self._fitted(name, lora)
        branches = [(base, _Branch(base, layer, weight)) for base, layer in fitted]
        self._weights[name] = weight
        self._branches[name] = []
        for base, branch in branches:
            base.add_module(_attribute(branch), branch)
            handle = base.register_forward_hook(branch.hook)
            self._branches[name].append((base, branch, handle))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Change the weights of the LoRAs that are named; the others keep theirs.

        Raises InputError, and changes nothing, as `add` does, or for an unknown name.
        """
        self._check_unfused()
        for name, weight in weights.items():
            self._check_name(name)
            _check_weight(name, weight)
        for name, weight in weights.items():
            self._weights[name] = weight
            for _, branch, _ in self._branches[name]:
                branch.weight = weight

    def remove(self, name: str) -> None:
        """Take a LoRA off again. Raises InputError for an unknown name or while LoRAs are fused."""
        self._check_unfused()
        self._check_name(name)
        del self._weights[name]
        for base, branch, handle in self._branches.pop(name):
            handle.remove()
            delattr(base, _attribute(branch))

    @torch.no_grad()
    def fuse(self) -> None:
        """Put all LoRAs into the weights, rounded once to their dtype; does nothing if they are.

        What the weights were is kept in main memory for `unfuse`.
        """
        if self.fused or not self._branches:
            return
        by_module: dict[Adaptable, list[_Branch]] = {}
        for branches in self._branches.values():
            for base, branch, _ in branches:
                by_module.setdefault(base, []).append(branch)
        self._originals = []
        try:
            for base, beside in by_module.items():
                fused = base.weight.to(torch.float32, copy=True)
                for branch in beside:
                    delta = branch.layer.delta(fused.device).reshape(fused.shape)
                    fused.add_(delta, alpha=branch.weight)
                    branch.fused = True
                self._originals.append((base, base.weight.to("cpu", copy=True)))
                base.weight.copy_(fused)
        except BaseException:
            self.unfuse()
            raise

    @torch.no_grad()
    def unfuse(self) -> None:
        """Restore the weights that `fuse` changed, bit by bit; the LoRAs stay attached."""
        for base, original in self._originals or []:
            base.weight.copy_(original)
        for branches in self._branches.values():
            for _, branch, _ in branches:
                branch.fused = False
        self._originals = None

    def _fitted(self, lora_name: str, lora: LoRA) -> list[tuple[Adaptable, LoRALayer]]:
        fitted = []
        for part, layers in lora.items():
            network = self._parts.get(part)
            modules = {} if network is None else dict(network.named_modules())
            for name, layer in layers.items():
                base = modules.get(name, modules.get(name.removeprefix(TOWER)))
                own = _bare(base.weight.shape) if isinstance(base, nn.Linear | nn.Conv2d) else None
                if own != layer.shape or not isinstance(base, nn.Linear | nn.Conv2d):
                    raise InputError(
                        f"The LoRA {lora_name!r} is for another model: it changes {name} in "
                        f"{part}, of shape {list(layer.shape)}, which this one "
                        f"{'lacks' if own is None else f'has as {list(own)}'}."
                    )
                fitted.append((base, layer))
        return fitted

    def _check_name(self, name: str) -> None:
        if name not in self._branches:
            names = ", ".join(map(repr, self._branches)) or "none"
            raise InputError(f"There is no LoRA named {name!r}; attached: {names}.")

    def _check_unfused(self) -> None:
        if self.fused:
            raise InputError("LoRAs are fused into the weights; unfuse them before changing them.")


def _check_weight(name: str, weight: float) -> None:
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"The weight of a LoRA is a finite number; {name!r} has {weight!r}.")


def _attribute(branch: _Branch) -> str:
    return f"lora_{id(branch)}"


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the kernel's sides where they are 1."""
    return tuple(shape[:2] if math.prod(shape[2:]) == 1 else shape)
