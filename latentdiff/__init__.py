"""Latent text-to-image diffusion: a prompt in, a picture out.

    from latentdiff import generate
    image = generate("a fox to the left of a red apple on a blue background")

Importing this package loads neither torch nor anything else that is slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.pipeline import TextToImage, generate

__version__ = "0.1.0"
__all__ = ["TextToImage", "__version__", "generate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from latentdiff import pipeline

    return getattr(pipeline, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
