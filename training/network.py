"""The network that training.diffusion trains: U-Net and text encoder as one function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.checkpoint import ModelParts
from latentdiff.models.text_encoder import TextEncoders


class Text(NamedTuple):
    """What a batch's latents are conditioned on."""

    ids: Tensor
    """Token ids [B, N, L] for N text encoders."""
    sizes: Tensor
    """[B, 6], pixels: original height and width, top and left of the crop, target height and width.
    Only SDXL reads them."""
    dropped: Tensor
    """[B], whether the caption was dropped; its ids are the empty caption's."""


class TextToLatents(nn.Module):
    """F(x, t, text), with the text encoder inside so that it can learn along with the U-Net.

    Parameters are named as in diffusers' pipelines: unet., text_encoder., text_encoder_2.
    """

    def __init__(self, parts: ModelParts, train_text_encoder: bool) -> None:
        super().__init__()
        self.unet = parts.unet
        for name, tower in parts.towers.items():
            setattr(self, name, tower.model)
        self.parts = (parts,)  # in a tuple: no submodule
        self.train_text_encoder = train_text_encoder
        for tower in parts.towers.values():
            tower.model.requires_grad_(train_text_encoder)
        self.train()

    def train(self, mode: bool = True) -> TextToLatents:
        """CLIP keeps to it where it is trained. What has dropout (T5, BERT, GPT-2) does not, which
        would be drawn from a global generator.
        """
        super().train(mode)
        for tower in self.parts[0].towers.values():
            tower.model.train(mode and self.train_text_encoder and tower.reads_chunks)
        return self

    def freeze_unused(self) -> None:
        """Exclude from training what of a text encoder the U-Net does not see: the layers after
        SDXL's penultimate, BERT's pooler. Gradients that never come keep processes waiting.
        """
        trained = [
            parameter
            for tower in self.parts[0].towers.values()
            for parameter in tower.model.parameters()
            if parameter.requires_grad
        ]
        if not trained:
            return
        ids = self.tokenize("")[None]
        nowhere = torch.zeros(1, 6), torch.zeros(1, dtype=torch.bool)
        hidden, pooled = self.encode(Text(ids, *nowhere))
        seen = hidden.sum() if pooled is None else hidden.sum() + pooled.sum()
        gradients = torch.autograd.grad(seen, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def checkpoint_gradients(self) -> None:
        """Keep no activations inside blocks: compute them anew in the backward pass."""
        self.unet.gradient_checkpointing = True
        if self.train_text_encoder:
            for tower in self.parts[0].towers.values():
                tower.model.gradient_checkpointing_enable({"use_reentrant": False})

    def tokenize(self, caption: str) -> Tensor:
        """Token ids [N, L] on the CPU."""
        encoder = self.parts[0].text_encoder
        ids = encoder.tokenize([caption])
        return ids[0] if isinstance(encoder, TextEncoders) else ids

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def encode(self, text: Text) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, L, D] and, of SDXL, pooled embeddings [B, P].

        Where the pipeline puts zeros for an empty prompt (SDXL base), so does training.
        """
        (parts,) = self.parts
        encoder = parts.text_encoder
        pooled: Tensor | None = None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_text_encoder):
            if isinstance(encoder, TextEncoders):
                hidden, pooled = encoder.encode_ids(text.ids)
            else:
                hidden = encoder.encode_ids(text.ids[:, 0])
        if parts.force_zeros_for_empty_prompt:
            hidden = hidden.masked_fill(text.dropped[:, None, None], 0)
            pooled = None if pooled is None else pooled.masked_fill(text.dropped[:, None], 0)
        return hidden, pooled

    def forward(self, x: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """x [B, C, h, w] scaled by c_in, timestep [B] -> the U-Net's prediction [B, C, h, w]."""
        hidden, pooled = self.encode(text)
        sizes = None if pooled is None else text.sizes.to(x)
        return self.unet(x, timestep, self.unet.condition(hidden, pooled, sizes))
