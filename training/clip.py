"""Train CLIP on scenes; its text tower then conditions the U-Net.

accelerate launch -m training.clip --config configs/emoji/clip.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from latentdiff.config import Config, load_config, load_yaml
from latentdiff.data.order import Share
from latentdiff.data.scenes import EmojiScenes, Scene, ScenesConfig
from latentdiff.errors import run_command
from latentdiff.models.text_encoder import TextEncoder
from training.config import RunConfig, StepLosses, seeded
from training.data import MicroBatch, StepDataset, endless_orders, loader, to_network
from training.loop import make_accelerator, train
from training.parallel import refuse_shards
from training.pictures import grid
from training.tokenizer import train_tokenizer


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


class ClipConfig(RunConfig):
    """A run of training.clip."""

    scenes: Path
    """The scenes' YAML file."""
    workers: int = Field(default=0, ge=0)
    """Processes that draw scenes ahead."""
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


class NearMisses(StepDataset):
    """Scenes in fours: sample 4n is a scene, the three after it are near misses of it.

    One has its objects in exchanged places, or another background; in the other two an object is
    replaced by one of like colours. Without such neighbours in its batch a CLIP learns a bag of
    words (Yuksekgonul et al. 2023), and of objects hardly more than their colour.
    """

    def __init__(self, scenes: EmojiScenes, tokenizer: CLIPTokenizer) -> None:
        self.scenes, self.tokenizer = scenes, tokenizer

    def scene(self, index: int) -> Scene:
        number, variant = divmod(index, 4)
        scene = self.scenes.scene(number)
        if variant == 0:
            return scene
        if variant == 1:
            swap = scene.relation is not None and number % 2 == 0
            change = self.scenes.swapped if swap else self.scenes.recoloured
            return change(scene, index)
        return self.scenes.replaced(scene, variant % len(scene.objects), index)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = self.scene(index)
        ids = self.tokenizer(scene.caption, padding="max_length", truncation=True)["input_ids"]
        image = torch.from_numpy(self.scenes.render(scene)).permute(2, 0, 1)
        return {"image": image, "ids": torch.tensor(ids)}


class TwoTowers(nn.Module):
    """CLIPModel as a function from a batch to unit embeddings and the logit scale."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, L], images [B, 3, H, W] in [-1, 1] -> [B, P], [B, P] of norm 1, scalar."""
        output = self.clip(input_ids=ids, pixel_values=images)
        return output.text_embeds, output.image_embeds, self.clip.logit_scale.exp()


class ClipProgram:
    """The symmetric contrastive loss of Radford et al. (2021), equation of figure 3."""

    def __init__(self, config: ClipConfig) -> None:
        self.config = config
        self.scenes = EmojiScenes(load_yaml(ScenesConfig, config.scenes))
        self.inputs = {"scenes": self.scenes.digest}
        captions = (self.scenes.scene(i).caption for i in range(config.tokenizer_captions))
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
        picture = {"image_size": self.scenes.config.resolution, "patch_size": config.patch_size}
        with seeded(config.seed):
            clip = CLIPModel(
                CLIPConfig(
                    text_config=config.text.values() | tokens,
                    vision_config=config.vision.values() | picture,
                    projection_dim=config.projection_dim,
                )
            )
        return TwoTowers(clip)

    @property
    def unreadable(self) -> dict[int, str]:
        """None: scenes are drawn."""
        return {}

    def batches(self, steps: range, share: Share) -> Generator[list[MicroBatch], None, None]:
        self.loss = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=share.rank, world_size=share.processes
        )
        orders = endless_orders(steps, self.config.batch_size, share)
        return loader(NearMisses(self.scenes, self.tokenizer), orders, self.config.workers)

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

    def evaluate(self, device: torch.device, share: Share) -> dict[str, tuple[float, int]]:
        """Share of unseen captions that retrieve their own picture of 256."""
        right = self.retrieved(device)
        return {"evaluation/retrieval": (float(right.sum()), len(right))}

    def retrieved(self, device: torch.device) -> Tensor:
        """Whether each of 256 unseen captions retrieves its own picture, [256]."""
        scenes = EmojiScenes(self.scenes.config, "held_out")
        similarity = self.similarity([scenes.scene(index) for index in range(256)], scenes, device)
        return similarity.argmax(dim=1).cpu() == torch.arange(256)

    def samples(self, device: torch.device) -> Image.Image:
        """Unseen scenes above the pictures that their captions retrieve among 256."""
        scenes = EmojiScenes(self.scenes.config, "held_out")
        shown = [scenes.scene(index) for index in range(256)]
        pictures = [Image.fromarray(scenes.render(scene)) for scene in shown]
        found = self.similarity(shown, scenes, device).argmax(dim=1).tolist()
        return grid(pictures[:12] + [pictures[found[row]] for row in range(12)], 12)

    def similarity(self, shown: list[Scene], scenes: EmojiScenes, device: torch.device) -> Tensor:
        """Cosine of each caption (row) with each picture (column)."""
        ids = TextEncoder(self.tokenizer, self.network.clip.text_model).tokenize(
            [scene.caption for scene in shown]
        )
        images = torch.stack([torch.from_numpy(scenes.render(scene)) for scene in shown])
        texts, pictures, _ = self.network(
            ids.to(device), to_network(images.permute(0, 3, 1, 2), device)
        )
        return F.normalize(texts.float()) @ F.normalize(pictures.float()).T

    def finish(self, directory: Path, device: torch.device) -> None:
        """Save clip/ whole, and text_encoder/ and tokenizer/ as a pipeline wants them."""
        clip = self.network.clip
        clip.save_pretrained(directory / "clip")
        clip.text_model.save_pretrained(directory / "text_encoder")
        self.tokenizer.save_pretrained(directory / "tokenizer")
        right = self.retrieved(device).float().mean()
        print(f"unseen captions that retrieve their own picture of 256: {right:.1%}")


def main() -> None:
    refuse_shards("training.clip")
    config = load_config(ClipConfig)
    accelerator = make_accelerator(config)
    train(ClipProgram(config), config, accelerator)


if __name__ == "__main__":
    run_command(main)
