"""What a model's pictures measure over guidance, steps and samplers, on one page.

accelerate launch -m inference.report --config configs/emoji/report.yaml

Every combination of settings is an evaluation of its own in run_dir/evaluations, by the function
that inference.evaluate runs: any number of processes share the work, and the same command continues
after a kill. After each of them report.json and index.html tell of all that are finished; the page
opens without a server, and moves together with its directory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from inference.evaluate import DTYPES, EvaluateConfig, Place
from inference.measured import SETTINGS
from inference.report_page import write_report_page
from latentdiff.config import Config, load_config
from latentdiff.errors import InputError, run_command
from latentdiff.hub import BUNDLED
from latentdiff.metrics.evaluation import evaluate_protocol
from latentdiff.metrics.feature_files import PIECE
from latentdiff.metrics.prompts import Prompts, open_prompts
from latentdiff.metrics.protocol import Protocol, refuse_unlike
from latentdiff.model_files import staged_file, write_json
from latentdiff.pipeline import TextToImage
from latentdiff.request import check_sampler

SHOWN = 24
"""Prompts whose pictures are on the page."""


class Sweep(Config):
    """Every combination of these; the protocol's own value where there is none."""

    sampler: tuple[str, ...] = ()
    """Names of samplers."""
    num_inference_steps: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Steps of the sampler."""
    guidance_scale: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Scales of classifier-free guidance."""
    seed: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Picture i is drawn with seed + i."""


class ReportConfig(Config):
    """A run of inference.report."""

    run_dir: Path
    """index.html, report.json and the evaluations go here."""
    protocol: Path
    """The protocol's YAML file, which must leave free what is swept."""
    sweeps: tuple[Sweep, ...] = Field(min_length=1)
    """What is evaluated: all combinations of each; what two of them share is done once."""
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")], str] = Field(
        default={"bundled": BUNDLED}, min_length=1
    )
    """What to draw with, by names of your own: directories, .safetensors files, names on the hub,
    "emoji" for the bundled one."""
    prompts: int | None = Field(default=None, gt=0)
    """In the place of the protocol's count; it is part of the id."""
    device: str = "cpu"
    """Where the networks run: "cpu", "cuda", "cuda:1"."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the models' weights."""
    batch_size: int = Field(default=8, gt=0, le=PIECE)
    """Pictures drawn together; none depends on it."""
    reference_dir: Path | None = None
    """Where features of real pictures are kept, for other evaluations too; run_dir/real by
    default."""

    def protocols(self) -> list[Protocol]:
        """The protocol at each of the settings, in the order of the sweeps, none twice.

        Raises InputError where it does not leave them free, or there is no such sampler.
        """
        fixed = self._at({})
        found: dict[tuple[Any, ...], Protocol] = {}
        for sweep in self.sweeps:
            given = {name: getattr(sweep, name) for name in SETTINGS if getattr(sweep, name)}
            for name in given:
                if name not in fixed.free:
                    free = ", ".join(fixed.free) or "nothing"
                    raise InputError(
                        f"{self.protocol} leaves {free} free and not {name}; name it in `free`, "
                        "which makes another protocol with an id of its own, or do not sweep it."
                    )
            for sampler in given.get("sampler", ()):
                check_sampler(sampler)
            own = [given.get(name, (getattr(fixed, name),)) for name in SETTINGS]
            for values in itertools.product(*own):
                found.setdefault(values, self._at(dict(zip(SETTINGS, values, strict=True))))
        return list(found.values())

    def _at(self, settings: Mapping[str, Any]) -> Protocol:
        evaluation = EvaluateConfig(
            run_dir=self.run_dir, protocol=self.protocol, prompts=self.prompts, **settings
        )
        return evaluation.effective()


def settings_of(protocol: Protocol) -> dict[str, Any]:
    """What a sweep may vary."""
    return {name: getattr(protocol, name) for name in SETTINGS}


def place_of(model: str, protocol: Protocol) -> str:
    """The directory of an evaluation in run_dir."""
    sampler, steps, guidance, seed = settings_of(protocol).values()
    return f"evaluations/{model}/{sampler}-{steps}-steps-guidance-{guidance}-seed-{seed}"


def evaluations(config: ReportConfig, protocols: Sequence[Protocol]) -> Iterator[dict[str, Any]]:
    """Every evaluation's place, settings, results and prompts, as soon as it is finished.

    Nothing on all processes but the first, which draw their share. Raises InputError as
    evaluate_protocol, and where the figures of two models do not compare.
    """
    place = Place.launched(config.device)
    for name, path in config.models.items():
        model = TextToImage.load(path, DTYPES[config.dtype], place.device)
        for protocol in protocols:
            directory = place_of(name, protocol)
            results = evaluate_protocol(
                model,
                protocol,
                config.run_dir / directory,
                place=place,
                reference_dir=config.reference_dir or config.run_dir / "real",
                batch_size=config.batch_size,
            )
            if results is not None:
                yield {
                    "model": name,
                    "directory": directory,
                    "settings": settings_of(protocol),
                    "results": results,
                    "prompts": open_prompts(
                        protocol.prompts, protocol.count, model.parts.vocabulary
                    ),
                }


def report(config: ReportConfig) -> Path | None:
    """The page of all evaluations; see the module's text. None on all processes but the first."""
    protocols = config.protocols()
    planned = len(config.models) * len(protocols)
    told: dict[str, Any] = {}
    page = None
    for point in evaluations(config, protocols):
        results, prompts = point["results"], point.pop("prompts")
        if not told:
            first = results
            told = {name: results[name] for name in ("protocol", "id", "fixed", "pictures")}
            told |= {"planned": planned, "points": [], "prompts": shown(prompts)}
        refuse_unlike(first, results)
        point["results"] = {name: v for name, v in results.items() if name != "fixed"}
        told["points"].append(point)
        with staged_file(config.run_dir / "report.json") as path:
            write_json(told, path)
        page = write_report_page(config.run_dir, told)
    return page


def shown(prompts: Prompts) -> list[dict[str, Any]]:
    """The number and text of the first prompts of each kind or category, SHOWN together at most."""
    groups = list(prompts.groups.values()) or [range(len(prompts.texts))]
    each = max(1, SHOWN // len(groups))
    numbers = [number for group in groups for number in group[:each]]
    return [{"number": number, "text": prompts.texts[number]} for number in numbers]


def main() -> None:
    if (page := report(load_config(ReportConfig))) is not None:
        print(page)


if __name__ == "__main__":
    run_command(main)
