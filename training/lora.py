"""LoRA (Hu et al. 2021): train small adapters instead of the weights, by peft."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from latentdiff import lora_files
from latentdiff.config import Config
from latentdiff.errors import InputError
from latentdiff.lora import LoRA, LoRALayer
from latentdiff.rng import generator
from latentdiff.weights import TOWER

UNET, TOWERS = "unet", ("text_encoder", "text_encoder_2")

MODULES = {
    "attention": r"attn[12]\.(to_[qkv]|to_out\.0)|self_attn\.(q|k|v|out)_proj",
    "feed_forward": r"ff\.net\.(0\.proj|2)|mlp\.fc[12]",
    "convolution": r"resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.0\.conv",
}
"""How the names of the U-Net's and of CLIP's modules end."""

ADAPTER = "default"
"""peft's name for an adapter without one."""


class LoRAConfig(Config):
    """Adapters of the U-Net, and of the text encoder where it is trained."""

    rank: int = Field(default=16, gt=0)
    """r, the rank of what is added to each matrix."""
    alpha: float | None = Field(default=None, gt=0)
    """What is added is scaled by alpha / r; r by default."""
    targets: tuple[Literal["attention", "feed_forward", "convolution"], ...] = Field(
        default=("attention",), min_length=1
    )
    """What is adapted: attention's queries, keys, values and outputs, the matrices of its
    feed-forward layers, the U-Net's convolutions (LoCon)."""
    init_from: Path | None = None
    """A LoRA file of the same rank, alpha and targets to go on from."""

    @property
    def pattern(self) -> str:
        """A regular expression for the whole names of the modules to adapt."""
        return rf".*\.({'|'.join(MODULES[target] for target in self.targets)})"


class Adapted(NamedTuple):
    """One adapted module."""

    part: str
    """unet, text_encoder or text_encoder_2."""
    name: str
    """The module's, as LoRA files have it."""
    down: Tensor
    """A of the paper: [r, in] or [r, in, k, k]."""
    up: Tensor
    """B of the paper: [out, r] or [out, r, 1, 1]."""
    alpha: float


def attach(network: nn.Module, config: LoRAConfig, seed: int) -> None:
    """Adapt what is trained of a network's children unet, text_encoder and text_encoder_2.

    Afterwards only the adapters require grad; they are fp32 and change nothing yet. A's initial
    values are a function of the seed and the module's name. Raises InputError when a part has
    nothing of config.targets, and when config.init_from is of another shape.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for part, child in network.named_children():
        if part != UNET and part not in TOWERS:
            continue
        if not any(parameter.requires_grad for parameter in child.parameters()):
            continue
        options = LoraConfig(
            r=config.rank,
            lora_alpha=config.rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]
            target_modules=config.pattern,
        )
        try:
            with torch.random.fork_rng(devices=[]):
                inject_adapter_in_model(options, child, ADAPTER)
        except ValueError:  # peft found no such module
            raise InputError(
                f"The {part} has no {' or '.join(config.targets)} that a LoRA can adapt; of text "
                "encoders only CLIP has. Change lora.targets or set train_text_encoder to false."
            ) from None
    for layer in adapted(network):
        for parameter in (layer.down, layer.up):
            parameter.data = parameter.data.float()  # peft gives them the weights' dtype
        source = generator(seed, f"lora {layer.part}.{layer.name}")
        nn.init.kaiming_uniform_(layer.down, a=math.sqrt(5), generator=source)
    if config.init_from is not None:
        _copy(config.init_from, network)


def adapted(network: nn.Module) -> Iterator[Adapted]:
    """The adapted modules, with the parameters that are trained."""
    from peft.tuners.lora import LoraLayer

    for part, child in network.named_children():
        for name, module in child.named_modules():
            if isinstance(module, LoraLayer):
                if part in TOWERS and not name.startswith(TOWER):
                    name = TOWER + name
                down, up = (
                    pair[ADAPTER].get_parameter("weight") for pair in (module.lora_A, module.lora_B)
                )
                yield Adapted(part, name, down, up, float(module.lora_alpha[ADAPTER]))


def collect(network: nn.Module) -> LoRA:
    """What was attached, as latentdiff reads it from files."""
    lora: LoRA = {}
    for part, name, down, up, alpha in adapted(network):
        lora.setdefault(part, {})[name] = LoRALayer(down.detach(), up.detach().flatten(1), alpha)
    return lora


def save_lora(path: str | os.PathLike[str], network: nn.Module) -> None:
    """Write what was attached as one .safetensors file, in diffusers' naming.

    TextToImage.load_lora and diffusers' load_lora_weights read it.
    """
    lora_files.save_lora(collect(network), path)


@torch.no_grad()
def _copy(path: Path, network: nn.Module) -> None:
    theirs = {
        (part, name): layer
        for part, layers in lora_files.read_lora(path).items()
        for name, layer in layers.items()
    }
    for part, name, down, up, alpha in adapted(network):
        layer = theirs.pop((part, name), None)
        if layer is None or layer.down.numel() != down.numel() or layer.up.numel() != up.numel():
            have = None if layer is None else f"rank {layer.up.shape[1]}"
            raise _other_shape(path, f"it has {have or 'nothing'} for {part}.{name}")
        if layer.alpha != alpha:
            raise _other_shape(path, f"its alpha is {layer.alpha:g}, not {alpha:g}")
        down.copy_(layer.down.reshape(down.shape))
        up.copy_(layer.up.reshape(up.shape))
    if theirs:
        part, name = min(theirs)
        raise _other_shape(path, f"it adapts {part}.{name}, which is not adapted here")


def _other_shape(path: Path, what: str) -> InputError:
    return InputError(
        f"lora.init_from, {path}, has another shape: {what}; use its rank, alpha, targets and "
        "train_text_encoder."
    )
