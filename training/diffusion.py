"""Train the U-Net on latents, conditioned on text and timestep.

accelerate launch -m training.diffusion --config configs/emoji/diffusion.yaml
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from latentdiff.checkpoint import save_model
from latentdiff.config import load_config, load_yaml
from latentdiff.data.order import Plan, Share
from latentdiff.data.store import LOCAL_BYTES
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.errors import run_command
from latentdiff.metrics.evaluation import open_protocol
from latentdiff.metrics.protocol import Protocol
from latentdiff.pipeline import TextToImage
from training.assemble import PartsConfig, assemble
from training.config import StepLosses
from training.data import launched, planned_orders, prefetch
from training.distillation import Distillation, DistillationConfig, for_few_steps
from training.encoder import tensors_digest
from training.evaluation import BestConfig, Evaluations
from training.latents import Batch, CachedLatents, Latents, LiveConfig, LiveLatents
from training.loop import make_accelerator, train
from training.lora import LoRAConfig, attach, save_lora
from training.network import Text, TextToLatents
from training.objective import ObjectiveConfig
from training.parallel import Wrapped
from training.pictures import grid
from training.takedown import (
    HELD_OUT,
    RECORD,
    Removal,
    TakedownConfig,
    first_decides,
    listed_samples,
)


class DiffusionConfig(PartsConfig):
    """A run of training.diffusion."""

    cache: str | None = None
    """The latent cache, written by training.cache_latents: a directory or any fsspec URL."""
    cache_local: Path | None = None
    """Where shards of a cache at a URL are kept; ~/.cache/latentdiff by default."""
    cache_local_bytes: int = Field(default=LOCAL_BYTES, gt=0)
    """How many bytes of them; the least recently used ones go first."""
    images: LiveConfig | None = None
    """Pictures to train on straight away, encoded in every step, in place of a cache."""
    takedown: TakedownConfig | None = None
    """Pictures that others take the place of: from the start, or where the run is resumed from the
    next epoch on. What was taken down once stays out."""
    validation_cache: str | None = None
    """A cache of held-out samples, whose loss is logged; none by default."""
    validation_samples: int = Field(default=256, gt=0)
    """How many of them, in whole batches of batch_size."""
    train_text_encoder: bool = False
    """Whether the text encoder learns along with the U-Net, or its LoRA does."""
    lora: LoRAConfig | None = None
    """Train a LoRA of this shape and nothing else; everything by default."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss and what is drawn for it."""
    distillation: DistillationConfig | None = None
    """Learn to draw in a few steps from the model in init_from, in place of the objective's loss:
    of the objective only timesteps and caption_dropout are read. None by default."""
    sample_prompts: tuple[str, ...] = Field(min_length=1)
    """What the sample grids show."""
    sample_guidance_scale: float | None = Field(default=None, ge=1)
    """Guidance scale of the sample grids; by default what `generate` takes."""
    evaluation: Path | None = None
    """The protocol's YAML file, such as one of configs/protocols/, by which the averaged weights
    are measured every evaluate_every steps."""
    best: BestConfig | None = None
    """Keep the model that an evaluation found best so far, in run_dir/best; none by default."""

    @model_validator(mode="after")
    def _one_source(self) -> DiffusionConfig:
        if (self.cache is None) == (self.images is None):
            raise ValueError("name either a cache or images to train on")
        return self

    @model_validator(mode="after")
    def _distilled(self) -> DiffusionConfig:
        if self.distillation is None:
            return self
        if self.init_from is None:
            raise ValueError("distillation needs the teacher in init_from")
        if self.train_text_encoder:
            raise ValueError("distillation trains the U-Net; leave train_text_encoder out")
        for name in ("scheduler", "text_encoder"):
            if getattr(self, name) is not None:
                raise ValueError(f"distillation keeps its teacher's {name}; leave {name} out")
        read = {"timesteps", "caption_dropout"}
        if ignored := sorted(self.objective.model_dump(exclude=read, exclude_defaults=True)):
            raise ValueError(f"distillation has a loss of its own; leave {ignored[0]} out")
        return self

    @model_validator(mode="after")
    def _measured(self) -> DiffusionConfig:
        if self.evaluate_every is not None and self.evaluation is None:
            raise ValueError("evaluate_every needs a protocol in evaluation")
        if self.best is not None and self.evaluate_every is None:
            raise ValueError("best is of evaluations; set evaluate_every")
        return self


