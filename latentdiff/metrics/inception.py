"""FID's features: the last pooling of the Inception network of 2015 (Heusel et al. 2017).

Its weights are those that the first FID was computed with, in the PyTorch port of pytorch-fid,
torch-fidelity and torchmetrics; other Inceptions, torchvision's among them, give other figures.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from latentdiff.config import Config
from latentdiff.errors import InputError
from latentdiff.metrics.digest import extractor_digest
from latentdiff.model_files import file_digest, one_line, read_weights

SIDE = 299
DIMENSIONS = 2048
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""The one file under the names that pytorch-fid and torch-fidelity publish it by."""
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILES[1]}"
VARIABLE = "LATENTDIFF_INCEPTION"


class InceptionConfig(Config):
    """FID's Inception features."""

    type: Literal["inception"] = "inception"
    """This kind."""
    name: str = Field(default="inception", pattern=r"^[A-Za-z0-9][\w.-]*$")
    """What the features and figures are called."""
    weights: Path | None = None
    """The published .pth file, or its tensors as .safetensors. Without it the file is sought where
    the environment variable LATENTDIFF_INCEPTION says, then in torch.hub's cache."""
    resize: Literal["tf_bilinear", "bicubic"] = "tf_bilinear"
    """How pictures become 299 x 299. tf_bilinear: TensorFlow 1's, which skips pixels, as in most
    figures of papers. bicubic: Pillow's, which averages them, as in clean-fid (Parmar et al.,
    2022)."""


class InceptionExtractor:
    """Pictures to the 2048 channels of the last pooling.

    Raises InputError when the weights or torch-fidelity, which has the network, are not here.
    """

    dimensions = DIMENSIONS

    def __init__(self, config: InceptionConfig, device: str = "cpu") -> None:
        self.name = config.name
        self.resize = config.resize
        self.device = device
        self.network = load_network(find_weights(config.weights)).to(device)
        self.digest = extractor_digest(self.network, {"side": SIDE, "resize": config.resize})

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> np.ndarray:
        """float32 [B, 2048] of pictures uint8 [B, 3, H, W]."""
        resize = tf_bilinear if self.resize == "tf_bilinear" else bicubic
        pixels = resize(images.to(self.device)).sub(128).div(128)
        return self.network(pixels).float().cpu().numpy()


def tf_bilinear(images: Tensor) -> Tensor:
    """float32 [B, 3, 299, 299] of uint8 [B, 3, H, W], as TensorFlow 1's resize_bilinear."""
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    return interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(SIDE, SIDE), align_corners=False
    )


def bicubic(images: Tensor) -> Tensor:
    """float32 [B, 3, 299, 299] in [0, 255] of uint8 [B, 3, H, W], channel by channel, unrounded."""
    planes = images.cpu().flatten(0, 1).numpy().astype(np.float32)
    resized = [
        np.asarray(Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for plane in planes
    ]
    stacked = torch.from_numpy(np.stack(resized)).clamp(0, 255)
    return stacked.unflatten(0, images.shape[:2]).to(images.device)


def find_weights(named: Path | None) -> Path:
    """The file that is named, or the first of those sought. Raises InputError when none is here."""
    variable = os.environ.get(VARIABLE)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if named is not None:
        sought = [named.expanduser()]
    elif variable:
        sought = [Path(variable).expanduser()]
    else:
        sought = [cache / name for name in FILES]
    for path in sought:
        if path.is_file():
            return path
    raise InputError(
        f"FID's Inception weights are not at {' or '.join(map(str, sought))}; download {URL} "
        f"(96 MB, sha256 {SHA256}) into {cache}, or name the file in `weights` or in the "
        f"environment variable {VARIABLE}; features of type clip need no download."
    )


def load_network(path: Path) -> nn.Sequential:
    """torch-fidelity's network up to its last pooling, [B, 3, 299, 299] in [-1, 1] -> [B, 2048]."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise InputError(
            "Inception features need torch-fidelity; install it with pip install torch-fidelity."
        ) from None
    # The class unpickles the file that it is given: it gets one made here, of tensors alone.
    tensors = io.BytesIO()
    torch.save(read_tensors(path), tensors)
    tensors.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):
            network = FeatureExtractorInceptionV3("inception", [str(DIMENSIONS)], tensors)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not hold the tensors of FID's Inception ({one_line(error)[:200]})."
        ) from None
    layers = OrderedDict(item for item in network.named_children() if item[0] != "fc")
    layers["flatten"] = nn.Flatten()
    return nn.Sequential(layers).eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Of a .safetensors file, or of the published pickle and no other. Raises InputError."""
    if path.suffix == ".safetensors":
        return read_weights(path)
    if file_digest(path) != SHA256:
        raise InputError(
            f"{path} is not the published file of FID's Inception weights, whose sha256 is "
            f"{SHA256}; download it again from {URL}."
        )
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the restricted unpickler, the archive or the disk
        raise InputError(f"{path} is damaged ({one_line(error)[:200]}).") from None
    return tensors
