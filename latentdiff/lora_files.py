"""LoRA files: read in diffusers', peft's and kohya's namings, written in diffusers'."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.errors import InputError
from latentdiff.lora import LoRA, LoRALayer
from latentdiff.model_files import PICKLES, check_file, read_weights, staged_file
from latentdiff.weights import TOWER

MAX_LORA_BYTES = 4 << 30
FILE_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file in a directory."""
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings, alpha among them, in the file's header."""

PREFIXES = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
"""How a key names its part, in diffusers' files and in kohya's."""
UNET = re.compile(r"(down_blocks|mid_block|up_blocks|conv_(in|out)|(time|add)_embedding)\..+")
"""Keys that need no prefix."""

KEY = re.compile(
    r"(?P<layer>.+?)"
    r"(?:[._](?:lora_(?P<new>A|B|down|up|mid)|lora(?:_linear_layer)?\.(?P<old>down|up))\.weight"
    r"|\.(?P<alpha>alpha))"
)
PEFT_ROLES = {"A": "down", "B": "up"}

WORDS = (
    "down_blocks mid_block up_blocks transformer_blocks time_emb_proj conv_shortcut conv_in "
    "conv_out proj_in proj_out to_q to_k to_v to_out time_embedding add_embedding cond_proj "
    "linear_1 linear_2 text_model self_attn q_proj k_proj v_proj out_proj text_projection"
)
"""Names with underscores of their own: in kohya's keys underscores stand between names, too."""
WORD = re.compile("|".join([*WORDS.split(), "[^_]+"]))

ORIGINAL_ENDS = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
ORIGINAL_LAYERS = {
    "op": "conv",
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
ORIGINAL_MIDDLE = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}


def read_lora(path: str | os.PathLike[str]) -> LoRA:
    """Read a LoRA or LoCon from a safetensors file, or from a directory that diffusers wrote.

    The namings of diffusers (also its old ones), peft and kohya are understood, kohya's also with
    the original names of the U-Net's blocks. LoCon's lora_mid is multiplied into down.

    Raises InputError for a file that is missing, damaged, a pickle or larger than 4 GiB, and for
    one in which any tensor is not understood.
    """
    file = _checked(Path(path).expanduser())
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in read_weights(file).items():
        part, module, role = _meaning(key)
        tensors = found.setdefault((part, module), {})
        if not role or role in tensors:
            unknown.append(key)
        tensors[role] = tensor
    if unknown:
        raise InputError(
            f"{file} has {len(unknown)} tensors that belong to no LoRA or name the same thing "
            f"twice, {min(unknown)!r} among them; LoRA and LoCon can be read, no other adapters."
        )
    if not found:
        raise InputError(f"{file} is empty; copy or download it again.")
    settings = _peft_settings(file)
    lora: LoRA = {}
    for (part, module), tensors in sorted(found.items()):
        try:
            layer = _layer(tensors, functools.partial(_peft_alpha, settings, part, module))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            raise InputError(
                f"{file} is damaged: what it has for {module} in {part} is incomplete or does not "
                "fit together; copy or download it again."
            ) from None
        lora.setdefault(part, {})[module] = layer
    return lora


def save_lora(lora: LoRA, path: str | os.PathLike[str]) -> None:
    """Write a .safetensors file, or into a directory, as diffusers' save_lora_weights does.

    read_lora returns equal tensors and alphas. diffusers and peft read alphas from the header;
    programs that do not know of it take alpha for r.
    """
    file = Path(path).expanduser()
    if file.suffix != ".safetensors":
        file = file / FILE_NAME
    state, settings = {}, {}
    for part, layers in lora.items():
        for name, layer in layers.items():
            up = layer.up.reshape(*layer.up.shape, *(1 for _ in layer.down.shape[2:]))
            for end, tensor in (("lora_A", layer.down), ("lora_B", up)):
                stored = tensor.detach().to("cpu", copy=True).contiguous()
                state[f"{part}.{name}.{end}.weight"] = stored
        for key, value in _peft_config(layers).items():
            settings[f"{part}.{key}"] = value
    metadata = {"format": "pt", METADATA: json.dumps(settings, sort_keys=True)}
    with staged_file(file) as staging:
        save_file(state, staging, metadata=metadata)


