"""The rows of LAION's metadata that are wanted, in one form whatever release they are of.

Reads batch by batch and keeps nothing in memory but a few batches, so a file may be of any size;
the disk holds what passed the filters a second time until duplicates are known.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BeforeValidator, Field, field_validator
from tqdm.auto import tqdm

from latentdiff.config import Config
from latentdiff.errors import InputError
from latentdiff.model_files import file_digest, write_json
from training.laion.columns import METADATA, FamilyName, Recognition, canonical, recognise
from training.laion.distinct import Spill
from training.laion.filters import ID, SIFTED, FiltersConfig, Sieve
from training.laion.metadata import MetadataFile, find
from training.laion.presets import PRESETS, PresetName, resolved
from training.laion.selection import (
    MANIFEST,
    SELECTED,
    describe,
    described_part,
    digest,
    downloaded,
    finished,
    other_pictures,
    publish,
    write_parts,
)

STAGING = ".selecting"
VERSION = 1
"""Of what a selection is; another one is made again."""

Patterns = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]


class SelectConfig(Config):
    """Which rows of which metadata."""

    metadata: Patterns
    """Tables of URLs and captions, .parquet, .csv or .tsv: files, folders, patterns such as
    data/**/*.parquet, or URLs that fsspec knows, such as
    hf://datasets/laion/relaion2B-en-research-safe/*.parquet."""
    family: FamilyName = "auto"
    """The release that they are of; by default as their columns say. plain is any other table."""
    columns: dict[str, str] = Field(default={})
    """Columns that have other names, as {caption: name in the file}."""
    acknowledge_withdrawn: bool = False
    """LAION-400M and LAION-5B were withdrawn in December 2023, because LAION-5B linked to child
    sexual abuse material (Thiel, "Identifying and eliminating CSAM in generative ML training data
    and models", 2023). Re-LAION-5B research-safe is its successor. Without this, they are
    refused."""
    preset: PresetName = "none"
    """Conditions of a known data set or model, which filters may replace one by one."""
    filters: FiltersConfig = FiltersConfig()
    """Further conditions."""
    missing: Literal["drop", "keep"] = "drop"
    """What becomes of a row without a value that is asked for."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Of the rows that pass the filters, drawn by their sample_ids."""
    limit: int | None = Field(default=None, gt=0)
    """How many rows at most, the first ones."""
    rows_per_part: int = Field(default=1_000_000, gt=0)
    """Rows in a file of the selection."""

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := set(columns) - set(METADATA.names):
            raise ValueError(f"{', '.join(sorted(unknown))}: none of {', '.join(METADATA.names)}")
        return columns


@dataclass(frozen=True)
class Table:
    """A file, and what its columns are taken for."""

    file: MetadataFile
    recognition: Recognition


def select(config: SelectConfig, directory: Path) -> dict[str, Any]:
    """Write selected/part-*.parquet and selected/manifest.json, and return the manifest.

    Run again with the same metadata and configuration it does nothing; with others it makes the
    selection anew. Raises InputError, before it reads a row, for metadata or filters that cannot
    be used; when nothing is left; and when pictures of another selection are there already.
    """
    config = config.model_copy(update={"filters": resolved(config.preset, config.filters)})
    sieve = Sieve(config.filters, config.missing == "keep", config.share)
    tables = recognised(config, sieve)
    inputs = _inputs(config, tables)
    earlier = finished(directory)
    if earlier is not None and earlier.get("inputs") == inputs:
        print(f"{earlier['rows']:,} rows are selected already, in {directory / SELECTED}.")
        return earlier
    pictures = any((directory / "images").glob("*.tar"))
    if pictures and (earlier is not None or downloaded(directory) is None):
        raise other_pictures(directory)
    print(_about(tables))
    print(f"conditions of the preset {config.preset}: {PRESETS[config.preset].source}", flush=True)
    staging = directory / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "spill").mkdir(parents=True)
    (staging / SELECTED).mkdir()
    try:
        unusable, repeated, rows = _pass(config, sieve, tables, staging)
        funnel = _funnel(sieve, repeated, rows)
        parts = [described_part(path) for path in sorted((staging / SELECTED).iterdir())]
        manifest = {
            "version": VERSION,
            "rows": rows,
            "parts": parts,
            "digest": digest(parts),
            "funnel": funnel,
            "unusable": dict(sorted(unusable.items())),
            "metadata": [_described(table) for table in tables],
            "preset": {"name": config.preset, "source": PRESETS[config.preset].source},
            "config": config.model_dump(mode="json"),
            "inputs": inputs,
        }
        print(describe(manifest))
        if not rows:
            raise InputError("No row is left; loosen the filters.")
        write_json(manifest, staging / SELECTED / MANIFEST)
        if pictures and downloaded(directory) != file_digest(staging / SELECTED / MANIFEST):
            raise other_pictures(directory)
        publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"selected: {rows:,} rows in {len(parts)} files, {directory / SELECTED}")
    return manifest


