"""What a model's pictures measure, by a protocol.

accelerate launch -m inference.evaluate --config configs/emoji/evaluate.yaml

Every process draws its share, writes rows of numbers into run_dir/drawn, and never waits; killed
anywhere, the same command continues. Figures are functions of the rows alone, so that they are the
same on any number of processes. The first process writes evaluation.json, prints it as one line,
and leaves a sheet of the first pictures of each kind with their prompts.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import get_int_from_env
from pydantic import Field
from tqdm.auto import tqdm

from inference.pages import write_neighbours, write_sheets
from inference.rows import DrawnRows, Features, RealRows
from latentdiff.config import Config, load_config, load_yaml, parse
from latentdiff.errors import run_command
from latentdiff.hub import BUNDLED
from latentdiff.metrics.feature_files import PIECE, FeatureFiles
from latentdiff.metrics.features import open_extractor
from latentdiff.metrics.figures import figures
from latentdiff.metrics.identity import digest_of
from latentdiff.metrics.prompts import open_prompts
from latentdiff.metrics.protocol import Protocol, fixed, protocol_id
from latentdiff.metrics.references import Reference, open_reference, open_training
from latentdiff.model_files import staged_file
from latentdiff.pipeline import TextToImage
from latentdiff.recipe import model_hash
from latentdiff.request import read_settings
from latentdiff.vocabulary import UnknownWordWarning

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
    batch_size: int = Field(default=8, gt=0, le=PIECE)
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


@dataclass(frozen=True)
class Place:
    """Which of the processes that were launched together this is, and where its networks run."""

    rank: int = 0
    processes: int = 1
    device: str = "cpu"

    @classmethod
    def launched(cls, device: str) -> Place:
        """As accelerate's launcher or MPI says; the processes do not meet."""
        if device == "cuda":
            names = ["LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK"]
            device = f"cuda:{get_int_from_env(names, 0)}"
        rank = get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"], 0)
        processes = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"], 1)
        return cls(rank, processes, device)


def evaluate_protocol(
    model: TextToImage,
    protocol: Protocol,
    run_dir: Path,
    *,
    place: Place = Place(),
    reference_dir: Path | None = None,
    batch_size: int = 8,
    keep_pictures: bool = False,
) -> dict[str, Any] | None:
    """All figures of a model, as plain values that are in run_dir/evaluation.json too.

    To be called by every process with its place; what is finished is not done again, so that a
    second call only reads. Returns None on all processes but the first. Raises InputError, before
    anything is drawn, for what is not there or does not fit, and where run_dir holds another
    evaluation's rows.
    """
    asked = read_settings(
        model.parts,
        from_image=False,
        height=protocol.height,
        width=protocol.width,
        num_inference_steps=protocol.num_inference_steps,
        guidance_scale=protocol.guidance_scale,
        sampler=protocol.sampler,
    )
    protocol = protocol.model_copy(update={"height": asked.height, "width": asked.width})
    prompts = open_prompts(protocol.prompts, protocol.count, model.parts.vocabulary)
    extractors = [open_extractor(config, place.device) for config in protocol.features]
    features = Features(protocol, extractors, batch_size)
    real = {}
    if protocol.reference is not None:
        real["reference"] = open_reference(protocol.reference, prompts)
    if protocol.training is not None:
        real["training"] = open_training(protocol.training, prompts)
    digests = {
        "prompts": prompts.digest,
        "features": {extractor.name: extractor.digest for extractor in extractors},
        **{name: pictures.digest for name, pictures in real.items()},
    }
    drawing = DrawnRows(model, protocol, prompts, features, run_dir / "pictures", keep_pictures)
    everything = fixed(protocol.model_copy(update={"free": ()}), digests)
    identity = {"protocol": everything, "model": model_facts(model)}
    drawn_files = FeatureFiles(run_dir / "drawn", len(prompts.texts), drawing.widths, identity)
    real_files = {
        name: real_feature_files(reference_dir or run_dir / "real", pictures, features, digests)
        for name, pictures in real.items()
    }
    for name, files in real_files.items():
        fill(files, RealRows(real[name], features), place, name)
    fill(drawn_files, drawing, place, protocol.name)
    if place.rank > 0:
        return None
    values = fixed(protocol, digests)
    rows = drawn_files.finish()
    real_rows = {name: files.finish() for name, files in real_files.items()}
    groups = {name: pictures.groups for name, pictures in real.items()}
    results = {
        "model": model_name(model),
        "device": place.device,
        "seed": protocol.seed,
        "prompts": protocol.count or len(prompts.texts),
        "num_inference_steps": protocol.num_inference_steps,
        "guidance_scale": protocol.guidance_scale,
        "sampler": protocol.sampler,
        "protocol": protocol.name,
        "id": protocol_id(values),
        "fixed": values,
        "pictures": len(prompts.texts),
        **figures(prompts, extractors, rows, real_rows, groups),
    }
    write_sheets(run_dir, drawing)
    if "training" in real:
        write_neighbours(run_dir, drawing, real["training"], rows, real_rows["training"])
    with staged_file(run_dir / "evaluation.json") as path:
        path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    return results


def real_feature_files(
    folder: Path, pictures: Reference, features: Features, digests: dict[str, Any]
) -> FeatureFiles:
    """Where the rows of real pictures are, in a directory named after what they depend on."""
    identity = {
        "pictures": pictures.digest,
        "features": digests["features"],
        "shape": list(features.shape),
        "resize": features.resize,
        "widths": features.widths,
    }
    return FeatureFiles(folder / digest_of(identity)[:16], len(pictures), features.widths, identity)


def fill(files: FeatureFiles, rows: DrawnRows | RealRows, place: Place, title: str) -> None:
    """Make the rows that are missing, with a bar on the first process."""
    with tqdm(desc=title, total=files.count, unit="picture", disable=place.rank > 0) as bar:
        files.fill(rows, place.rank, place.processes, lambda done: bar.update(done - bar.n))


def model_facts(model: TextToImage) -> dict[str, Any]:
    """What pictures depend on beside the protocol."""
    parts = model.parts
    return {
        "sha256": None if parts.directory is None else model_hash(parts.directory),
        "vae": None if parts.other_vae is None else model_hash(parts.other_vae),
        "loras": dict(model.adapters.weights),
        "dtype": str(next(parts.unet.parameters()).dtype),
    }


def model_name(model: TextToImage) -> str:
    """What reports call it, without the folders that it lies in."""
    name = model.parts.name
    if name == BUNDLED:
        return "bundled"
    return Path(name).name if Path(name).expanduser().exists() else name


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """All figures; see evaluate_protocol."""
    protocol, place = config.effective(), Place.launched(config.device)
    model = TextToImage.load(config.model, DTYPES[config.dtype], place.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownWordWarning)
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
