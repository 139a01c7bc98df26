"""What identifies a feature extractor: its weights, and all that pictures pass before them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def extractor_digest(network: nn.Module, preprocessing: dict[str, Any]) -> str:
    """sha256 in hexadecimal of every tensor's name, shape and values, and of plain values.

    Equal for equal weights, whatever kind of file they came from.
    """
    digest = hashlib.sha256(json.dumps(preprocessing, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
