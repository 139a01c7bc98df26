"""What a model's pictures measure, by a protocol.

accelerate launch -m inference.evaluate --config configs/emoji/evaluate.yaml

Every process draws its share, writes rows of numbers into run_dir/drawn, and never waits; killed
anywhere, the same command continues. Figures are functions of the rows alone, so that they are the
same on any number of processes. The first process writes evaluation.json, prints it as one line,
and leaves a sheet of the first pictures of each kind with their prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import get_int_from_env
from pydantic import Field

from latentdiff.config import Config, load_config, load_yaml, parse
from latentdiff.drawing import BATCH
from latentdiff.errors import run_command
from latentdiff.metrics import evaluation
from latentdiff.metrics.evaluation import evaluate_protocol
from latentdiff.metrics.feature_files import PIECE
from latentdiff.metrics.protocol import Protocol
from latentdiff.pipeline import TextToImage
from latentdiff.threads import warn_of_idle_cores

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EvaluateConfig(Config):
    """A run of inference.evaluate."""

    run_dir: Path
    """evaluation.json, the sheets, and what a killed run continues from go here."""
    protocol: Path
    """The protocol's YAML file, such as one of configs/protocols/."""
    model: str | None = None
    """A model directory, a .safetensors file or a name on the hub; the bundled model by default."""
    prompts: int | None = Field(default=None, gt=0)
    """In the place of the protocol's count; it, too, is part of the id, and so are the next ones
    unless the protocol leaves them free."""
    seed: int | None = Field(default=None, ge=0)
    """In the place of the protocol's."""
    num_inference_steps: int | None = Field(default=None, gt=0)
    """In the place of the protocol's."""
    guidance_scale: float | None = Field(default=None, ge=0)
    """In the place of the protocol's."""
    sampler: str | None = None
    """In the place of the protocol's."""
    device: str = "cpu"
    """Where the networks run: "cpu", "cuda", "cuda:1". Processes that were launched together take
    a GPU each of "cuda"."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the model's weights."""
    batch_size: int = Field(default=BATCH, gt=0, le=PIECE)
    """Pictures drawn together; none depends on it."""
    keep_pictures: bool = False
    """Whether to keep all pictures in run_dir/pictures, not only those on the sheets."""
    reference_dir: Path | None = None
    """Where features of real pictures are kept, for other evaluations too; run_dir/real by
    default."""

    def effective(self) -> Protocol:
        """The protocol with what stands in the place of its own values."""
        protocol = load_yaml(Protocol, self.protocol)
        given = {
            "count": self.prompts,
            "seed": self.seed,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        return parse(Protocol, protocol.model_dump() | changes, str(self.protocol))


class Place(evaluation.Place):
    """As a launcher says it."""

    @classmethod
    def launched(cls, device: str) -> Place:
        """As accelerate's launcher or MPI says; the processes do not meet."""
        warn_of_idle_cores(device)
        if device == "cuda":
            names = ["LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK"]
            device = f"cuda:{get_int_from_env(names, 0)}"
        rank = get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"], 0)
        processes = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"], 1)
        return cls(rank, processes, device)


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """All figures; see evaluate_protocol."""
    protocol, place = config.effective(), Place.launched(config.device)
    model = TextToImage.load(config.model, DTYPES[config.dtype], place.device)
    return evaluate_protocol(
        model,
        protocol,
        config.run_dir,
        place=place,
        reference_dir=config.reference_dir,
        batch_size=config.batch_size,
        keep_pictures=config.keep_pictures,
    )


def main() -> None:
    if (results := evaluate(load_config(EvaluateConfig))) is not None:
        print(json.dumps(results))


if __name__ == "__main__":
    run_command(main)
