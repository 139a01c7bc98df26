"""What a model's pictures measure, by a protocol: for programs that evaluate, and inside training.

Every process draws its share, writes rows of numbers into run_dir/drawn, and never waits; killed
anywhere, the same call continues. Figures are functions of the rows alone, so that they are the
same on any number of processes. Where processes see no common run_dir, those of each file system
make all the rows themselves: the figures are the same, and only the work is not shared.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from latentdiff.checkpoint import ModelParts
from latentdiff.drawing import BATCH
from latentdiff.errors import InputError
from latentdiff.hub import BUNDLED
from latentdiff.metrics.feature_files import PIECE, FeatureFiles
from latentdiff.metrics.features import Extractor, open_extractor
from latentdiff.metrics.figures import figures
from latentdiff.metrics.identity import digest_of
from latentdiff.metrics.pages import write_neighbours, write_sheets
from latentdiff.metrics.prompts import Prompts, open_prompts
from latentdiff.metrics.protocol import EDITION, Protocol, fixed, protocol_id
from latentdiff.metrics.references import Reference, open_reference, open_training
from latentdiff.metrics.rows import DrawnRows, Features, RealRows, picture_file
from latentdiff.model_files import read_json, staged_file
from latentdiff.pipeline import TextToImage
from latentdiff.recipe import model_hash
from latentdiff.request import read_settings
from latentdiff.vocabulary import UnknownWordWarning


@dataclass(frozen=True)
class Place:
    """Which of the processes that evaluate together this is, and where its networks run."""

    rank: int = 0
    processes: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Opened:
    """A protocol for one model, with all that it names."""

    protocol: Protocol
    """Its height and width are those that the model draws at."""
    prompts: Prompts
    extractors: Sequence[Extractor]
    features: Features
    real: Mapping[str, Reference]
    """"reference" and "training", where the protocol has them."""

    @property
    def digests(self) -> dict[str, Any]:
        """What figures depend on beside the protocol's own values."""
        return {
            "prompts": self.prompts.digest,
            "features": {extractor.name: extractor.digest for extractor in self.extractors},
            **{name: pictures.digest for name, pictures in self.real.items()},
        }


def open_protocol(
    protocol: Protocol, parts: ModelParts, device: str = "cpu", batch_size: int = BATCH
) -> Opened:
    """Raises InputError for what is not there or does not fit the model."""
    asked = read_settings(
        parts,
        from_image=False,
        height=protocol.height,
        width=protocol.width,
        num_inference_steps=protocol.num_inference_steps,
        guidance_scale=protocol.guidance_scale,
        sampler=protocol.sampler,
    )
    protocol = protocol.model_copy(update={"height": asked.height, "width": asked.width})
    prompts = open_prompts(protocol.prompts, protocol.count, parts.vocabulary)
    extractors = [open_extractor(config, device) for config in protocol.features]
    real = {}
    if protocol.reference is not None:
        real["reference"] = open_reference(protocol.reference, prompts)
    if protocol.training is not None:
        real["training"] = open_training(protocol.training, prompts)
    features = Features(protocol, extractors, batch_size)
    return Opened(protocol, prompts, extractors, features, real)


