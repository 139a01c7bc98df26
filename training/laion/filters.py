"""Which rows of the metadata are kept, and how many each condition took."""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from latentdiff.config import Config
from training.laion.columns import METADATA, Nsfw
from training.laion.lists import read_domains, read_takedown

ID = "id"
"""The sample_id as a number, which a row has once it is asked for."""
SIFTED = pa.schema([*METADATA, (ID, pa.uint64())])

URL = r"^(?i:https?)://[^\x00-\x20\x7f/\\?#][^\x00-\x20\x7f]*$"
"""What urllib would ask for."""
MAX_URL_BYTES = 8192
MANTISSA = np.uint64(2**53 - 1)
"""The lower bits of an id, of which a share is drawn."""


class FiltersConfig(Config):
    """Conditions on the metadata's columns; none where null. min_ and max_ include the value given,
    above_ and below_ do not. Scores are compared as float32, as LAION stores them.
    """

    min_width: int | None = Field(default=None, gt=0)
    """Pixels, as the metadata says."""
    min_height: int | None = Field(default=None, gt=0)
    """Pixels."""
    min_side: int | None = Field(default=None, gt=0)
    """Pixels of the shorter side."""
    min_aspect: float | None = Field(default=None, gt=0)
    """Width by height."""
    max_aspect: float | None = Field(default=None, gt=0)
    """Width by height."""
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
    """Cosine of CLIP's embeddings of picture and caption; LAION's own threshold was 0.3 for
    LAION-400M, 0.28 for LAION-2B-en (ViT-B/32)."""
    max_punsafe: float | None = Field(default=None, ge=0, le=1)
    """Probability that it is not safe for work, of LAION's CLIP-based detector."""
    below_punsafe: float | None = Field(default=None, ge=0, le=1)
    """The same, exclusive."""
    nsfw: tuple[Nsfw, ...] | None = None
    """Tags that are kept, of releases that have such tags: UNLIKELY, UNSURE, NSFW."""
    max_pwatermark: float | None = Field(default=None, ge=0, le=1)
    """Probability of a watermark."""
    below_pwatermark: float | None = Field(default=None, ge=0, le=1)
    """The same, exclusive."""
    min_aesthetic_v1: float | None = None
    """Score of LAION's first aesthetic predictor, about 0 to 10."""
    above_aesthetic_v1: float | None = None
    """The same, exclusive."""
    min_aesthetic_v2: float | None = None
    """Score of the improved aesthetic predictor, about 1 to 10 and lower than the first's."""
    above_aesthetic_v2: float | None = None
    """The same, exclusive."""
    languages: tuple[str, ...] | None = None
    """Codes that are kept, such as en."""
    min_caption_length: int | None = Field(default=None, gt=0)
    """Characters. Rows without a caption are never kept."""
    max_caption_length: int | None = Field(default=None, gt=0)
    """Characters."""
    domains_allowed: tuple[str, ...] | Path | None = None
    """Only URLs of these domains and what is below them: a list, or a file of one per line."""
    domains_denied: tuple[str, ...] | Path | None = None
    """No URLs of these."""
    takedown: tuple[Path, ...] = ()
    """Files of what must not be used: URLs, domains, sample_ids or sha256, one per line."""

    def files(self) -> tuple[Path, ...]:
        """The lists that it reads."""
        domains = (self.domains_allowed, self.domains_denied)
        return (*(given for given in domains if isinstance(given, Path)), *self.takedown)


Judge = Callable[[pa.RecordBatch], np.ndarray]
"""bool [N]; what it says of rows that lack a value is not asked."""


@dataclass
class Condition:
    """One line of the funnel."""

    name: str
    columns: tuple[str, ...]
    """What must be known to judge; none where it always is."""
    judge: Judge
    stage: str = "numbers"
    """numbers, texts, or ids, which cost the most."""
    taken: int = field(default=0, init=False)
    unknown: int = field(default=0, init=False)
    """Rows that came to it without a value."""