def _checked(path: Path) -> Path:
    file = path / FILE_NAME if path.is_dir() else path
    if file.suffix in PICKLES:
        raise InputError(
            f"{file} is a pickle, which can run code when opened; convert it once, where you trust "
            "its source, with safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'lora.safetensors')."
        )
    if not file.is_file():
        raise InputError(f"There is no LoRA at {file}; give the path of a .safetensors file.")
    check_file(file, MAX_LORA_BYTES)
    return file


def _meaning(key: str) -> tuple[str, str, str]:
    """Part, module in diffusers' names, and which tensor of its LoRA ("" if none) a key names."""
    match = KEY.fullmatch(key)
    prefix = next((start for start in PREFIXES if key.startswith(start)), "")
    if match is None or not (prefix or UNET.fullmatch(key)):
        return "", key, ""
    part, name = PREFIXES.get(prefix, "unet"), match["layer"].removeprefix(prefix)
    if prefix.startswith("lora_"):
        name = ".".join(WORD.findall(_from_original(name)))
    name = name.replace(".processor.", ".")
    if part == "unet":
        name = re.sub(r"\.to_out$", ".to_out.0", name)
    else:
        name = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
        if not name.startswith((TOWER, "text_projection")):
            name = TOWER + name
    role = match["new"] or match["old"] or match["alpha"]
    return part, name, PEFT_ROLES.get(role, role)


def _from_original(name: str) -> str:
    """CompVis' and Stability's name of a U-Net's module as diffusers', both with underscores.

    Their blocks are numbered through; every level has two on the way down, and one that halves,
    and three on the way up.
    """
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)_(\d+)_(.+)", name)
    if match is None or name in ORIGINAL_ENDS:
        return ORIGINAL_ENDS.get(name, name)
    section, number, rest = match.groups()
    if section == "middle_block":
        return f"mid_block_{ORIGINAL_MIDDLE.get(number)}_{ORIGINAL_LAYERS.get(rest, rest)}"
    slot, _, rest = rest.partition("_")
    down = section == "input_blocks"
    level, place = divmod(int(number) - down, 3)
    kind = f"resnets_{place}" if slot == "0" else f"attentions_{place}"
    if rest in ("op", "conv"):
        kind = "downsamplers_0" if down else "upsamplers_0"
    side = "down" if down else "up"
    return f"{side}_blocks_{level}_{kind}_{ORIGINAL_LAYERS.get(rest, rest)}"


def _layer(tensors: dict[str, Tensor], default_alpha: Callable[[int], float]) -> LoRALayer:
    """Raises one of many errors when the tensors are incomplete or do not fit one another."""
    down, up = tensors["down"], tensors["up"].flatten(1)
    if "mid" in tensors:
        mid = tensors["mid"].float()
        down = torch.einsum("nmkl,mi->nikl", mid, down.flatten(1).float())
    rank = up.shape[1]
    alpha = float(tensors["alpha"]) if "alpha" in tensors else default_alpha(rank)
    floating = down.is_floating_point() and up.is_floating_point()
    if not (down.shape[0] == rank > 0 and floating and math.isfinite(alpha)):
        raise ValueError
    # The tensors are the file's own pages, and the file may be overwritten.
    return LoRALayer(down.clone(), up.clone(), alpha)


def _peft_settings(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="numpy") as opened:
        text = (opened.metadata() or {}).get(METADATA, "{}")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{file} is damaged: its {METADATA} is no JSON object; copy it again.")
    return settings


def _peft_alpha(settings: dict[str, Any], part: str, module: str, rank: int) -> float:
    """alpha of a module that has none among the tensors: peft's LoraConfig, and else r."""

    def setting(name: str, default: Any) -> Any:
        value = settings.get(f"{part}.{name}", settings.get(name))
        return default if value is None else value

    alpha = setting("lora_alpha", rank)
    for pattern, value in setting("alpha_pattern", {}).items():
        ending = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", ending):
            raise ValueError
        if f".{module}".endswith(f".{ending}"):
            alpha = value
            break
    # Kalajdzievski (2023): alpha / sqrt(r) instead of alpha / r.
    return float(alpha) * (math.sqrt(rank) if setting("use_rslora", False) else 1)


def _peft_config(layers: dict[str, LoRALayer]) -> dict[str, Any]:
    """What peft's LoraConfig needs to know; it finds modules by the ends of their names."""
    ranks = {name.removeprefix(TOWER): layer.up.shape[1] for name, layer in layers.items()}
    alphas = {name.removeprefix(TOWER): layer.alpha for name, layer in layers.items()}
    rank, alpha = statistics.mode(ranks.values()), statistics.mode(alphas.values())
    return {
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(ranks),
    }
