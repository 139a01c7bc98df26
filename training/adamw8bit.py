"""bitsandbytes' AdamW with moments of 8 bits (Dettmers et al. 2022), for our checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit as TheirAdamW8bit
from torch import Tensor


class AdamW8bit(TheirAdamW8bit):
    """Its state dict is flat, as PyTorch's are, and what it reads back may be tensors only.

    Its kernels walk weights and moments in the order of memory, so parameters are made contiguous
    before the moments take their form.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data.contiguous()

    def state_dict(self) -> dict[str, Any]:
        return torch.optim.Optimizer.state_dict(self)

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        self.state[p]["step"] = int(self.state[p]["step"])
        super().update_step(group, p, gindex, pindex)