class Sieve:
    """The conditions in the order in which they are tried, the cheapest first.

    Args:
        filters: what is asked of a row.
        keep_unknown: whether a row that lacks the value asked for stays.
        share: of all rows, (0, 1]; which ones is a function of their sample_ids alone, and those
            of a smaller share are among those of a larger one.

    Raises InputError when a list cannot be read.
    """

    def __init__(
        self, filters: FiltersConfig, keep_unknown: bool = False, share: float = 1.0
    ) -> None:
        self.keep_unknown = keep_unknown
        self.rows = 0
        self.conditions = [
            *_about_numbers(filters),
            *_about_texts(filters),
            *_about_ids(filters, share),
        ]

    def needs(self) -> dict[str, str]:
        """Columns that the conditions ask for, each with the first that does."""
        asked = [(column, each.name) for each in self.conditions for column in each.columns]
        return dict(reversed(asked))

    def sift(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of METADATA that are kept, under SIFTED."""
        self.rows += len(batch)
        alive, stage = np.ones(len(batch), dtype=bool), "numbers"
        for condition in self.conditions:
            if condition.stage != stage:
                batch, stage = _filtered(batch, alive), condition.stage
                if stage == "ids":
                    batch = with_ids(batch)
                alive = np.ones(len(batch), dtype=bool)
            known = np.ones(len(batch), dtype=bool)
            for name in condition.columns:
                known &= batch.column(name).is_valid().to_numpy(zero_copy_only=False)
            passed = np.where(known, condition.judge(batch), self.keep_unknown)
            condition.taken += int((alive & ~passed).sum())
            condition.unknown += int((alive & ~known).sum())
            alive &= passed
        batch = _filtered(batch, alive)
        return batch if stage == "ids" else with_ids(batch)


def with_ids(batch: pa.RecordBatch) -> pa.RecordBatch:
    """METADATA and the first 8 bytes of sha256(url, a line feed, caption), big-endian."""
    ids = np.empty(0, np.uint64)
    if len(batch):
        lines = pc.binary_join_element_wise(batch["url"], batch["caption"], "\n")
        _, ends, content = lines.buffers()
        offsets = np.frombuffer(ends, np.int32)[lines.offset :][: len(lines) + 1].tolist()
        view, sha256 = memoryview(content), hashlib.sha256
        pieces = itertools.pairwise(offsets)
        digests = b"".join([sha256(view[start:end]).digest()[:8] for start, end in pieces])
        ids = np.frombuffer(digests, ">u8").astype(np.uint64)
    return pa.RecordBatch.from_arrays([*batch.columns, pa.array(ids)], schema=SIFTED)


def hexadecimal(ids: np.ndarray) -> pa.Array:
    """uint64 [N] as sample_ids of 16 digits."""
    digits = ids.astype(">u8").tobytes().hex().encode()
    ends = np.arange(0, 16 * len(ids) + 1, 16, dtype=np.int32)
    return pa.StringArray.from_buffers(len(ids), pa.py_buffer(ends), pa.py_buffer(digits))


def _filtered(batch: pa.RecordBatch, alive: np.ndarray) -> pa.RecordBatch:
    return batch if alive.all() else batch.filter(pa.array(alive))


Measure = Callable[..., np.ndarray]

DERIVED: dict[str, tuple[tuple[str, ...], Measure]] = {
    "shorter side": (("width", "height"), np.minimum),
    "width / height": (("width", "height"), np.divide),
}
"""What is made of several columns."""
SIGNS = {"min": (">=", operator.ge), "max": ("<=", operator.le)}
SIGNS |= {"above": (">", operator.gt), "below": ("<", operator.lt)}
MEASURED = ("side", "shorter side"), ("aspect", "width / height")


def _about_numbers(filters: FiltersConfig) -> list[Condition]:
    """min_width and so on in the order of their fields, and the tags."""
    made = []
    for name in FiltersConfig.model_fields:
        sign, _, what = name.partition("_")
        value = getattr(filters, name)
        if value is None:
            continue
        if name == "nsfw" or name == "languages":
            column = "nsfw" if name == "nsfw" else "language"
            allowed = [each if name == "nsfw" else each.lower() for each in value]
            made.append(
                Condition(f"{column} in {', '.join(allowed)}", (column,), _among(column, allowed))
            )
        elif sign in SIGNS and not what.endswith("length"):
            measure = dict(MEASURED).get(what, what)
            columns, combine = DERIVED.get(measure, ((measure,), lambda values: values))
            symbol, holds = SIGNS[sign]
            judge = _compared(columns, combine, holds, value)
            made.append(Condition(f"{measure} {symbol} {value:g}", columns, judge))
    return made


def _compared(columns: tuple[str, ...], combine: Measure, holds: Measure, value: float) -> Judge:
    def judge(batch: pa.RecordBatch) -> np.ndarray:
        values = [pc.fill_null(batch[name], 1).to_numpy(zero_copy_only=False) for name in columns]
        return holds(combine(*values), value)

    return judge


def _among(column: str, allowed: list[str]) -> Judge:
    return lambda batch: _bools(pc.is_in(batch[column], value_set=pa.array(allowed)))


def _bools(array: pa.Array) -> np.ndarray:
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False)


def _about_texts(filters: FiltersConfig) -> list[Condition]:
    def url(batch: pa.RecordBatch) -> np.ndarray:
        short = pc.less_equal(pc.binary_length(batch["url"]), MAX_URL_BYTES)
        return _bools(pc.and_(pc.match_substring_regex(batch["url"], URL), short))

    def caption(batch: pa.RecordBatch) -> np.ndarray:
        return _bools(pc.match_substring_regex(batch["caption"], r"\S"))

    made = [Condition("an http or https URL", (), url), Condition("a caption", (), caption)]
    for bound, sign, holds in (
        (filters.min_caption_length, ">=", operator.ge),
        (filters.max_caption_length, "<=", operator.le),
    ):
        if bound is not None:
            made.append(Condition(f"caption {sign} {bound} characters", (), _long(holds, bound)))
    if filters.domains_allowed is not None:
        allowed = read_domains(filters.domains_allowed)
        made.append(Condition("domain allowed", (), _each_url(allowed.hold)))
    if filters.domains_denied is not None:
        denied = read_domains(filters.domains_denied)
        made.append(Condition("domain not denied", (), _each_url(lambda url: not denied.hold(url))))
    for condition in made:
        condition.stage = "texts"
    return made


def _long(holds: Measure, bound: int) -> Judge:
    return lambda batch: holds(
        pc.utf8_length(batch["caption"]).to_numpy(zero_copy_only=False), bound
    )


def _each_url(holds: Callable[[str], bool]) -> Judge:
    return lambda batch: np.array(
        [holds(url or "") for url in batch["url"].to_pylist()], dtype=bool
    )


def _about_ids(filters: FiltersConfig, share: float) -> list[Condition]:
    made = []
    if filters.takedown:
        takedown = read_takedown(filters.takedown)

        def not_taken_down(batch: pa.RecordBatch) -> np.ndarray:
            listed = takedown.holds_ids(batch[ID].to_numpy())
            if takedown.sha256:
                digests = batch["sha256"].to_pylist()
                listed |= np.array([each in takedown.sha256 for each in digests], dtype=bool)
            if takedown.urls:
                urls = batch["url"].to_pylist()
                listed |= np.array([url in takedown.urls for url in urls], dtype=bool)
            if takedown.domains:
                listed |= _each_url(takedown.domains.hold)(batch)
            return ~listed

        made.append(Condition("not taken down", (), not_taken_down, "ids"))
    if share < 1:

        def drawn(batch: pa.RecordBatch) -> np.ndarray:
            return (batch[ID].to_numpy() & MANTISSA) / 2.0**53 < share

        made.append(Condition(f"share of {share:g}", (), drawn, "ids"))
    return made
