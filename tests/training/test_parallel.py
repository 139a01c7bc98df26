"""Alone, replicated and in shards: the same training, and checkpoints that fit all of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from latentdiff.errors import InputError
from latentdiff.models.unet import UNet, UNetConfig
from training.adafactor import Adafactor
from training.checkpoints import Checkpointer, load
from training.ema import EMA
from training.parallel import Wrapped, parallelize

UNET = UNetConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention_dim=12,
    norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=2,
)
BATCH, MICRO_BATCHES = 8, 2
FILES = ("network.safetensors", "ema.safetensors", "optimizer.safetensors")
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "adafactor": lambda parameters: Adafactor(parameters, lr=1e-2),
}


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps that bf16 does not hold, and text."""
    random = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 4, 8, 8, generator=random)
    timestep = 1000 * torch.rand(BATCH, generator=random)
    return x, timestep, torch.randn(BATCH, 5, 12, generator=random)


def steps(
    wrapped: Wrapped, ema: EMA, optimizer: torch.optim.Optimizer, numbers: range
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each optimizer step, over two micro-batches."""
    accelerator, figures = wrapped.accelerator, []
    for step in numbers:
        mine = [v[accelerator.process_index :: accelerator.num_processes] for v in batch(step)]
        total = torch.zeros([])
        for number, (x, timestep, text) in enumerate(
            zip(*(values.chunk(MICRO_BATCHES) for values in mine), strict=True)
        ):
            # As SDXL's loss does: the condition before the network's own forward pass.
            cond = wrapped.network.condition(text) if step % 2 else text
            with wrapped.no_sync() if number == 0 else torch.enable_grad():
                loss = (wrapped.forward(x, timestep, cond) - x).square().mean() / MICRO_BATCHES
                accelerator.backward(loss)
            total += loss.detach()
        norm = wrapped.clip_grad_norm(0.5)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step + 1)
        figures.append((float(accelerator.reduce(total, "mean")), float(norm)))
    return figures


def run(
    folder: Path, resume: Path | None, numbers: range, optimizer_name: str, precision: str
) -> None:
    """Resume, save again at once, train with a save halfway, draw, save, write what was seen."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet(UNET)
    network.conv_in.bias.requires_grad_(False)
    wrapped = parallelize(network, accelerator, precision, unit_parameters=3000)
    ema = EMA(network, (0.9, 0.5))
    optimizer = OPTIMIZERS[optimizer_name](wrapped.trained.values())
    checkpointer = Checkpointer(folder, 9, accelerator)
    if resume is not None:
        state = load(resume, wrapped, ema, optimizer, None)
        assert state == {"step": numbers.start, "seed": 5}
        checkpointer.save(numbers.start, wrapped, ema, optimizer, None, {"seed": 5})
    half = numbers[len(numbers) // 2]
    figures = steps(wrapped, ema, optimizer, range(numbers.start, half))
    checkpointer.save(half, wrapped, ema, optimizer, None, {"seed": 5})
    figures += steps(wrapped, ema, optimizer, range(half, numbers.stop))
    x, timestep, text = batch(99)
    with ema.weights_in(1), torch.no_grad():
        drawn = network(x, timestep, network.condition(text))
    checkpointer.save(numbers.stop, wrapped, ema, optimizer, None, {"seed": 5})
    checkpointer.wait()
    assert checkpointer.latest() == folder / f"step-{numbers.stop:06d}"
    with wrapped.whole():
        whole = {name: value.detach() for name, value in network.state_dict().items()}
        if accelerator.is_main_process:
            save_file({n: v.contiguous() for n, v in whole.items()}, folder / "whole.safetensors")
    parameters = list(network.parameters())
    if accelerator.is_main_process:
        save_file({"drawn": drawn}, folder / "drawn.safetensors")
        seen = {
            "figures": figures,
            "sharded": [isinstance(parameter, DTensor) for parameter in parameters],
            "dtypes": sorted({str(parameter.dtype) for parameter in parameters}),
            "units": sum(type(module).__name__.startswith("FSDP") for module in network.modules()),
        }
        (folder / "seen.json").write_text(json.dumps(seen))


def process(rank: int, environment: dict[str, str], arguments: tuple[Any, ...]) -> None:
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        run(*arguments)
    except InputError as error:
        (arguments[0] / f"refused-{rank}").write_text(str(error))
        raise SystemExit(2) from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def _imported_once() -> None:
    multiprocessing.set_forkserver_preload(["training.checkpoints", "latentdiff.models.unet"])


def launch(
    folder: Path,
    processes: int = 1,
    sharded: bool = False,
    resume: Path | None = None,
    numbers: range = range(4),
    optimizer: str = "adamw",
    precision: str = "no",
    status: int = 0,
) -> Path:
    """Processes as a launcher starts them; the checkpoint that they end with.

    status: how all of them exit.
    """
    folder.mkdir()
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": str(processes)}
    if sharded:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    arguments = (folder, resume, numbers, optimizer, precision)
    if processes == 1:
        target, several = run_alone, [(environment, arguments)]
    else:
        target, several = process, [(rank, environment, arguments) for rank in range(processes)]
    context = multiprocessing.get_context("forkserver")
    children = [context.Process(target=target, args=values) for values in several]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
        assert child.exitcode == status
    return folder / f"step-{numbers.stop:06d}"


def run_alone(environment: dict[str, str], arguments: tuple[Any, ...]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    run(*arguments)


WAYS = {"ddp": {"processes": 2}, "fsdp": {"processes": 2, "sharded": True}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    return launch(root / "alone")


@pytest.fixture(scope="module", params=list(WAYS))
def together(request: pytest.FixtureRequest, root: Path) -> Path:
    return launch(root / request.param, **WAYS[request.param])


def seen(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint.parent / "seen.json").read_text())


def assert_close(one: Path, other: Path) -> None:
    """Everything in two checkpoints: Adam enlarges rounding where a gradient is nearly zero."""
    for name in FILES:
        mine, theirs = load_file(one / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], atol=2e-4, rtol=1e-3, msg=key)


def assert_same(one: Path, other: Path) -> None:
    for name in (*FILES, "state.json", "manifest.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_together_they_train_as_one_does(alone: Path, together: Path) -> None:
    figures, expected = seen(together)["figures"], seen(alone)["figures"]
    torch.testing.assert_close(torch.tensor(figures), torch.tensor(expected), rtol=1e-5, atol=0)
    assert_close(together, alone)
    drawn = [load_file(path.parent / "drawn.safetensors")["drawn"] for path in (together, alone)]
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-4)


def test_only_shards_are_kept_and_there_are_several_units(alone: Path, together: Path) -> None:
    sharded = together.parent.name == "fsdp"
    found = seen(together)
    assert set(found["sharded"]) == {sharded}
    assert found["dtypes"] == ["torch.float32"]
    assert found["units"] > 10 if sharded else found["units"] == 0


def test_a_checkpoint_holds_what_is_trained_under_its_own_names(together: Path) -> None:
    network = UNet(UNET)
    names = {name for name, _ in network.named_parameters()} - {"conv_in.bias"}
    assert set(load_file(together / FILES[0])) == names
    assert set(load_file(together / FILES[1])) == {f"{d}/{n}" for d in (0.9, 0.5) for n in names}
    whole = load_file(together.parent / "whole.safetensors")
    network.load_state_dict(whole)
    for name, value in load_file(together / FILES[0]).items():
        assert value.equal(whole[name]), name


def test_one_process_goes_on_with_what_several_made_and_they_with_its(
    root: Path, alone: Path, together: Path
) -> None:
    """What is loaded and saved again is the same file to the byte."""
    way = together.parent.name
    halves = [path.with_name("step-000002") for path in (together, alone)]
    on = launch(root / f"{way}-alone", resume=halves[0], numbers=range(2, 4))
    back = launch(root / f"alone-{way}", resume=halves[1], numbers=range(2, 4), **WAYS[way])
    for half, end in zip(halves, (on, back), strict=True):
        assert_close(end, alone)
        assert_same(half, end.parent / half.name)


def test_an_optimizer_whose_state_has_other_shapes_comes_back(root: Path) -> None:
    """Adafactor (Shazeer & Stern 2018) keeps rows and columns of its second moments."""
    whole = launch(root / "ada", optimizer="adafactor")
    half = whole.with_name("step-000002")
    options = {"optimizer": "adafactor", "numbers": range(2, 4), "resume": half}
    on = launch(root / "ada-1", **options)
    both = launch(root / "ada-2", **options, **WAYS["ddp"])
    assert_same(on, whole)
    assert_close(both, whole)
    assert_same(half, both.parent / half.name)
    assert any(key.endswith("/row") for key in load_file(whole / FILES[2]))


def test_a_damaged_checkpoint_ends_all_processes_though_only_one_reads_it(
    root: Path, alone: Path
) -> None:
    damaged = root / "damaged" / "step-000002"
    shutil.copytree(alone.with_name("step-000002"), damaged)
    (damaged / "ema.safetensors").write_bytes(b"")
    launch(root / "refused", resume=damaged, numbers=range(2, 4), status=2, **WAYS["fsdp"])
    for rank in range(2):
        sentence = (root / "refused" / f"refused-{rank}").read_text()
        assert f"ema.safetensors is damaged; delete {damaged} to continue" in sentence


def test_in_half_precision_timesteps_stay_whole_and_weights_single(root: Path, alone: Path) -> None:
    options = {"precision": "bf16", "numbers": range(2)}
    half, shards = launch(root / "bf16", **options), launch(root / "16", **options, **WAYS["fsdp"])
    assert seen(shards)["dtypes"] == ["torch.float32"]
    losses = [seen(path)["figures"][0][0] for path in (shards, half, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0] == pytest.approx(losses[2], rel=2e-2)


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="say fsdp_version: 2"):
        parallelize(torch.nn.Linear(2, 2), Accelerator(cpu=True), "no")
