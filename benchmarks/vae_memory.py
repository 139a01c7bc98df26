"""The memory that Stable Diffusion's VAE needs for one picture, whole and in strips.

    python -m benchmarks.vae_memory [--side 1024] [--tile 4] [--dtype float32|float16]
    python -m benchmarks.vae_memory --run [--side 256]

Prints one JSON object: the most MiB of tensors that are alive at once beside the weights, for
decode and encode. By default nothing is computed: PyTorch's fake tensors go through the same code,
so the figures hold for every machine and a side of 2048 takes a second. `--run` computes with
random weights instead, each case in a process of its own, and adds the process's peak of resident
memory above what it had with the model loaded, and the seconds it took.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.generate import machine
from latentdiff.models.autoencoder import Autoencoder

MIB = 1 << 20
WORK = ("decode", "encode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=1024, help="of the picture, in pixels")
    parser.add_argument("--tile", type=int, default=4, help="rows of latents in a strip")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--run", action="store_true", help="compute, instead of counting alone")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        work, _, tile = arguments.case.partition(":")
        print(json.dumps(measure(work, int(tile) or None, arguments)))
        return
    results: dict[str, Any] = {"machine": machine(), "torch": torch.__version__}
    results |= {name: str(value) for name, value in vars(arguments).items() if name != "case"}
    for work in WORK:
        whole, strips = (case(work, tile, arguments) for tile in (0, arguments.tile))
        results[work] = {"whole": whole, f"tile={arguments.tile}": strips}
    print(json.dumps(results, indent=2))


def case(work: str, tile: int, arguments: argparse.Namespace) -> dict[str, float]:
    if not arguments.run:
        return measure(work, tile or None, arguments)
    command = [sys.executable, "-m", "benchmarks.vae_memory", *sys.argv[1:]]
    command += ["--case", f"{work}:{tile}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(work: str, tile: int | None, arguments: argparse.Namespace) -> dict[str, float]:
    with torch.no_grad(), nullcontext() if arguments.run else FakeTensorMode():
        autoencoder = stable_diffusion(getattr(torch, arguments.dtype))
        side = arguments.side
        shape = (1, 4, side // 8, side // 8) if work == "decode" else (1, 3, side, side)
        x = torch.randn(shape)
        function: Callable[..., object] = getattr(autoencoder, work)
        before, started = resident(), time.perf_counter()
        with Alive() as alive:
            function(x, tile=tile)
        results = {"tensors_mib": round(alive.peak / MIB)}
        if arguments.run:
            results["resident_mib"] = round((resident() - before) / MIB)
            results["seconds"] = round(time.perf_counter() - started, 1)
    return results


def stable_diffusion(dtype: torch.dtype) -> Autoencoder:
    """The VAE of Stable Diffusion 1.x, 2.x and XL with random weights."""
    torch.set_default_dtype(dtype)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        force_upcast=False,
    )
    torch.set_default_dtype(torch.float32)
    return Autoencoder(vae.eval().requires_grad_(False))


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def resident() -> int:
    """The process's peak of resident memory so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
