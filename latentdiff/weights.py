"""Networks from safetensors and back, without random initialization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.errors import InputError
from latentdiff.model_files import one_line, read_weights

M = TypeVar("M", bound=nn.Module)

RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""The VAE's attention in files made before diffusers 0.12."""
TOWER = "text_model."
"""What the text tower's names begin with in every published file, and not in transformers 5."""


def load_module(
    build: Callable[[dict[str, Any]], M], config: dict[str, Any], file: Path, dtype: torch.dtype
) -> M:
    """The network `build(config)` in evaluation mode, every tensor from `file`, as `dtype`.

    Raises InputError when the config describes none, or the file is damaged or does not fit it.
    """
    path = file.with_name("config.json")
    try:
        with torch.device("meta"):
            module = build(config)
    except InputError as error:
        raise InputError(f"{path} is not supported: {one_line(error)}") from None
    except Exception as error:  # third-party constructors raise whatever they stumble on
        reason = one_line(error)
        raise InputError(f"{path} describes no network that can be built ({reason}).") from None
    own = module.state_dict()
    stored = {
        _current_name(name, own): tensor
        for name, tensor in read_weights(file).items()
        if not name.endswith("embeddings.position_ids")
    }
    _check_weights(own, stored, file)
    state = {name: tensor.to(dtype, copy=True) for name, tensor in stored.items()}
    module.load_state_dict(state, assign=True)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            owner = module.get_submodule(name.rpartition(".")[0])
            positions = torch.arange(buffer.shape[-1])[None]
            owner.register_buffer("position_ids", positions, persistent=False)
    return module.eval()


def _current_name(name: str, own: dict[str, Tensor]) -> str:
    """Today's name of a stored tensor."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    bare = name.removeprefix(TOWER)
    return bare if bare in own else name


def _check_weights(own: dict[str, Tensor], stored: dict[str, Tensor], file: Path) -> None:
    wrong = sorted(
        name
        for name in own.keys() | stored.keys()
        if name not in own or name not in stored or own[name].shape != stored[name].shape
    )
    if wrong:
        raise InputError(
            f"{file} does not fit the config.json beside it: {len(wrong)} tensors are missing, "
            f"unknown or of another shape, {wrong[0]} among them."
        )


def save_weights(module: nn.Module, file: Path, dtype: torch.dtype) -> None:
    """Write every tensor of a network to `file` as `dtype`, under the names others expect."""
    from safetensors.torch import save_file

    prefix = TOWER if file.parent.name == "text_encoder" else ""
    state = {
        prefix + name.removeprefix(prefix): tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in module.state_dict().items()
    }
    save_file(state, file, metadata={"format": "pt"})
