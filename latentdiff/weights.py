"""Networks from named tensors and back, without random initialization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.errors import InputError
from latentdiff.model_files import one_line

M = TypeVar("M", bound=nn.Module)

RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""The VAE's attention in files made before diffusers 0.12."""
TOWER = "text_model."
"""What CLIPTextModel's names begin with in every published file, and not in transformers 5."""
BUFFERS = (".position_ids", ".token_type_ids", ".attn.bias", ".attn.masked_bias")
"""Constants that older files store."""
COUNTS = ("layers_per_block", "num_hidden_layers", "num_layers", "n_layer")


def load_module(
    build: Callable[[dict[str, Any]], M],
    config: dict[str, Any],
    config_path: Path,
    tensors: Mapping[str, Tensor],
    file: Path,
    dtype: torch.dtype,
) -> M:
    """The network `build(config)` in evaluation mode, every tensor from `tensors`, as `dtype`.

    The paths are where config and tensors come from. Raises InputError naming them when the config
    describes no network, or the tensors do not fit it.
    """
    module = _built(build, config, config_path, len(tensors))
    own, twins = module.state_dict(), shared_names(module)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = _current_name(name, own)
        if name in own or not name.endswith(BUFFERS):
            stored.setdefault(twins.get(name, name), tensor)
    for twin in twins:
        own.pop(twin)
    _check_weights(own, stored, file, config_path)
    state = {name: tensor.to(dtype, copy=True) for name, tensor in stored.items()}
    module.load_state_dict(state, strict=False, assign=True)
    for twin, name in twins.items():
        owner, _, attribute = twin.rpartition(".")
        setattr(module.get_submodule(owner), attribute, module.get_parameter(name))
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            owner, _, attribute = name.rpartition(".")
            constant = _constant(attribute, buffer.shape, config_path)
            module.get_submodule(owner).register_buffer(attribute, constant, persistent=False)
    return module.eval()


def _built(
    build: Callable[[dict[str, Any]], M], config: dict[str, Any], path: Path, tensors: int
) -> M:
    """On the meta device: shapes alone."""
    counts = [config.get(key) for key in COUNTS]
    depth = config.get("transformer_layers_per_block")
    counts += depth if isinstance(depth, list) else [depth]
    if any(isinstance(count, int) and count > tensors for count in counts):
        raise InputError(f"{path} describes more layers than there are tensors.")
    try:
        with torch.device("meta"):
            return build(config)
    except InputError as error:
        raise InputError(f"{path} is not supported: {one_line(error)}") from None
    except Exception as error:  # third-party constructors raise whatever they stumble on
        reason = one_line(error)
        raise InputError(f"{path} describes no network that can be built ({reason}).") from None


def shared_names(module: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several (T5's embeddings), each with its first."""
    first: dict[int, str] = {}
    twins = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            twins[name] = first[id(parameter)]
    return twins


def _constant(name: str, shape: torch.Size, path: Path) -> Tensor:
    """A buffer that transformers computes and does not store."""
    if name == "position_ids":
        return torch.arange(shape[-1])[None]
    if name == "token_type_ids":
        return torch.zeros(shape, dtype=torch.int64)
    raise InputError(f"{path} describes a network with a buffer {name}, which is not supported.")


def _current_name(name: str, own: Mapping[str, Tensor]) -> str:
    """Today's name of a stored tensor."""
    if name in own:
        return name
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    bare = name.removeprefix(TOWER)
    return bare if bare in own else name


def _check_weights(
    own: Mapping[str, Tensor], stored: Mapping[str, Tensor], file: Path, config_path: Path
) -> None:
    wrong = sorted(
        name
        for name in own.keys() | stored.keys()
        if name not in own or name not in stored or own[name].shape != stored[name].shape
    )
    if wrong:
        beside = "its model's structure" if config_path == file else config_path
        raise InputError(
            f"{file} does not fit {beside}: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, {wrong[0]} among them."
        )


def stored_tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a network as `dtype` on the CPU, under the names that files have."""
    prefix = TOWER if type(module).__name__ == "CLIPTextModel" else ""
    twins = shared_names(module)
    return {
        prefix + name.removeprefix(prefix): tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in module.state_dict().items()
        if name not in twins
    }


def save_weights(module: nn.Module, file: Path, dtype: torch.dtype) -> None:
    """Write every tensor of a network to `file` as `dtype`, under the names others expect."""
    from safetensors.torch import save_file

    save_file(stored_tensors(module, dtype), file, metadata={"format": "pt"})
