"""Adafactor against transformers' with a given learning rate, whole and in shards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.optimization import Adafactor as TheirAdafactor

from training.adafactor import Adafactor

ROOT = Path(__file__).parents[2]


def gradients(shape: tuple[int, ...], steps: int = 6) -> list[Tensor]:
    """Of many sizes, so that updates are clipped in some steps; one of them zero."""
    generator = torch.Generator().manual_seed(4)
    sizes = [1.0, 0.1, 20.0, 0.0, 1e-4, 3.0][:steps]
    return [size * torch.randn(shape, generator=generator) for size in sizes]


def start(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(7, 5), (6,), (4, 3, 3, 3), (1, 4)])
def test_it_is_transformers_with_a_given_rate(shape: tuple[int, ...], decay: float) -> None:
    """A kernel is the matrix of its filters."""
    mine = start(shape)
    theirs = nn.Parameter(mine.detach().flatten(1) if mine.ndim > 1 else mine.detach().clone())
    ours = Adafactor([mine], lr=0.01, weight_decay=decay)
    oracle = TheirAdafactor(
        [theirs], lr=0.01, scale_parameter=False, relative_step=False, weight_decay=decay
    )
    for number, gradient in enumerate(gradients(shape)):
        mine.grad, theirs.grad = gradient, gradient.reshape(theirs.shape).clone()
        for optimizer in (ours, oracle):
            optimizer.param_groups[0]["lr"] = 0.01 / (number + 1)
            optimizer.step()
        assert_close(mine.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-6)


def test_memory_formats_do_not_matter() -> None:
    plain, last = start((4, 3, 3, 3)), start((4, 3, 3, 3))
    last.data = last.data.contiguous(memory_format=torch.channels_last)
    for parameter in (plain, last):
        optimizer = Adafactor([parameter], lr=0.01)
        for gradient in gradients((4, 3, 3, 3)):
            parameter.grad = gradient.clone(memory_format=torch.preserve_format)
            optimizer.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close(last, plain, rtol=1e-6, atol=1e-7)


def test_its_state_is_rows_and_columns_and_continues_bit_for_bit() -> None:
    mine = start((7, 5, 3, 3))
    optimizer = Adafactor([mine], lr=0.01)
    steps = gradients((7, 5, 3, 3))
    for gradient in steps[:3]:
        mine.grad = gradient
        optimizer.step()
    state = optimizer.state[mine]
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "step": (),
        "row": (7,),
        "column": (45,),
    }
    other = nn.Parameter(mine.detach().clone())
    resumed = Adafactor([other], lr=0.01)
    copy = {0: {name: value.clone() for name, value in state.items()}}
    resumed.load_state_dict(resumed.state_dict() | {"state": copy})
    for gradient in steps[3:]:
        mine.grad = gradient
        other.grad = gradient.clone()
        optimizer.step()
        resumed.step()
    assert other.equal(mine)


SHARDED = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from training.adafactor import Adafactor

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
given, made = load_file(folder / "given.safetensors"), {}
for name in ("matrix", "kernel", "bias"):
    shared = lambda values: distribute_tensor(values, mesh, [Shard(0)])
    parameter = torch.nn.Parameter(shared(given[name]))
    optimizer = Adafactor([parameter], lr=0.01, weight_decay=0.1)
    for number in range(3):
        parameter.grad = shared(given[f"{name}.{number}"])
        optimizer.step()
    made[name] = parameter.detach().full_tensor().contiguous()
    for key, value in optimizer.state[parameter].items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        made[f"{name}.{key}"] = value.contiguous()
if rank == 1:
    save_file(made, folder / "made.safetensors")
dist.barrier()  # gloo's threads let go of the last tensors while Python waits, not while it ends
dist.destroy_process_group()
"""


def test_shards_take_the_steps_of_the_whole(tmp_path: Path) -> None:
    """Two processes, rows that do not divide evenly between them."""
    shapes = {"matrix": (7, 5), "kernel": (5, 3, 3, 3), "bias": (6,)}
    given, expected = {}, {}
    for name, shape in shapes.items():
        parameter = start(shape)
        given[name] = parameter.detach().clone()
        optimizer = Adafactor([parameter], lr=0.01, weight_decay=0.1)
        for number, gradient in enumerate(gradients(shape, 3)):
            given[f"{name}.{number}"] = gradient
            parameter.grad = gradient
            optimizer.step()
        expected[name] = parameter.detach()
        expected |= {f"{name}.{key}": v for key, v in optimizer.state[parameter].items()}
    save_file(given, tmp_path / "given.safetensors")
    processes = [
        subprocess.Popen([sys.executable, "-c", SHARDED, str(rank), str(tmp_path)], cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    made = load_file(tmp_path / "made.safetensors")
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(made[name], value, rtol=1e-5, atol=1e-6)
