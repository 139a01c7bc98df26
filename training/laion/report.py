"""The step `report`: what of the metadata is gone by now, by reason, by domain and by size."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.lockfile import LOCKFILE, read_batches, read_info
from latentdiff.errors import InputError
from latentdiff.model_files import staged_file, write_json
from training.laion.features import read_shard, shards
from training.laion.lists import host_of
from training.laion.outcomes import GONE, HAD

REPORT = "report"
MISMATCH = "hash mismatch"
LISTED = 20
"""Domains in the text, those with the most samples."""
MAX_DOMAINS = 1 << 20
"""Domains that are counted at once; beyond it the rarest are counted together."""
OTHERS = "others"
SIDES = (128, 256, 512, 1024, 2048)
"""Pixels between which the shorter sides in the metadata are counted together."""
UNKNOWN = "unknown"
RANGES = (
    f"below {SIDES[0]}",
    *(f"{low} to {high - 1}" for low, high in itertools.pairwise(SIDES)),
    f"from {SIDES[-1]}",
    UNKNOWN,
)


def report(directory: Path) -> dict[str, Any]:
    """Write report/rot.json and report/rot.txt and return the former; prints the latter.

    A picture counts as gone that its server gives no more; what was refused, by its server's wish,
    by our limits or for another hash, is counted apart. The same lockfile and downloads make the
    same bytes. Raises InputError where there is no lockfile or no download, or one is damaged.
    """
    path = directory / LOCKFILE
    info = read_info(path)
    status: Counter[str] = Counter()
    domains: Counter[tuple[str, bool]] = Counter()
    for table in read_batches(path, ("status", "url")):
        status.update(table["status"].to_pylist())
        lost = _gone(table["status"]).tolist()
        urls = table["url"].to_pylist()
        domains.update((_domain(url), gone) for url, gone in zip(urls, lost, strict=True))
        _bounded(domains)
    sizes: Counter[tuple[str, bool]] = Counter()
    codes: Counter[str] = Counter()
    for sides, answers, lost in _downloaded(directory):
        sizes.update(zip(sides, lost, strict=True))
        codes.update(f"{each}" for each in answers if each is not None)
    gone = {reason: count for reason, count in status.items() if reason in GONE}
    refused = {reason: status[reason] for reason in status.keys() - {*HAD, *GONE}}
    values = {
        "name": info.name,
        "lockfile": info.digest,
        "samples": info.rows,
        "gone": sum(gone.values()),
        "refused": sum(refused.values()),
        "hash_mismatches": status[MISMATCH],
        "status": dict(sorted(status.items())),
        "gone_by_reason": dict(sorted(gone.items())),
        "refused_by_reason": dict(sorted(refused.items())),
        "http_status": dict(sorted(codes.items())),
        "by_domain": _shares(domains),
        "by_shorter_side": {
            name: counted for name in RANGES if (counted := _shares(sizes).get(name))
        },
    }
    folder = directory / REPORT
    with staged_file(folder / "rot.json") as staged:
        write_json(values, staged)
    text = describe(values)
    with staged_file(folder / "rot.txt") as staged:
        staged.write_text(text, encoding="utf-8")
    print(text, end="")
    return values


def describe(values: Mapping[str, Any]) -> str:
    """The report, for people."""
    rows, gone = values["samples"], values["gone"]
    lines = [
        f"{gone:,} of {rows:,} samples ({_share(gone, rows)}) are gone. {values['refused']:,} were "
        f"refused, {values['hash_mismatches']:,} of them because they are another picture than the "
        "metadata's hash says.",
    ]
    for title in ("gone", "refused"):
        counts = values[f"{title}_by_reason"].items()
        by_reason = sorted(counts, key=lambda item: (-item[1], item[0]))
        lines += ["", _line(title, "samples", "of all")]
        lines += [_line(reason, f"{count:,}", _share(count, rows)) for reason, count in by_reason]
    for title, counted in (
        ("shorter side", values["by_shorter_side"]),
        ("domain", dict(list(values["by_domain"].items())[:LISTED])),
    ):
        lines += ["", _line(title, "samples", "gone")]
        lines += [
            _line(name, f"{each['samples']:,}", _share(each["gone"], each["samples"]))
            for name, each in counted.items()
        ]
    if len(values["by_domain"]) > LISTED:
        lines.append(f"and {len(values['by_domain']) - LISTED:,} domains more, in rot.json")
    return "\n".join(lines) + "\n"


def _line(*columns: str) -> str:
    name, *figures = columns
    return f"{name[:40]:<40}" + "".join(f"{figure:>14}" for figure in figures)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def _gone(status: pa.ChunkedArray) -> np.ndarray:
    lost: np.ndarray = pc.is_in(status, pa.array(GONE)).to_numpy()
    return lost


def _domain(url: str | None) -> str:
    return "".join(each if each.isprintable() else "?" for each in host_of(url)) or UNKNOWN


def _bounded(domains: Counter[tuple[str, bool]]) -> None:
    """Keep the commonest MAX_DOMAINS, the rest as one."""
    if len(domains) <= 2 * MAX_DOMAINS:
        return
    rarest = domains.most_common()[MAX_DOMAINS:]
    for place, _ in rarest:
        del domains[place]
    for (_, gone), count in rarest:
        domains[OTHERS, gone] += count


def _shares(counts: Counter[tuple[str, bool]]) -> dict[str, dict[str, int]]:
    """Samples and how many are gone, by name, the commonest first."""
    samples: Counter[str] = Counter()
    for (name, _), count in counts.items():
        samples[name] += count
    order = sorted(samples, key=lambda name: (-samples[name], name))
    return {name: {"samples": samples[name], "gone": counts[name, True]} for name in order}


def _downloaded(directory: Path) -> Iterator[tuple[list[str], list[int | None], list[bool]]]:
    """Of each shard the ranges of sides in the metadata, the servers' answers, and what is gone."""
    columns = ("key", "status", "meta_width", "meta_height", "http_status")
    status: dict[str, str] = {}
    locked = read_batches(directory / LOCKFILE, ("key", "status"))
    for shard in shards(directory):
        table = read_shard(directory, shard, columns)
        keys = table["key"].to_pylist()
        while keys and keys[-1] not in status and (piece := next(locked, None)) is not None:
            rows = piece.to_pydict()
            status.update(zip(rows["key"], rows["status"], strict=True))
        if not status.keys() >= set(keys):
            raise InputError(
                f"{directory / LOCKFILE} lacks samples of {shard}; run the step dedup again."
            )
        gone = _gone(pa.chunked_array([[status.pop(key) for key in keys]], pa.string())).tolist()
        width, height = (table[name].to_pylist() for name in columns[2:4])
        sides = [_range(*each) for each in zip(width, height, strict=True)]
        yield sides, table["http_status"].to_pylist(), gone


def _range(width: int | None, height: int | None) -> str:
    if not width or not height:
        return UNKNOWN
    return RANGES[int(np.searchsorted(SIDES, min(width, height), side="right"))]
