"""Small lockfiles with the selections they were made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentdiff.data.lockfile import LOCKFILE, SCHEMA, write_lockfile
from training.laion.selection import identity

FORMATS = ("JPEG", "PNG", "WEBP")


def row(number: int, status: str = "kept", **values: Any) -> dict[str, Any]:
    """A sound row of a lockfile; `values` override."""
    kept = status == "kept"
    picture = {
        "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
        "phash": hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()[:16],
        "split": "validation" if number % 5 == 0 else "train",
        "opt_out": "allowed",
        "width": 256 + 37 * number % 900,
        "height": 300 + 53 * number % 700,
        "bytes": 1000 + 17 * number,
        "format": FORMATS[number % 3],
        "bucket": "64x64",
    }
    return {
        "key": f"{number:09d}",
        "sample_id": f"{number:016x}",
        "url": f"https://www{number % 3}.example.org/pictures/{number}.jpg",
        "status": status,
        "duplicate_of": f"{number - 1:09d}" if status.startswith("duplicate") else None,
        "caption": " ".join(["drawing"] * (number % 4 + 1)) + f" {number}",
        "similarity": 0.2 + number % 7 / 50,
        "punsafe": None if number % 4 == 0 else number % 10 / 10,
        "aesthetic_v2": 4.5 + number % 20 / 10,
        **(picture if kept else {}),
        **values,
    }


def rows(number: int = 60) -> list[dict[str, Any]]:
    """Three of four are kept."""
    lost = ("404", "opted out", "duplicate: near", "timeout")
    return [row(each, "kept" if each % 4 else lost[each // 4 % 4]) for each in range(number)]


def lock(
    directory: Path, content: list[dict[str, Any]], family: str = "laion_aesthetics_v2"
) -> Path:
    """Write selected/manifest.json and lock.parquet; returns the directory."""
    manifest = {
        "rows": len(content),
        "parts": [],
        "config": {"metadata": ["/data/of/somebody/*.parquet"]},
        "funnel": [
            {"filter": "metadata", "taken": 0, "unknown": 0, "left": len(content) + 7},
            {"filter": "width >= 512", "taken": 7, "unknown": 2, "left": len(content)},
        ],
        "unusable": {"width": 1},
        "preset": {"name": "sd15", "source": "https://a.example/model: a score of 5 or more."},
        "metadata": [{"name": "/data/of/somebody/part-0.parquet", "bytes": 123, "family": family}],
    }
    (directory / "selected").mkdir(parents=True, exist_ok=True)
    (directory / "selected" / "manifest.json").write_text(json.dumps(manifest))
    table = pa.Table.from_pylist(content, SCHEMA)
    versions = {"latentdiff": "0.0"}
    write_lockfile(directory / LOCKFILE, [table], "tiny", identity(manifest), versions)
    return directory
