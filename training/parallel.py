"""One network over all processes: alone, replicated (DDP) or in shards (FSDP2)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from latentdiff.errors import InputError
from latentdiff.models.blocks import BasicTransformerBlock
from latentdiff.models.unet import UNet
from training.config import DTYPES

UNIT_PARAMETERS = 50_000_000
"""The most parameters that are whole at once on a device, where blocks allow it."""


class Wrapped:
    """A network as the processes share it: how to run it, and how to hand its tensors around.

    forward: the module to call; network: the one that holds the parameters, under its own names.
    """

    def __init__(
        self, network: nn.Module, forward: Callable[..., Any], accelerator: Accelerator
    ) -> None:
        self.network, self.forward, self.accelerator = network, forward, accelerator

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by name; shards of it where the network is sharded."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """What training changes: the trained parameters and the buffers, the tensors themselves."""
        return {
            name: value
            for name, value in self.network.state_dict(keep_vars=True).items()
            if value.requires_grad or not isinstance(value, nn.Parameter)
        }

    def no_sync(self) -> AbstractContextManager[None]:
        """For all micro-batches of a step but the last: gradients stay where they are.

        Shards are reduced at each micro-batch, for a whole gradient is what they have no room for.
        """
        if isinstance(self.forward, DistributedDataParallel):
            return self.forward.no_sync()
        return nullcontext()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients down to the global norm max_norm; return the norm before, [].

        It is the norm of the gradient over all parameters, whole wherever they are in shards.
        """
        norm = nn.utils.clip_grad_norm_(self.trained.values(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def without_gradient(self) -> list[str]:
        """The trained tensors whose gradient is nothing but zeros; every process calls it."""

        def size(gradient: Tensor) -> Tensor:
            norm = torch.linalg.vector_norm(gradient)
            return norm.full_tensor() if isinstance(norm, DTensor) else norm

        return [
            name
            for name, value in self.trained.items()
            if value.grad is None or size(value.grad) == 0
        ]

    def gathered(
        self, tensors: Mapping[str, Tensor], into: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Whole, contiguous copies on the CPU of the main process; the others get {}.

        Called by every process with the same names. One tensor at a time is whole on a device.
        Copies go into the tensors of `into` where they fit, so that a second call allocates
        nothing; what it keeps besides is dropped.
        """
        copies: dict[str, Tensor] = {}
        for name, value in tensors.items():
            whole = value.detach()
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            if self.accelerator.is_main_process:
                copies[name] = _copy(whole, (into or {}).get(name))
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        if into is not None:
            into.clear()
            into.update(copies)
        return copies

    @torch.no_grad()
    def scatter_(self, tensors: Mapping[str, Tensor], values: Callable[[str], Tensor]) -> None:
        """The inverse of gathered: fill every process's tensors, whole or in shards.

        values: a whole tensor by its name; only the main process calls it, once for each name.
        """
        device, several = self.accelerator.device, self.accelerator.num_processes > 1
        for name, target in tensors.items():
            if self.accelerator.is_main_process:
                whole = values(name).to(target.dtype)
            else:
                whole = torch.empty(target.shape, dtype=target.dtype)
            if isinstance(target, DTensor):
                target.copy_(
                    distribute_tensor(whole.to(device), target.device_mesh, target.placements)
                )
                continue
            if several:
                whole = whole.to(device).contiguous()
                dist.broadcast(whole, src=0)
            target.copy_(whole)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block the network's state_dict is whole on the CPU of the main process.

        For saving a model: a sharded network must not be run inside. Every process enters.
        """
        sharded = [
            (module, name, parameter)
            for module in self.network.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if isinstance(parameter, DTensor)
        ]
        # fully_shard made subclasses, whose names would get into the model's files.
        kinds = {
            module: type(module)
            for module in self.network.modules()
            if isinstance(module, FSDPModule)
        }
        try:
            for unit, kind in kinds.items():
                unit.__class__ = kind.__mro__[2]  # type: ignore[assignment]
            for module, name, parameter in sharded:
                full = self.gathered({name: parameter}).get(name)
                if full is not None:
                    module.register_parameter(name, nn.Parameter(full, parameter.requires_grad))
            yield
        finally:
            for unit, kind in kinds.items():
                unit.__class__ = kind  # type: ignore[assignment]
            for module, name, parameter in sharded:
                module.register_parameter(name, parameter)

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside the block every process has the whole network on its device and may run it, or
        not, without the others. Every process enters.

        For measuring: nothing may be moved, saved or trained inside.
        """
        units = [unit for unit in self.network.modules() if isinstance(unit, FSDPModule)]
        try:
            for unit in units:
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()


T = TypeVar("T")


def agreed(accelerator: Accelerator, value: T) -> T:
    """The main process's value, on every process."""
    if accelerator.num_processes == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=accelerator.device)
    return values[0]


def leave(accelerator: Accelerator) -> None:
    """End the processes' work together; every process calls it last, and trackers end here too.

    A gloo thread lets go of the last collective's tensors under Python's lock. While a process
    waits for the others that lock is free; without the wait the process group's end would wait for
    the thread with the lock in its hands, or Python's end would abort the process.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()


def means(accelerator: Accelerator, sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """(sum, count) over each process's share -> means over all of them, on every process."""
    totals = torch.tensor(list(sums.values()), dtype=torch.float64).reshape(-1, 2)
    totals = accelerator.reduce(totals.float().to(accelerator.device), "sum")
    return {name: float(total[0] / total[1]) for name, total in zip(sums, totals, strict=True)}


def _copy(value: Tensor, into: Tensor | None) -> Tensor:
    """A contiguous copy on the CPU, page-locked if it comes from an accelerator."""
    if into is None or (into.shape, into.dtype) != (value.shape, value.dtype):
        pinned = value.device.type != "cpu"
        into = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pinned)
    return into.copy_(value, non_blocking=True)


def parallelize(
    network: nn.Module,
    accelerator: Accelerator,
    mixed_precision: str,
    unit_parameters: int = UNIT_PARAMETERS,
) -> Wrapped:
    """The network on this process's device, as the launcher says: alone, DDP or FSDP2.

    FSDP2 (Zhao et al. 2023) changes the network in place: make the optimizer and the EMA after it.
    Every process must come with the same weights.

    mixed_precision: no, bf16 or fp16; weights, gradients and what comes out are fp32.
    unit_parameters: shards are put together for blocks of at most so many parameters at a time.

    Raises InputError for version 1 of FSDP.
    """
    if not (dist.is_initialized() and _flag("ACCELERATE_USE_FSDP")):
        return Wrapped(network, accelerator.prepare(network), accelerator)
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError(
            "The launcher asks for FSDP 1; say fsdp_version: 2 in accelerate's config."
        )
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    dtype = DTYPES[mixed_precision]
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    # Outside of forward nothing casts for them.
    alone = MixedPrecisionPolicy(dtype, torch.float32)
    # Keys and values are views of what to_k and to_v give; nothing changes them in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPLinear\) returned a view")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for modules in _called_alone(network):
        fully_shard(modules, mesh=mesh, mp_policy=alone)
    for unit in (*_units(network, unit_parameters), *_called_whole(network)):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    # Shards again after forward, or they would still be whole when weights are averaged or saved.
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # Now, for UNet.condition may come before the first forward.
    fully_shard.state(network)._lazy_init()  # type: ignore[attr-defined]
    if dtype != torch.float32:
        for unit in network.modules():
            if unit is network or isinstance(unit, UNet):  # pictures are drawn by the U-Net alone
                unit.forward = autocast(unit.forward, accelerator)  # type: ignore[method-assign]
    return Wrapped(network, network, accelerator)


def autocast(forward: Callable[..., Any], accelerator: Accelerator) -> Callable[..., Any]:
    """A forward that computes in mixed precision, and returns fp32."""

    def cast(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    return convert_outputs_to_fp32(cast)  # type: ignore[no-any-return]


def refuse_shards(program: str) -> None:
    """Raises InputError when the launcher asks for FSDP and `program` is made for replicas."""
    if _flag("ACCELERATE_USE_FSDP"):
        raise InputError(
            f"{program} trains small networks and does not shard them; launch it without FSDP, as "
            "configs/accelerate/multi_gpu.yaml does."
        )


def local(values: Tensor) -> Tensor:
    """What is here of a sharded tensor, or the tensor, sharing its memory."""
    values = values.detach()
    return values.to_local() if isinstance(values, DTensor) else values


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")


def _called_alone(network: nn.Module) -> Iterator[list[nn.Module]]:
    """What UNet.condition calls, before and outside of the forward pass of the block it is in."""
    for module in network.modules():
        if isinstance(module, BasicTransformerBlock):
            yield [module.attn2.to_k, module.attn2.to_v]
        if isinstance(module, UNet):
            for name in ("add_embedding", "time_embedding.cond_proj"):
                owner, _, last = name.rpartition(".")
                if hasattr(module.get_submodule(owner), last):
                    yield [module.get_submodule(name)]


def _called_whole(network: nn.Module) -> Iterator[nn.Module]:
    """The network's children, which samples are drawn with: U-Net and text encoders."""
    for child in network.children():
        if isinstance(child, UNet | PreTrainedModel):
            yield child


def _units(module: nn.Module, largest: int) -> Iterator[nn.Module]:
    """The outermost members of module lists that have at most `largest` parameters.

    A network calls each member of a list in its turn, so that its parameters can come and go.
    """
    for child in module.children():
        size = sum(parameter.numel() for parameter in child.parameters())
        if isinstance(module, nn.ModuleList) and 0 < size <= largest:
            yield child
        else:
            yield from _units(child, largest)
