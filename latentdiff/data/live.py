"""Training straight from pictures: the numbering of a latent cache, without the latents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from latentdiff.data.buckets import SizesConfig, fit, size_conditioning
from latentdiff.data.images import ImageTextSource
from latentdiff.data.scan import Scan, scan
from latentdiff.data.store import Store
from latentdiff.data.tokens import tokenize, tokenizers_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LiveImages:
    """Pictures and token ids by sample number, bucket by bucket as LatentCache numbers them.

    Left out are pictures whose header cannot be used; those damaged further on are found when they
    are asked for. Holds 8 bytes a picture.

    Args:
        sizes: what sizes the pictures are brought to.
        tokenizers: of the model's text encoders.
        store: where the scan of all headers is kept, so that it is made once.
        rank, processes: which share of that scan this process takes first.

    Raises InputError when the tokenizers differ in length.
    """

    def __init__(
        self,
        source: ImageTextSource,
        sizes: SizesConfig,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        store: Store,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.source, self.tokenizers = source, list(tokenizers)
        self.buckets = sizes.shapes()
        """(width, height) in pixels of each bucket."""
        words = [source.digest, len(source), self.buckets, tokenizers_digest(tokenizers)]
        self.digest = hashlib.sha256(repr(words).encode()).hexdigest()
        """sha256 of what the samples are a function of."""
        scan(source, store, rank, processes)
        scanned = Scan(source, store, self.buckets)
        self.counts = scanned.counts
        """Samples of each bucket."""
        self.unreadable = list(scanned.unreadable())
        """(the source's number, reason) of each picture that was left out."""
        self._rows = np.concatenate(
            [scanned.rows(bucket, 0, count) for bucket, count in enumerate(self.counts)]
        )
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """image uint8 [3, H, W], ids int64 [towers, L], size int64 [6] (see size_conditioning).

        Raises IndexError for a number outside range(len(self)), and UnreadableImage.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"There are samples 0 to {len(self) - 1}.")
        bucket = int(np.searchsorted(self._ends, sample, side="right"))
        row, shape = int(self._rows[sample]), self.buckets[bucket]
        picture = self.source.image(row)
        fitted, top, left = fit(picture, shape)
        ids, _ = tokenize(self.tokenizers, [self.source.caption(row)])
        return {
            "image": torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous(),
            "ids": torch.from_numpy(ids[0]).long(),
            "size": torch.tensor(size_conditioning(picture.size, top, left, shape)),
        }

    def source_row(self, sample: int) -> int:
        """The source's number of a sample, for lists of what could not be read."""
        return int(self._rows[sample])

    def cut(self, most: int = 4096) -> tuple[float, int]:
        """Which share of at most `most` evenly taken captions is longer than the tokens there are
        for them, and how many those are.
        """
        rows = self._rows[np.linspace(0, len(self) - 1, min(most, len(self))).astype(np.int64)]
        ids, cut = tokenize(self.tokenizers, [self.source.caption(int(row)) for row in rows])
        return float((cut > 0).mean()), ids.shape[-1]

    def captions(self) -> list[str]:
        """Every caption in sample order."""
        return [self.source.caption(int(row)) for row in self._rows]
