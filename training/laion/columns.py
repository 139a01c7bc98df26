"""The columns of LAION's metadata, whatever each release calls them.

What the releases hold, names as in their files:

- LAION-400M and LAION-2B-en: SAMPLE_ID, URL, TEXT, HEIGHT, WIDTH, LICENSE, NSFW, similarity;
  the other parts of LAION-5B also LANGUAGE. LICENSE is mostly "?"; HEIGHT and WIDTH are int32 or,
  where pandas wrote the file, double.
- LAION-2B-en joined with its tags, and laion-high-resolution: URL, TEXT, WIDTH, HEIGHT,
  similarity, hash, punsafe, pwatermark, and LANGUAGE.
- laion-aesthetic (v1) and laion-art: the same and `aesthetic`, of the first predictor.
- LAION-Aesthetics v2 (improved_aesthetics_5plus, aesthetics_v2_4.75): the same and
  AESTHETIC_SCORE, in some `aesthetic` or `prediction`, of the improved predictor.
- Re-LAION-5B, research and research-safe: url, caption, key, status, similarity, hash, punsafe,
  pwatermark, original_width, original_height, and width and height of LAION's resized copy.

Sources: the data sets' cards at huggingface.co/laion; img2dataset's dataset_examples; Schuhmann et
al., "LAION-5B", 2022; https://laion.ai/blog/laion-aesthetics/; https://laion.ai/blog/relaion-5b/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.errors import InputError

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("similarity", pa.float32()),
        ("punsafe", pa.float32()),
        ("nsfw", pa.string()),
        ("pwatermark", pa.float32()),
        ("aesthetic_v1", pa.float32()),
        ("aesthetic_v2", pa.float32()),
        ("language", pa.string()),
        ("license", pa.string()),
        ("sha256", pa.string()),
    ]
)
"""Of a selection: every column always, null where unknown."""

METADATA = pa.schema(list(SCHEMA)[1:])
"""The same without the id, which is made of URL and caption."""

FamilyName = Literal[
    "auto",
    "laion400m",
    "laion2b_en",
    "laion_art",
    "laion_aesthetics_v1",
    "laion_aesthetics_v2",
    "relaion2b_en_research",
    "relaion2b_en_research_safe",
    "plain",
]
Nsfw = Literal["UNLIKELY", "UNSURE", "NSFW"]
NSFW: tuple[Nsfw, ...] = ("UNLIKELY", "UNSURE", "NSFW")

NAMES: dict[str, tuple[str, ...]] = {
    "url": ("url",),
    "caption": ("text", "caption"),
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "similarity": ("similarity",),
    "punsafe": ("punsafe",),
    "nsfw": ("nsfw",),
    "pwatermark": ("pwatermark",),
    "aesthetic_v1": ("aesthetic_v1",),
    "aesthetic_v2": ("aesthetic_v2", "aesthetic_score"),
    "language": ("language",),
    "license": ("license",),
    "sha256": ("sha256",),
}
"""Lower-case names of each column, the first that a file has is taken."""

WRITTEN = {"key", "status", "error_message"}
"""Columns of what img2dataset writes, whatever it read."""
SAFE = "Re-LAION-5B research-safe (laion/relaion2B-en-research-safe on Hugging Face)"
UNKNOWN_LICENSE = "?"
NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
SHA256 = r"^[0-9a-f]{64}$"


@dataclass(frozen=True)
class Family:
    """What has to be known of a release besides its columns' names."""

    withdrawn: bool = False
    """Whether it is of LAION-400M or LAION-5B as they were before December 2023."""
    names: Mapping[str, tuple[str, ...]] | None = None
    """Names that only here mean what they say."""


V1 = {"aesthetic_v1": ("aesthetic",)}
V2 = {"aesthetic_v2": ("aesthetic", "prediction")}
FAMILIES = {
    "laion400m": Family(withdrawn=True),
    "laion2b_en": Family(withdrawn=True),
    "laion_art": Family(withdrawn=True, names=V1),
    "laion_aesthetics_v1": Family(withdrawn=True, names=V1),
    "laion_aesthetics_v2": Family(withdrawn=True, names=V2),
    "relaion2b_en_research": Family(),
    "relaion2b_en_research_safe": Family(),
    "plain": Family(),
}


@dataclass(frozen=True)
class Recognition:
    """What one file's columns are taken for."""

    family: str
    columns: dict[str, str]
    """Of METADATA's names those that the file has, and what it calls them."""