VALIDATION_SEED = 0
"""Of what is drawn for held-out samples, in every run."""

LORA_FILE = "pytorch_lora_weights.safetensors"
"""diffusers' name for it."""


class DiffusionProgram:
    """Algorithm 1 of Ho et al. (2020) on latents (Rombach et al. 2022)."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.parts = parts = assemble(config)
        self.latents: Latents
        if config.cache is not None:
            self.latents = self.open_cache(config.cache, config.seed)
        else:
            assert config.images is not None
            scanned = config.run_dir / "scan"
            self.latents = LiveLatents(config.images, parts, config.seed, scanned)
        self.held_out: Latents | None = None
        if config.validation_cache is not None:
            self.held_out = self.open_cache(config.validation_cache, VALIDATION_SEED)
            counts = self.held_out.counts
            self.held_out_plan = Plan(VALIDATION_SEED, counts, config.batch_size)
            removal = self.removal_from(self.held_out, self.held_out_plan, HELD_OUT)
            removal.begin(0, write=launched()[0] == 0)
            self.held_out.removal = removal
        self.evaluations: Evaluations | None = None
        if config.evaluate_every and config.evaluation is not None:
            protocol = load_yaml(Protocol, config.evaluation)
            open_protocol(protocol, parts)  # what is missing is missed now
            self.evaluations = Evaluations(config.run_dir, protocol, config.best, self.finish)
        self.plan = Plan(config.seed, self.latents.counts, config.batch_size)
        self.removal = self.latents.removal = self.removal_from(self.latents, self.plan, RECORD)
        self.network = TextToLatents(parts, config.train_text_encoder)
        self.distillation: Distillation | None = None
        if config.distillation is not None:
            self.distillation = Distillation(
                config.distillation, parts, self.network, config.mixed_precision, config.compile
            )
            self.parts = parts = for_few_steps(parts)
        text, base = (
            tensors_digest(network.state_dict()) for network in (parts.text_encoder, parts.unet)
        )
        if config.lora is not None:
            attach(self.network, config.lora, config.seed)
        self.network.freeze_unused()
        if config.gradient_checkpointing:
            self.network.checkpoint_gradients()
        for network in (parts.unet, parts.autoencoder):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.empty = self.network.tokenize("")
        self.inputs = {"latents": self.latents.digest, "text encoder": text}
        if config.lora is not None or config.distillation is not None:
            self.inputs["U-Net"] = base

    def open_cache(self, url: str, seed: int) -> CachedLatents:
        config = self.config
        return CachedLatents(url, self.parts, seed, config.cache_local, config.cache_local_bytes)

    def removal_from(self, latents: Latents, plan: Plan, record: str) -> Removal:
        path, takedown = self.config.run_dir / record, self.config.takedown
        return first_decides(
            lambda: Removal(plan, latents.digest, path, listed_samples(takedown, latents))
        )

    @property
    def unreadable(self) -> dict[int, str]:
        return self.latents.unreadable

    def batches(self, steps: range, share: Share) -> Generator[list[Batch], None, None]:
        """Read, and drawn for, ahead of their steps."""
        self.removal.begin(steps.start, write=share.rank == 0)
        read = self.latents.batches(planned_orders(steps, self.plan, share))
        return prefetch([self.drawn(batch) for batch in step] for step in read)

    def drawn(self, batch: Batch) -> Batch:
        """The batch with all that will be drawn for it."""
        height, width = batch.sizes[0, 4:].tolist()
        factor = self.parts.autoencoder.scale_factor
        shape = self.parts.autoencoder.latent_channels, height // factor, width // factor
        for stream, drawn in (("posterior", shape), *self.config.objective.streams(shape)):
            batch.draw(stream, drawn)
        return batch

    def losses(self, forward: Callable[..., Any], batch: Batch, device: torch.device) -> StepLosses:
        loss, position = self.loss_of(forward, batch, device, self.config.objective)
        return StepLosses(loss.mean(), {}, loss.detach(), position, batch.samples)

    def loss_of(
        self,
        forward: Callable[..., Any],
        batch: Batch,
        device: torch.device,
        objective: ObjectiveConfig,
    ) -> tuple[Tensor, Tensor]:
        """The loss of each sample and its place on the noise schedule, in [0, 1): [B] and [B]."""
        x0 = batch.x0(self.parts.autoencoder, device)
        dropped = objective.dropped(batch.draw)
        ids = torch.where(dropped[:, None, None], self.empty, batch.ids)
        text = Text(ids.to(device), batch.sizes.to(device), dropped.to(device))
        denoiser = Denoiser(forward, self.parts.schedule, self.parts.parameterization)
        if self.distillation is None:
            loss, timestep = objective.losses(denoiser, x0, batch.draw, text)
        else:
            loss, timestep = self.distillation.losses(denoiser, x0, objective, batch.draw, text)
        return loss, timestep / len(self.parts.schedule)

    def validation(
        self, forward: Callable[..., Any], device: torch.device, share: Share
    ) -> tuple[float, int] | None:
        """The loss, without weights, on held-out samples with their captions, noise and timesteps
        being the same each time: whole batches of them, validation_samples or some more.
        """
        if self.held_out is None:
            return None
        size, plain = self.config.batch_size, ObjectiveConfig(caption_dropout=0)
        plan = self.held_out_plan
        steps = range(min(plan.steps_per_epoch, -(-self.config.validation_samples // size)))
        orders = planned_orders(steps, plan, share)
        losses = [
            self.loss_of(forward, batch, device, plain)[0]
            for micro_batches in self.held_out.batches(orders)
            for batch in micro_batches
        ]
        return float(torch.cat(losses).sum()), sum(map(len, losses))

    def samples(self, device: torch.device) -> Image.Image:
        """The configured prompts, two seeds each, by the pipeline that users run."""
        prompts = list(self.config.sample_prompts)
        seeds = list(range(2 * len(prompts)))
        return grid(self.draw(prompts, seeds, device, 2), columns=12, scale=2)

    def draw(
        self, prompts: list[str], seeds: list[int], device: torch.device, each: int = 1
    ) -> list[Image.Image]:
        """`each` pictures of each prompt."""
        with self.pipeline(device) as model:
            pictures = model.generate(
                prompts,
                num_images_per_prompt=each,
                guidance_scale=self.config.sample_guidance_scale,
                seed=seeds,
            )
        assert isinstance(pictures, list)
        return pictures

    @contextmanager
    def pipeline(self, device: torch.device, name: str = "") -> Iterator[TextToImage]:
        """What users run; where a cache serves, the VAE is on the CPU before and after."""
        autoencoder = self.parts.autoencoder
        place = next(autoencoder.parameters()).device
        autoencoder.to(device)
        try:
            yield TextToImage(dataclasses.replace(self.parts, directory=None, name=name))
        finally:
            autoencoder.to(place)

    def evaluate(self, done: int, wrapped: Wrapped) -> dict[str, float]:
        """What the pictures measure by the protocol; see Evaluations."""
        assert self.evaluations is not None
        name = f"{self.config.run_dir.resolve().name}, step {done}"
        with self.pipeline(wrapped.accelerator.device, name) as model:
            return self.evaluations(done, model, wrapped)

    def finish(self, directory: Path, device: torch.device) -> None:
        """A model directory; or the LoRA, one file in diffusers' naming."""
        if self.config.lora is None:
            save_model(self.parts, directory, torch.float16)
        else:
            save_lora(directory / LORA_FILE, self.network)


def main() -> None:
    config = load_config(DiffusionConfig)
    accelerator = make_accelerator(config)
    train(DiffusionProgram(config), config, accelerator)


if __name__ == "__main__":
    run_command(main)
