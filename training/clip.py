"""Train CLIP on scenes or on pictures; its text tower then conditions the U-Net.

accelerate launch -m training.clip --config configs/emoji/clip.yaml
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from latentdiff.config import Config, load_config
from latentdiff.data.held_out import HeldOut
from latentdiff.data.order import Share
from latentdiff.errors import run_command
from latentdiff.models.text_encoder import TextEncoder
from training.config import StepLosses, seeded
from training.data import MicroBatch, to_network
from training.file_pictures import PicturesRunConfig
from training.loop import make_accelerator, train
from training.pairs import FilePairs, Pairs, ScenePairs
from training.parallel import Wrapped, refuse_shards
from training.pictures import grid
from training.tokenizer import train_tokenizer

HELD_OUT = 256
"""Pairs among which unseen captions must find their own pictures."""


class TowerConfig(Config):
    """The size of one of CLIP's two transformers."""

    hidden_size: int = Field(gt=0)
    """Width."""
    layers: int = Field(gt=0)
    """Depth."""
    heads: int = Field(gt=0)
    """Attention heads; divides the width."""

    def values(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": 4 * self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "hidden_act": "gelu",
        }


class ClipConfig(PicturesRunConfig):
    """A run of training.clip."""

    vocabulary_size: int = Field(gt=514)
    """Tokens at most: 512 for single bytes, two that begin and end a text, the rest merges."""
    tokenizer_captions: int = Field(default=20_000, gt=0)
    """Captions that the tokenizer learns its merges from."""
    max_length: int = Field(gt=2)
    """Tokens of a text, begin and end included."""
    text: TowerConfig
    """The text tower; its width is the U-Net's cross_attention_dim."""
    vision: TowerConfig
    """The picture tower."""
    patch_size: int = Field(gt=0)
    """Side of the picture tower's patches in pixels."""
    projection_dim: int = Field(gt=0)
    """Width of the common space."""

    @model_validator(mode="after")
    def _at_once(self) -> ClipConfig:
        if self.micro_batch_size is not None:
            raise ValueError(
                "micro_batch_size would cut a contrastive batch, whose samples are one another's "
                "negatives; leave it out"
            )
        return self


class TwoTowers(nn.Module):
    """CLIPModel as a function from a batch to unit embeddings and the logit scale."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, L], images [B, 3, H, W] in [-1, 1] -> [B, P], [B, P] of norm 1, scalar."""
        output = self.clip(input_ids=ids, pixel_values=images)
        return output.text_embeds, output.image_embeds, self.clip.logit_scale.exp()


def open_pairs(config: ClipConfig) -> Pairs:
    """Raises InputError when there is no such data."""
    if config.scenes is not None:
        return ScenePairs(config.scenes)
    assert config.pictures is not None
    return FilePairs(config.pictures, config.seed)


class ClipProgram:
    """The symmetric contrastive loss of Radford et al. (2021), equation of figure 3."""

    def __init__(self, config: ClipConfig) -> None:
        self.config = config
        self.pairs = open_pairs(config)
        self.inputs = self.pairs.inputs
        captions = self.pairs.captions(config.tokenizer_captions)
        self.tokenizer = train_tokenizer(captions, config.vocabulary_size, config.max_length)
        self.network = self._build()

    def _build(self) -> TwoTowers:
        config, tokenizer = self.config, self.tokenizer
        tokens = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": config.max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        picture = {"image_size": self.pairs.resolution, "patch_size": config.patch_size}
        with seeded(config.seed):
            clip = CLIPModel(
                CLIPConfig(
                    text_config=config.text.values() | tokens,
                    vision_config=config.vision.values() | picture,
                    projection_dim=config.projection_dim,
                )
            )
        return TwoTowers(clip)

    @functools.cached_property
    def held_out(self) -> HeldOut:
        return self.pairs.held_out(HELD_OUT)

    @property
    def unreadable(self) -> dict[int, str]:
        return self.pairs.unreadable

    def batches(self, steps: range, share: Share) -> Generator[list[MicroBatch], None, None]:
        self.loss = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=share.rank, world_size=share.processes
        )
        config = self.config
        return self.pairs.batches(steps, config.batch_size, share, self.tokenizer, config.workers)

    def losses(
        self, forward: Callable[..., Any], batch: MicroBatch, device: torch.device
    ) -> StepLosses:
        images = to_network(batch.data["image"], device)
        texts, pictures, scale = forward(batch.data["ids"].to(device), images)
        loss = self.loss(pictures.float(), texts.float(), scale.float())
        right = (pictures @ texts.T).argmax(dim=1) == torch.arange(len(texts), device=device)
        return StepLosses(loss, {"accuracy": right.float().mean(), "scale": scale.detach()})

    def validation(
        self, forward: Callable[..., Any], device: torch.device, share: Share
    ) -> tuple[float, int] | None:
        """None: what it retrieves among unseen scenes is measured instead."""
        return None

    def evaluate(self, done: int, wrapped: Wrapped) -> dict[str, float]:
        """Share of unseen captions that retrieve their own picture."""
        right = self.retrieved(wrapped.accelerator.device)
        return {"evaluation/retrieval": float(right.float().mean())}

    def retrieved(self, device: torch.device) -> Tensor:
        """Whether each of the unseen captions retrieves its own picture, [N]."""
        similarity = self.similarity(self.held_out, device)
        return similarity.argmax(dim=1).cpu() == torch.arange(len(similarity))

    def samples(self, device: torch.device) -> Image.Image:
        """Unseen pictures above those that their captions retrieve among all of them."""
        found = self.similarity(self.held_out, device).argmax(dim=1)[:12].cpu()
        images = self.held_out.images.permute(0, 2, 3, 1).numpy()
        shown = [Image.fromarray(image) for image in images[:12]]
        return grid([*shown, *(Image.fromarray(images[row]) for row in found)], len(shown))

    def similarity(self, pairs: HeldOut, device: torch.device) -> Tensor:
        """Cosine of each caption (row) with each picture (column)."""
        ids = TextEncoder(self.tokenizer, self.network.clip.text_model).tokenize(pairs.captions)
        texts, pictures, _ = self.network(ids.to(device), to_network(pairs.images, device))
        return F.normalize(texts.float()) @ F.normalize(pictures.float()).T

    def finish(self, directory: Path, device: torch.device) -> None:
        """Save clip/ whole, and text_encoder/ and tokenizer/ as a pipeline wants them."""
        clip = self.network.clip
        clip.save_pretrained(directory / "clip")
        clip.text_model.save_pretrained(directory / "text_encoder")
        self.tokenizer.save_pretrained(directory / "tokenizer")
        right = self.retrieved(device)
        share = f"{right.float().mean():.1%}"
        print(f"unseen captions that retrieve their own picture of {len(right)}: {share}")


def main() -> None:
    refuse_shards("training.clip")
    config = load_config(ClipConfig)
    accelerator = make_accelerator(config)
    train(ClipProgram(config), config, accelerator)


if __name__ == "__main__":
    run_command(main)