def recognise(
    names: Sequence[str],
    family: FamilyName = "auto",
    overrides: Mapping[str, str] | None = None,
    acknowledged: bool = False,
    source: str = "The metadata",
) -> Recognition:
    """Match a file's columns, whatever their case.

    Args:
        names: the file's columns.
        family: the release; by its columns where it is "auto". Those of Re-LAION's two versions are
            the same, and it is taken for the one that is filtered less.
        overrides: METADATA's names and what the file calls them, before all else.
        acknowledged: that LAION-400M and LAION-5B are known to be withdrawn.
        source: the file, for messages.

    Raises InputError when there is no URL or caption, when a name could mean two things, when it is
    of LAION-400M or the original LAION-5B and that is not acknowledged, or when img2dataset wrote
    it and no family is named: those tables of every release look alike.
    """
    overrides = overrides or {}
    lower: dict[str, list[str]] = {}
    for name in names:
        lower.setdefault(name.lower(), []).append(name)
    if family == "auto" and lower.keys() >= WRITTEN:
        raise InputError(
            f"{source} is a table that img2dataset wrote, which does not show what release its "
            "addresses are of; name the family, or plain where it is none of LAION's."
        )
    found = _detect(set(lower)) if family == "auto" else family
    columns: dict[str, str] = {}
    free = {name for name, written in lower.items() if not set(written) & set(overrides.values())}
    for column, usual in NAMES.items():
        wanted = usual + (FAMILIES[found].names or {}).get(column, ())
        if column in overrides:
            if names.count(overrides[column]) != 1:
                raise InputError(
                    f"{source} has no one column {overrides[column]} but {', '.join(names)}; "
                    f"correct columns.{column}."
                )
            columns[column] = overrides[column]
        elif taken := next((name for name in wanted if name in free), None):
            if len(lower[taken]) > 1:
                raise InputError(
                    f"{source} has {' and '.join(lower[taken])}; say which one is meant by "
                    f"columns.{column}."
                )
            columns[column] = lower[taken][0]
    if lacking := [column for column in ("url", "caption") if column not in columns]:
        raise InputError(
            f"{source} has no {' and no '.join(lacking)} among its columns {', '.join(names)}; "
            f"name it by columns.{lacking[0]}."
        )
    if "aesthetic" in lower and lower["aesthetic"][0] not in columns.values():
        raise InputError(
            f"The column aesthetic of {source} is of the first predictor or of the improved one, "
            "which mean different things: name the family (laion_art, laion_aesthetics_v1 or "
            "laion_aesthetics_v2), or set columns.aesthetic_v1 or columns.aesthetic_v2 to it."
        )
    if FAMILIES[found].withdrawn and not acknowledged:
        raise InputError(
            f"{source} is taken for {found}, which LAION withdrew in December 2023 because its "
            f"data linked to material of child sexual abuse: take {SAFE}, name its family if it is "
            "another, or set acknowledge_withdrawn to true where you may hold it."
        )
    return Recognition(found, columns)


def _detect(names: set[str]) -> str:
    """The release with such columns."""
    tagged = {"hash", "punsafe", "pwatermark"} <= names
    if tagged and {"key", "status"} <= names:
        return "relaion2b_en_research"
    if tagged:
        return "laion_aesthetics_v2" if "aesthetic_score" in names else "laion2b_en"
    if {"sample_id", "nsfw", "similarity"} <= names:  # LAION-400M's are the same
        return "laion2b_en"
    return "plain"


def canonical(
    batch: pa.RecordBatch, columns: Mapping[str, str]
) -> tuple[pa.RecordBatch, Counter[str]]:
    """The same rows under METADATA, and how many values of each column could not be read.

    Those become null, and so do, uncounted, NaN and what is empty. Sizes below 1 are not sizes.
    """
    arrays, unusable = [], Counter[str]()
    for field in METADATA:
        if field.name not in columns:
            arrays.append(pa.nulls(len(batch), field.type))
            continue
        array = batch.column(batch.schema.get_field_index(columns[field.name]))
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        convert = _numbers if field.type != pa.string() else _texts
        value, count = convert(array, field)
        arrays.append(value)
        if count:
            unusable[field.name] = count
    return pa.RecordBatch.from_arrays(arrays, schema=METADATA), unusable


def _numbers(array: pa.Array, field: pa.Field) -> tuple[pa.Array, int]:
    given = len(array) - array.null_count
    if _is_text(array.type):
        text = pc.utf8_trim_whitespace(_utf8(array))
        given -= pc.sum(pc.equal(text, "")).as_py() or 0
        array = pc.if_else(
            pc.match_substring_regex(text, NUMBER), text, pa.scalar(None, pa.string())
        )
    try:
        values = pc.cast(array, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(array), field.type), given
    not_numbers = 0 if _is_text(array.type) else np.isnan(values).sum() - array.null_count
    if field.type == pa.int32():
        usable = (values >= 1) & (values < 2**31)
    else:
        usable = np.abs(values) <= np.finfo(np.float32).max
    made = np.where(usable, values, 0).astype(field.type.to_pandas_dtype())
    return pa.array(made, mask=~usable), int(given - not_numbers - usable.sum())


def _texts(array: pa.Array, field: pa.Field) -> tuple[pa.Array, int]:
    text = _utf8(array)
    if field.name in ("url", "caption"):
        return text, text.null_count - array.null_count
    text = pc.utf8_trim_whitespace(text)
    text = _only(text, pc.not_equal(text, UNKNOWN_LICENSE if field.name == "license" else ""))
    text = _only(text, pc.not_equal(text, ""))
    given = len(text) - text.null_count
    if field.name == "language":
        text = pc.utf8_lower(text)
    if field.name == "nsfw":
        text = pc.utf8_upper(text)
        text = _only(text, pc.is_in(text, value_set=pa.array(NSFW)))
    if field.name == "sha256":
        text = pc.utf8_lower(text)
        text = _only(text, pc.match_substring_regex(text, SHA256))
    return text, given - (len(text) - text.null_count)


def _only(text: pa.Array, where: pa.Array) -> pa.Array:
    return pc.if_else(where, text, pa.scalar(None, pa.string()))


def _is_text(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )


def _utf8(array: pa.Array) -> pa.Array:
    """As strings that are UTF-8, which files promise and do not always keep."""
    try:
        text = pc.cast(array, pa.string())
        text.validate(full=True)
        return text
    except pa.ArrowNotImplementedError:
        return pa.nulls(len(array), pa.string())
    except pa.ArrowInvalid:
        return pa.array([_decoded(value) for value in pc.cast(array, pa.binary()).to_pylist()])


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None