def recognised(config: SelectConfig, sieve: Sieve) -> list[Table]:
    """Every file with its columns. Raises InputError when one lacks what the filters ask for."""
    tables = []
    for file in find(config.metadata):
        recognition = recognise(
            file.columns(),
            config.family,
            config.columns,
            config.acknowledge_withdrawn,
            file.url,
        )
        lacking = sieve.needs().keys() - recognition.columns.keys()
        if config.missing == "drop" and lacking:
            column = sorted(lacking)[0]
            raise InputError(
                f"{file.url} has no column for {column}, and no row of it could pass "
                f'"{sieve.needs()[column]}"; leave that filter out, or set missing to keep.'
            )
        tables.append(Table(file, recognition))
    return tables


def _pass(
    config: SelectConfig, sieve: Sieve, tables: list[Table], staging: Path
) -> tuple[Counter[str], int, int]:
    """Write the parts: (values that could not be read, rows that came twice, rows written)."""
    unusable: Counter[str] = Counter()
    with Spill(staging / "spill", SIFTED, ID) as spill:
        batches, look_at = _sifted(sieve, tables, unusable), config.limit
        for batch in batches:
            spill.append(batch)
            if config.limit and look_at and spill.rows >= look_at:
                if spill.rows - spill.repeated()[1] >= config.limit:
                    break
                look_at = 2 * spill.rows
        batches.close()
        bits, repeated = spill.repeated()
        parts = staging / SELECTED
        rows = write_parts(spill.distinct(bits), parts, config.rows_per_part, config.limit)
    return unusable, repeated, rows


def _sifted(
    sieve: Sieve, tables: list[Table], unusable: Counter[str]
) -> Generator[pa.RecordBatch, None, None]:
    with tqdm(unit="rows", unit_scale=True, desc="metadata") as bar:
        for table in tables:
            columns = table.recognition.columns
            for raw in table.file.batches(sorted(set(columns.values()))):
                batch, damaged = canonical(raw, columns)
                unusable.update(damaged)
                bar.update(len(raw))
                yield sieve.sift(batch)


def _funnel(sieve: Sieve, repeated: int, rows: int) -> list[dict[str, Any]]:
    """Each condition with the rows that it took, those of them unknown to it, and what was left."""
    left = sieve.rows
    lines = [{"filter": "metadata", "taken": 0, "unknown": 0, "left": left}]
    taken = [(each.name, each.taken, each.unknown) for each in sieve.conditions]
    taken.append(("not the same URL and caption twice", repeated, 0))
    for name, took, unknown in taken:
        left -= took
        lines.append({"filter": name, "taken": took, "unknown": unknown, "left": left})
    if left > rows:
        lines.append({"filter": "limit", "taken": left - rows, "unknown": 0, "left": rows})
    return lines


def _about(tables: list[Table]) -> str:
    """What was recognised, once for all files alike."""
    seen: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
    for table in tables:
        seen[table.recognition.family, tuple(table.recognition.columns.items())] += 1
    return "\n".join(
        f"{count} files as {family}: "
        + ", ".join(f"{column} from {name}" for column, name in columns)
        for (family, columns), count in seen.items()
    )


def _described(table: Table) -> dict[str, Any]:
    return {
        "name": table.file.name,
        "bytes": table.file.bytes,
        "family": table.recognition.family,
        "columns": table.recognition.columns,
    }


def _inputs(config: SelectConfig, tables: list[Table]) -> str:
    """sha256 of all that a selection is a function of."""
    lists = [hashlib.sha256(path.read_bytes()).hexdigest() for path in config.filters.files()]
    values = [VERSION, config.model_dump(mode="json"), list(map(_described, tables)), lists]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
