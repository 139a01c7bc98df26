"""Floating-point operations: what a training step needs, and what a device can do."""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.model_files import one_line


class FlopMeter:
    """The operations of one forward and backward pass of a network, two for each multiply-add.

    Only shapes are looked at, when the network is first called: nothing is computed, no memory
    taken, no gradient left behind. Frozen weights need no gradient and count none. What gradient
    checkpointing computes twice counts once: it is no progress (Chowdhery et al. 2022, appendix
    B). Made before the network is compiled, wrapped or sharded.
    """

    def __init__(self, network: nn.Module) -> None:
        with _ClonesAreShapes():
            self._skeleton: nn.Module | None = copy.deepcopy(network).to("meta")
        self.flops: int | None = None
        """Of the first call that was watched; None before it, and where shapes do not suffice."""

    def watch(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """forward, the network as it was wrapped, which from now on is counted."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            skeleton, self._skeleton = self._skeleton, None
            if skeleton is not None:
                try:
                    self.flops = step_flops(skeleton, *args, **kwargs)
                except (RuntimeError, NotImplementedError) as error:
                    warnings.warn(f"MFU is not known: {one_line(error)}", stacklevel=2)
            return forward(*args, **kwargs)

        return watched


class _ClonesAreShapes(TorchDispatchMode):
    """A deep copy of a parameter has its shape and takes no memory."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.clone.default:
            return torch.empty_like(args[0], device="meta")
        return func(*args, **(kwargs or {}))


def step_flops(network: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Operations of one forward and backward pass of a network whose weights are shapes only.

    args, kwargs: what network is called with.
    """
    args, kwargs = _shapes_of(args), _shapes_of(kwargs)
    wanted = [value for value in network.parameters() if value.requires_grad]
    # The plain formula of attention consists of products that are counted on every device.
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
        _without_checkpointing(network),
    ):
        outputs = [value for value in _tensors(network(*args, **kwargs)) if value.requires_grad]
        if outputs and wanted:
            total = torch.stack([value.sum() for value in outputs]).sum()
            torch.autograd.grad(total, wanted, allow_unused=True)
    return counter.get_total_flops()


def _shapes_of(values: Any) -> Any:
    """The same containers with shapes instead of tensors."""
    if isinstance(values, Tensor):
        return torch.empty_like(values, device="meta", requires_grad=values.requires_grad)
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*map(_shapes_of, values))
    if isinstance(values, (tuple, list)):
        return type(values)([_shapes_of(value) for value in values])
    if isinstance(values, dict):
        return {name: _shapes_of(value) for name, value in values.items()}
    if is_dataclass(values) and not isinstance(values, type):
        parts = {field.name: getattr(values, field.name) for field in fields(values)}
        return replace(values, **_shapes_of(parts))
    return values


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in containers and in objects' attributes."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif hasattr(values, "__dict__"):
        yield from _tensors(list(vars(values).values()))


@contextmanager
def _without_checkpointing(network: nn.Module) -> Iterator[None]:
    """Diffusers, transformers and this project call the switch alike."""
    on = [module for module in network.modules() if getattr(module, "gradient_checkpointing", 0)]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]


# TFLOP/s of dense products (half precision with fp32 sums, TF32, fp32), from NVIDIA's data sheets
# and architecture white papers; where a sheet gives figures "with sparsity", half of them. The
# first pattern that the device's name holds is its own.
PEAKS: tuple[tuple[str, float, float, float], ...] = (
    (r"\bGB200", 2500, 1250, 80),
    (r"\bB200", 2250, 1125, 75),
    (r"\bH[12]00 NVL", 835.5, 417.5, 60),
    (r"\bH100 PCIe", 756, 378, 51),
    (r"\bH100|\bH200|\bGH200", 989.4, 494.7, 67),
    (r"\bA100", 312, 156, 19.5),
    (r"\bA30\b", 165, 82, 10.3),
    (r"\bA40\b", 149.7, 74.8, 37.4),
    (r"\bA10\b", 125, 62.5, 31.2),
    (r"\bL40S", 362, 183, 91.6),
    (r"\bL40\b", 181, 90.5, 90.5),
    (r"\bL4\b", 121, 60, 30.3),
    (r"RTX 6000 Ada", 364.2, 182.1, 91.1),
    (r"RTX A6000", 154.8, 77.4, 38.7),
    (r"RTX 5090", 209.5, 104.8, 104.8),
    (r"RTX 4090", 165.2, 82.6, 82.6),
    (r"RTX 3090\b", 71.2, 35.6, 35.6),
    (r"V100-SXM", 125, 15.7, 15.7),
    (r"V100", 112, 14, 14),
    (r"\bT4\b", 65, 8.1, 8.1),
)

NO_BF16 = re.compile(r"V100|\bT4\b")
"""Devices that have half precision, but no bf16, in hardware."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of dense products in dtype; None where it is not known.

    GPUs: from their name, fp32 being TF32 where torch.set_float32_matmul_precision allows it. A
    CPU: measured, by a second of products with the threads that PyTorch has.
    """
    if device.type == "cpu":
        return measured_peak(dtype)
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return named_peak(torch.cuda.get_device_name(device), dtype, tf32)


def named_peak(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """The peak of the GPU of this name, as the driver gives it; None for names not in PEAKS."""
    for pattern, half, tensor, single in PEAKS:
        if re.search(pattern, name):
            if dtype == torch.float32:
                return 1e12 * (tensor if tf32 else single)
            if dtype == torch.float16 or (dtype == torch.bfloat16 and not NO_BF16.search(name)):
                return 1e12 * half
            return None
    return None


@torch.no_grad()
def measured_peak(dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """Operations a second of the best of some products [size, size] @ [size, size] on this CPU."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
