"""CLIP's embeddings of pictures and captions, as its towers give them: not of unit length.

The Frechet distance is taken of them as they are (Kynkaanniemi et al. 2023, "The Role of ImageNet
Classes in Frechet Inception Distance"); where a metric wants unit vectors it makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from latentdiff.config import Config
from latentdiff.data.buckets import fit
from latentdiff.errors import InputError
from latentdiff.metrics.digest import extractor_digest
from latentdiff.model_files import one_line, read_json, read_shards, read_weights, weights_files
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.networks import load_tokenizer
from latentdiff.weights import load_module

if TYPE_CHECKING:
    from transformers import CLIPModel

BUNDLED = Path(__file__).parents[1] / "pretrained" / "emoji_clip"
NOT_IN_WEIGHTS = ("num_attention_heads", "hidden_act", "layer_norm_eps")


class ClipConfig(Config):
    """Embeddings by a CLIP of training.clip."""

    type: Literal["clip"] = "clip"
    """This kind."""
    name: str = Field(default="clip", pattern=r"^[A-Za-z0-9][\w.-]*$")
    """What the features and figures are called."""
    directory: Literal["bundled"] | Path = "bundled"
    """Directory with clip/ and tokenizer/; bundled: the one of emoji scenes in the package."""


class ClipExtractor:
    """A CLIP of training.clip. Pictures are scaled by Lanczos's filter to cover its square, and
    their middle is cut out.

    Raises InputError when there is no such CLIP.
    """

    def __init__(self, config: ClipConfig, device: str = "cpu") -> None:
        directory = BUNDLED if config.directory == "bundled" else config.directory
        if not (directory / "clip").is_dir():
            raise InputError(f"{directory / 'clip'} is missing; train it with training.clip first.")
        self.name = config.name
        self.device = device
        self.clip = load_clip(directory / "clip").to(device)
        self.side: int = self.clip.config.vision_config.image_size
        self.dimensions: int = self.clip.config.projection_dim
        self.encoder = TextEncoder(load_tokenizer(directory / "tokenizer"), self.clip.text_model)
        self.digest = extractor_digest(self.clip, self._preprocessing())

    def _preprocessing(self) -> dict[str, Any]:
        tokenizer = self.encoder.tokenizer
        towers = (self.clip.config.text_config, self.clip.config.vision_config)
        return {
            "resize": ["lanczos", self.side],
            "towers": [[getattr(tower, key) for key in NOT_IN_WEIGHTS] for tower in towers],
            "tokens": [self.encoder.max_length, tokenizer.pad_token_id, tokenizer.get_vocab()],
        }

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> np.ndarray:
        """float32 [B, D] of pictures uint8 [B, 3, H, W]."""
        shape = (self.side, self.side)
        squares = np.stack([np.asarray(fit(picture, shape)[0]) for picture in pictures(images)])
        pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).to(self.device)
        pooled = self.clip.vision_model(pixels.float().div(127.5).sub(1)).pooler_output
        return self.clip.visual_projection(pooled).cpu().numpy()

    @torch.inference_mode()
    def text(self, captions: Sequence[str]) -> np.ndarray:
        """float32 [B, D] of captions."""
        ids = self.encoder.tokenize(captions).to(self.device)
        return self.clip.text_projection(self.clip.text_model(ids).pooler_output).cpu().numpy()


def load_clip(directory: Path) -> CLIPModel:
    """transformers' CLIPModel in float32. Raises InputError when it cannot be read."""
    from transformers import CLIPConfig, CLIPModel

    def build(values: dict[str, Any]) -> CLIPModel:
        return CLIPModel(CLIPConfig.from_dict(values))

    path, files = directory / "config.json", weights_files(directory, "model")
    return load_module(build, read_json(path), path, read_shards(files), files[0], torch.float32)


class OpenClipConfig(Config):
    """Embeddings by a model of open_clip."""

    type: Literal["open_clip"] = "open_clip"
    """This kind."""
    name: str = Field(default="open_clip", pattern=r"^[A-Za-z0-9][\w.-]*$")
    """What the features and figures are called."""
    model: str
    """open_clip's name of the architecture, such as ViT-L-14."""
    weights: str
    """open_clip's tag of published weights, such as datacomp_xl_s13b_b90k, which it downloads where
    they are not in its cache, or a .safetensors file."""


class OpenClipExtractor:
    """A model of open_clip with its own preprocessing and tokenizer.

    Raises InputError when open_clip knows no such model, or the weights cannot be had or are not
    the model's.
    """

    def __init__(self, config: OpenClipConfig, device: str = "cpu") -> None:
        try:
            import open_clip
            from open_clip.transform import PreprocessCfg, image_transform_v2
        except ImportError:
            raise InputError(
                "Features of type open_clip need it; install it with pip install open_clip_torch."
            ) from None
        self.name = config.name
        self.device = device
        self.network = load_open_clip(config).to(device).eval()
        architecture = open_clip.get_model_config(config.model)
        self.dimensions: int = architecture["embed_dim"]
        preprocessing = self.network.visual.preprocess_cfg
        self.transform = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)
        self.tokenize = open_clip.get_tokenizer(config.model)
        facts = {"architecture": architecture, "preprocessing": preprocessing}
        self.digest = extractor_digest(self.network, facts)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> np.ndarray:
        """float32 [B, D] of pictures uint8 [B, 3, H, W]."""
        batch = torch.stack([self.transform(picture) for picture in pictures(images)])
        return self.network.encode_image(batch.to(self.device)).float().cpu().numpy()

    @torch.inference_mode()
    def text(self, captions: Sequence[str]) -> np.ndarray:
        """float32 [B, D] of captions, cut where they are too long."""
        tokens = self.tokenize(list(captions)).to(self.device)
        return self.network.encode_text(tokens).float().cpu().numpy()


def load_open_clip(config: OpenClipConfig) -> Any:
    """open_clip's model in float32. Raises InputError."""
    import open_clip

    if config.model not in open_clip.list_models():
        raise InputError(
            f"open_clip knows no model {config.model!r}; set model to one of its names, such as "
            "ViT-L-14."
        )
    path = Path(config.weights)
    local = path.suffix == ".safetensors"
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    if not local and config.weights not in tags:
        raise InputError(
            f"open_clip has no weights {config.weights!r} of {config.model}; set weights to a "
            f".safetensors file or to one of {', '.join(tags) or 'another model'}."
        )
    tensors = read_weights(path) if local else None
    try:
        with torch.random.fork_rng(devices=[]):
            tag = None if local else config.weights
            network = open_clip.create_model(config.model, pretrained=tag, pretrained_text=False)
        if tensors is not None:
            network.load_state_dict(tensors)
    except Exception as error:  # the hub's client raises errors of its HTTP library's, of any kind
        raise InputError(
            f"The weights {config.weights} of {config.model} cannot be had or do not fit it "
            f"({one_line(error)[:200]})."
        ) from None
    return network


def pictures(images: Tensor) -> list[Image.Image]:
    """RGB pictures of uint8 [B, 3, H, W]."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
