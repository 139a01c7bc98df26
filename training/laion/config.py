"""One file for every step of a subset."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from latentdiff.config import Config
from training.laion.card import CardConfig
from training.laion.dedup import DedupConfig
from training.laion.download import DownloadConfig
from training.laion.select import SelectConfig


class LaionConfig(Config):
    """A subset of LAION, or of any list of addresses and captions, and what is made of it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What the data set is called, in its lockfile and card."""
    directory: Path
    """Everything goes below it: selected/, images/, lock.parquet, report/."""
    select: SelectConfig
    """Which rows of the metadata are wanted."""
    download: DownloadConfig
    """How their pictures are fetched."""
    dedup: DedupConfig
    """What counts as one picture twice, and what is held out."""
    card: CardConfig
    """What the data card says besides numbers."""
