"""Latent text-to-image diffusion: a prompt in, a picture out.

    from latentdiff import generate
    image = generate("a fox to the left of a red apple on a blue background")

Importing this package loads neither torch nor anything else that is slow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.pictures import save_picture
    from latentdiff.pipeline import TextToImage, generate

__version__ = "0.1.0"
__all__ = ["TextToImage", "__version__", "generate", "save_picture"]

_HOMES = {"TextToImage": "pipeline", "generate": "pipeline", "save_picture": "pictures"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"latentdiff.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
