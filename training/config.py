"""What every training program is configured by, and what it hands to the loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import torch
from PIL import Image
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor, nn

from latentdiff.config import Config
from latentdiff.data.order import Share
from training.optimizers import OptimizerConfig

if TYPE_CHECKING:
    from training.parallel import Wrapped

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What mixed_precision computes in."""

Precision = Annotated[
    Literal["no", "bf16", "fp16"],
    BeforeValidator(lambda value: "no" if value is False else value),  # YAML reads no as false
]


class RunConfig(Config):
    """What every training program has."""

    run_dir: Path
    """Logs, samples, checkpoints and the finished model go here; running again continues it."""
    seed: int = Field(ge=0)
    """Initial weights, order and noise are functions of it."""
    max_steps: int = Field(gt=0)
    """Optimizer steps in all, counted over all resumes."""
    batch_size: int = Field(gt=0)
    """Samples per optimizer step over all processes."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Samples per process and forward pass; gradients accumulate until batch_size is reached. All
    of a process's share at once by default."""
    checkpoint_every: int = Field(gt=0)
    """Steps between checkpoints."""
    checkpoints_kept: int = Field(default=2, gt=0)
    """How many of the newest checkpoints stay on the disk."""
    sample_every: int = Field(gt=0)
    """Steps between sample grids, drawn from the averaged weights."""
    validate_every: int | None = Field(default=None, gt=0)
    """Steps between losses on held-out data, where there are any; by default as samples."""
    evaluate_every: int | None = Field(default=None, gt=0)
    """Steps between evaluations of the averaged weights; none by default."""
    log_every: int = Field(default=20, gt=0)
    """Steps between lines in the log; figures are means over the steps between."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where figures go besides metrics.jsonl: names of accelerate's trackers."""
    max_unreadable: int = Field(default=1000, ge=0)
    """Unreadable samples above which a run stops; others take the place of fewer."""
    mixed_precision: Precision = "no"
    """Arithmetic of the network; weights stay fp32."""
    compile: bool = False
    """Compile the network (torch.compile): slower start, faster steps."""
    ema_decays: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        default=(0.999,), min_length=1
    )
    """Decays of the averaged weights; samples and the finished model come from the first."""
    optimizer: OptimizerConfig
    """The optimizer and its learning rate."""

    @field_validator("ema_decays")
    @classmethod
    def _once(cls, decays: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(decays)) < len(decays):
            raise ValueError("each decay once")
        return decays

    @property
    def validation_interval(self) -> int:
        return self.validate_every or self.sample_every


@dataclass(frozen=True)
class StepLosses:
    """What one forward pass of a program gives the loop."""

    loss: Tensor
    """The mean over the micro-batch, [], to descend."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Further means to log, [], by name."""
    per_sample: Tensor | None = None
    """The loss of each sample [B], where it is one for each."""
    position: Tensor | None = None
    """Where on the noise schedule each sample lies, [B] in [0, 1)."""
    samples: Sequence[int] = ()
    """Their numbers in the data set."""


class Program(Protocol):
    """What a training program hands to the loop.

    samples and validation run on every process with the same number of calls of the network, so
    that a sharded one can run them.
    """

    @property
    def network(self) -> nn.Module:
        """What requires grad in it is trained."""

    @property
    def inputs(self) -> dict[str, str]:
        """What it learns from, by name: digests that a resumed run must find again."""

    @property
    def unreadable(self) -> dict[int, str]:
        """Samples that this process could not read so far, with the reasons."""

    def batches(self, steps: range, share: Share) -> Generator[list[Any], None, None]:
        """For each step, this process's micro-batches."""

    def losses(self, forward: Callable[..., Any], batch: Any, device: torch.device) -> StepLosses:
        """The losses of one micro-batch; forward is the network as the loop wrapped it."""

    def validation(
        self, forward: Callable[..., Any], device: torch.device, share: Share
    ) -> tuple[float, int] | None:
        """Sum of losses and number of samples over this process's share of held-out data, whose
        noise is the same each time; None without such data.
        """

    def samples(self, device: torch.device) -> Image.Image:
        """A picture of what the network can do; called with the averaged weights in it."""

    def evaluate(self, done: int, wrapped: Wrapped) -> dict[str, float]:
        """Figures after `done` steps, called evaluation/..., the same on every process, all of
        which call it, with the averaged weights in the network.
        """

    def finish(self, directory: Path, device: torch.device) -> None:
        """Write the finished model; called once with the averaged weights in the network."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights drawn inside the block are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