def evaluate_protocol(
    model: TextToImage,
    protocol: Protocol,
    run_dir: Path,
    *,
    place: Place = Place(),
    reference_dir: Path | None = None,
    batch_size: int = BATCH,
    keep_pictures: bool = False,
    weights: str | None = None,
) -> dict[str, Any] | None:
    """All figures of a model, as plain values that are in run_dir/evaluation.json too.

    To be called by every process with its place; what is finished is not done again, so that a
    second call only reads. weights: a digest of the model's, where they are not those of the files
    that it was read from. Returns None on all processes but the first. Raises InputError, before
    anything is drawn, for what is not there or does not fit, and where run_dir holds another
    evaluation's rows.
    """
    opened = open_protocol(protocol, model.parts, place.device, batch_size)
    protocol, prompts, features = opened.protocol, opened.prompts, opened.features
    digests = opened.digests
    drawing = DrawnRows(model, protocol, prompts, features, run_dir / "pictures", keep_pictures)
    everything = fixed(protocol.model_copy(update={"free": ()}), digests)
    identity = {"protocol": everything, "model": model_facts(model, weights)}
    drawn_files = FeatureFiles(run_dir / "drawn", len(prompts.texts), drawing.widths, identity)
    refuse_lost_pictures(drawn_files, drawing)
    real_files = {
        name: real_feature_files(reference_dir or run_dir / "real", pictures, features, digests)
        for name, pictures in opened.real.items()
    }
    for name, files in real_files.items():
        fill(files, RealRows(opened.real[name], features), place, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownWordWarning)  # the protocol's words are as they are
        fill(drawn_files, drawing, place, protocol.name)
    if place.rank > 0:
        return None
    values = fixed(protocol, digests)
    told = {
        "model": model_name(model),
        "weights": identity["model"],
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
    }
    known = run_dir / "evaluation.json"
    if known.is_file() and told.items() <= (results := read_json(known)).items():
        return results
    rows = drawn_files.finish()
    real_rows = {name: files.finish() for name, files in real_files.items()}
    groups = {name: pictures.groups for name, pictures in opened.real.items()}
    results = told | figures(prompts, opened.extractors, rows, real_rows, groups)
    write_sheets(run_dir, drawing)
    if "training" in opened.real:
        write_neighbours(run_dir, drawing, opened.real["training"], rows, real_rows["training"])
    with staged_file(known) as path:
        path.write_text(json.dumps(results, allow_nan=False) + "\n", encoding="utf-8")
    return results


def main_figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Of an evaluation's results those that make a curve while a U-Net learns, by dotted names:
    two_held_out.objects_in_place, features.clip.frechet.

    Single numbers of all pictures or of a kind of scenes. Left out are settings, intervals, points,
    figures by_group, and what is the VAE's or the recogniser's.
    """
    found = dict[str, float]()
    for group, values in results.items():
        if isinstance(values, Mapping) and not group.endswith(("fixed", "intervals", "by_group")):
            own = {n: v for n, v in values.items() if isinstance(v, float) and n not in CONSTANT}
            inner = own | main_figures(values)
            found |= {f"{group}.{name}": value for name, value in inner.items()}
    return found


CONSTANT = ("real_renders", "vae_reconstructions")
"""Of scenes, what does not depend on the U-Net."""


def real_feature_files(
    folder: Path, pictures: Reference, features: Features, digests: dict[str, Any]
) -> FeatureFiles:
    """Where the rows of real pictures are, in a directory named after what they depend on."""
    identity = {
        "edition": EDITION,
        "pictures": pictures.digest,
        "features": digests["features"],
        "shape": list(features.shape),
        "resize": features.resize,
        "widths": features.widths,
    }
    return FeatureFiles(folder / digest_of(identity)[:16], len(pictures), features.widths, identity)


def refuse_lost_pictures(files: FeatureFiles, drawing: DrawnRows) -> None:
    """Raises InputError where rows are kept of pictures that should be kept, too, and are not."""
    missing = set(files.missing())
    numbers = range(files.count) if drawing.keep_all else drawing.shown
    for number in numbers:
        path = picture_file(drawing.folder, number)
        if number // PIECE not in missing and not path.is_file():
            raise InputError(
                f"{path} is missing, but what it measured is kept; choose another run_dir."
            )


def fill(files: FeatureFiles, rows: DrawnRows | RealRows, place: Place, title: str) -> None:
    """Make the rows that are missing, with a bar on the first process."""
    with tqdm(desc=title, total=files.count, unit="picture", disable=place.rank > 0) as bar:
        files.fill(rows, place.rank, place.processes, lambda done: bar.update(done - bar.n))


def model_facts(model: TextToImage, weights: str | None) -> dict[str, Any]:
    """What pictures depend on beside the protocol."""
    parts = model.parts
    if weights is None and parts.directory is not None:
        weights = model_hash(parts.directory)
    return {
        "sha256": weights,
        "vae": None if parts.other_vae is None else model_hash(parts.other_vae),
        "loras": dict(model.adapters.weights),
        "dtype": str(next(parts.unet.parameters()).dtype),
    }


def model_name(model: TextToImage) -> str:
    """What reports call it, without the folders that it lies in."""
    name = model.parts.name
    if name == BUNDLED:
        return "bundled"
    path = Path(name).expanduser()
    if not path.exists():
        return name
    whole = path.resolve()  # a run's finished model lies in run_dir/model
    return whole.parent.name if whole.name == "model" else whole.name
