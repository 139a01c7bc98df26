"""Evaluations of what a run's averaged weights draw, and the best of its models."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from latentdiff.config import Config
from latentdiff.errors import InputError
from latentdiff.metrics.evaluation import Place, evaluate_protocol, main_figures
from latentdiff.metrics.protocol import Protocol
from latentdiff.model_files import read_json, restore_directory, staged_directory, write_json
from latentdiff.pipeline import TextToImage
from training.encoder import tensors_digest
from training.parallel import Wrapped, agreed

BEST = "best.json"
"""In the best model's directory: which it is."""


class BestConfig(Config):
    """Which of the evaluated models is kept besides the last one."""

    figure: str = Field(min_length=1)
    """What decides, by its dotted name in evaluation.json: two_held_out.objects_in_place or
    features.clip.frechet; those in metrics.jsonl as evaluation/... can."""
    lower: bool = False
    """Whether less of it is better, as of a distance."""


class Evaluations:
    """Evaluations by one protocol, in run_dir/evaluations, and the best model, in run_dir/best.

    finish: writes a model into an empty directory; only the main process calls it.
    """

    def __init__(
        self,
        run_dir: Path,
        protocol: Protocol,
        best: BestConfig | None,
        finish: Callable[[Path, torch.device], None],
    ) -> None:
        self.folder, self.best_dir = run_dir / "evaluations", run_dir / "best"
        self.protocol, self.best, self.finish = protocol, best, finish

    def __call__(self, step: int, model: TextToImage, wrapped: Wrapped) -> dict[str, float]:
        """evaluation/... for main_figures of the model, whose network is `wrapped`; the same on
        every process, all of which call it and draw their share.

        What is left of an evaluation of the same weights is continued, one of others is removed.
        Raises InputError as evaluate_protocol, and where best.figure is none of the figures.
        """
        accelerator, folder = wrapped.accelerator, self.folder / f"step-{step:06d}"
        weights = weights_digest(model, wrapped)
        if accelerator.is_local_main_process:  # other machines may have disks of their own
            remove_unlike(folder, weights)
        accelerator.wait_for_everyone()
        with wrapped.everywhere():
            results = evaluate_protocol(
                model,
                self.protocol,
                folder,
                place=Place(
                    accelerator.process_index, accelerator.num_processes, str(accelerator.device)
                ),
                reference_dir=self.folder / "real",
                weights=weights,
            )
        results = agreed(accelerator, results)
        assert results is not None
        if self.best is not None:
            self.keep_best(self.best, step, results, wrapped)
        return {f"evaluation/{name}": value for name, value in main_figures(results).items()}

    def keep_best(
        self, best: BestConfig, step: int, results: dict[str, Any], wrapped: Wrapped
    ) -> None:
        """Write the model, if none before it by the same protocol was as good."""
        figures = main_figures(results)
        if best.figure not in figures:
            raise InputError(
                f"best.figure, {best.figure}, is none of {', '.join(figures)}; name one of them."
            )
        value = figures[best.figure]
        described = {"figure": best.figure, "lower": best.lower, "id": results["id"]}
        accelerator, better = wrapped.accelerator, False
        if accelerator.is_main_process:
            restore_directory(self.best_dir)
            path = self.best_dir / BEST
            known = read_json(path) if path.is_file() else {}
            comparable = all(known.get(name) == told for name, told in described.items())
            sign = -1 if best.lower else 1
            better = not comparable or sign * value > sign * known["value"]
        if not agreed(accelerator, better):
            return
        with wrapped.whole():
            if accelerator.is_main_process:
                with staged_directory(self.best_dir, BEST) as staged:
                    self.finish(staged, accelerator.device)
                    write_json(described | {"step": step, "value": value}, staged / BEST)
        accelerator.wait_for_everyone()


def weights_digest(model: TextToImage, wrapped: Wrapped) -> str:
    """sha256 of what the model's pictures are a function of, the same on every process, all of
    which call it; one tensor at a time is whole.
    """
    parts, total = model.parts, hashlib.sha256()
    tensors = {f"network.{name}": value for name, value in wrapped.network.state_dict().items()}
    tensors |= {f"vae.{name}": value for name, value in parts.autoencoder.state_dict().items()}
    for name, value in sorted(tensors.items()):
        total.update(tensors_digest(wrapped.gathered({name: value})).encode())
    total.update(parts.scheduler_config.model_dump_json().encode())
    return agreed(wrapped.accelerator, total.hexdigest())


def remove_unlike(folder: Path, weights: str) -> None:
    """Remove an evaluation of other weights: those of a run that was taken up again before it."""
    known = folder / "drawn" / "identity.json"
    with contextlib.suppress(FileNotFoundError):  # another process is faster
        if known.is_file() and read_json(known)["model"]["sha256"] != weights:
            folder.rename(folder.with_name(f".{folder.name}.{uuid.uuid4().hex}"))
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
