"""A data card's text, from its configuration and the facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from latentdiff.data.lockfile import DUPLICATES, SCHEMA
from training.laion.croissant import FIELDS
from training.laion.facts import SCORES
from training.laion.outcomes import HAD
from training.laion.phash import RADIUS

if TYPE_CHECKING:
    from training.laion.card import CardConfig

TEMPLATE = Path(__file__).with_name("card.md.template")

SIZES = ("width", "height", "shorter_side", "aspect")
CAPTIONS = ("caption_words", "caption_characters")
CHARTS = {
    "width": ("Widths", "pixels"),
    "height": ("Heights", "pixels"),
    "shorter_side": ("Shorter sides", "pixels"),
    "aspect": ("Aspect ratios, width / height", ""),
    "caption_words": ("Lengths of captions", "words"),
    "caption_characters": ("Lengths of captions", "characters"),
    "similarity": ("CLIP similarity", ""),
    "punsafe": ("Probability of being unsafe", ""),
    "pwatermark": ("Probability of a watermark", ""),
    "aesthetic_v1": ("Aesthetic score, first predictor", ""),
    "aesthetic_v2": ("Aesthetic score, second predictor", ""),
}
"""Title and unit of the histogram of each quantity that has one."""

OPTED_OUT = "opted out"
"""The status of what a server does not want used."""
SHOWN = 60
"""Characters of a name that others chose."""
LISTED = 30
"""Rows of a table of names that others chose."""

ORIGINAL = (
    "In December 2023 the Stanford Internet Observatory reported 3,226 suspected links to child "
    "sexual abuse material in LAION-5B, of which 1,008 were confirmed (Thiel 2023), and LAION "
    "withdrew LAION-5B and LAION-400M. In August 2024 it published Re-LAION-5B, without 2,236 "
    "links that child protection organisations had found."
)
HISTORY = {
    "laion": f"{ORIGINAL} **This subset is selected from metadata of before that, which nobody "
    "should use as it is.** Use Re-LAION-5B research-safe.",
    "relaion": f"{ORIGINAL} This subset is selected from Re-LAION-5B. What is on no list of those "
    "organisations may still be there.",
    "": "Nothing is known here of how the list of addresses was made.",
}
"""By how the family's name begins."""


def describe(
    config: CardConfig, name: str, facts: Mapping[str, Any], licences: Mapping[str, str]
) -> str:
    """The card in Markdown; every number in its tables is one of the facts."""
    kept, numbers, status = facts["kept"], facts["numbers"], facts["status"]
    count = kept["samples"]
    families = " and ".join(map(code, _families(facts["selection"])))
    texts = {key: value for key, value in config if isinstance(value, str)}
    texts |= {
        "pretty_name": config.pretty_name or name,
        "creators": ", ".join(config.creators) or "Not stated.",
        "contact": config.contact
        or "**Nobody yet.** Whoever publishes this card must name someone: set `card.contact`.",
        "history": config.history or history_of(facts),
        "licence": f"[{config.licence}]({config.licence_url or licences[config.licence]})",
    }
    return TEMPLATE.read_text(encoding="utf-8").format(
        **texts,
        name=name,
        front=_front(config, name, count),
        samples=f"{facts['samples']:,}",
        kept=f"{count:,}",
        kept_share=share(count, facts["samples"]),
        train=f"{kept['split'].get('train', 0):,}",
        validation=f"{kept['split'].get('validation', 0):,}",
        domains=f"{facts['domains']:,}",
        distinct_captions=f"{facts['distinct_captions']:,}",
        distinct_pictures=f"{facts['distinct_pictures']:,}",
        digest=facts["digest"],
        lockfile_sha256=facts["lockfile"]["sha256"],
        versions=", ".join(f"{program} {code(it)}" for program, it in facts["versions"].items()),
        families=families,
        metadata=_metadata(facts["selection"]),
        funnel=_funnel(facts["selection"]),
        status=_table(status, facts["samples"]),
        carried=_carried(kept),
        commonest_domains=_listed(kept["domain"]),
        bytes=_bytes(kept["bytes"]),
        sizes=_rows({**{key: numbers[key] for key in SIZES}, "bytes": numbers["bytes"]}),
        captions=_rows({key: numbers[key] for key in CAPTIONS}),
        scores=_rows({key: numbers[key] for key in SCORES}),
        size_charts=_charts(name, SIZES, numbers),
        caption_charts=_charts(name, CAPTIONS, numbers),
        score_charts=_charts(name, SCORES, numbers),
        **{key: _listed(kept[key]) for key in ("format", "bucket", "language", "nsfw", "license")},
        opt_out=_listed(kept["opt_out"]),
        opted_out=f"{status.get(OPTED_OUT, 0):,}",
        shared_sha256=f"{facts['in_both_splits']['sha256']:,}",
        shared_phash=f"{facts['in_both_splits']['phash']:,}",
        radius=RADIUS,
        preset=code(facts["selection"]["preset"]["name"]),
        preset_source=facts["selection"]["preset"]["source"],
        duplicates=f"{sum(status.get(reason, 0) for reason in DUPLICATES):,}",
        gone=f"{sum(count for reason, count in status.items() if reason not in HAD):,}",
        fields="\n".join(
            f"| `{column.name}` | {column.type} | {FIELDS[column.name]} |" for column in SCHEMA
        ),
    )


def history_of(facts: Mapping[str, Any]) -> str:
    """What is known of the past of the metadata that was selected from, its worst part first."""
    families = _families(facts["selection"])
    return next(
        text for start, text in HISTORY.items() if any(each.startswith(start) for each in families)
    )


def _families(selection: Mapping[str, Any]) -> list[str]:
    return sorted({file["family"] for file in selection["metadata"]})


def code(text: str) -> str:
    """A name from outside as a code span, in which nothing of Markdown or HTML has a meaning.

    Back quotes, bars and what is not printable become others; long names are cut.
    """
    shown = "".join(each if each.isprintable() else " " for each in text[: 4 * SHOWN])
    shown = " ".join(shown.translate({ord("`"): "'", ord("|"): "/"}).split())
    return (
        f"`{shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + '…'}`" if shown else "`(empty)`"
    )


def share(part: int, whole: int) -> str:
    """A percentage; 0.0% and 100.0% only where it is exactly that."""
    thousandths = round(1000 * part / whole) if whole else 0
    if 0 < part < whole:
        thousandths = min(max(thousandths, 1), 999)
    return f"{thousandths / 10:.1f}%"


def size_category(samples: int) -> str:
    """Hugging Face's name of a data set's size."""
    steps = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    for number, step in enumerate(steps):
        if samples < 10 ** (number + 3):
            return f"{steps[number - 1]}<n<{step}" if number else f"n<{step}"
    return "n>1T"


def _front(config: CardConfig, name: str, samples: int) -> str:
    """The card's metadata; https://github.com/huggingface/hub-docs/blob/main/datasetcard.md."""
    values = {
        "license": config.licence,
        "language": list(config.languages),
        "pretty_name": config.pretty_name or name,
        "task_categories": ["text-to-image"],
        "size_categories": [size_category(samples)],
        "annotations_creators": ["found"],
        "language_creators": ["found"],
        "source_datasets": ["extended"],
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _metadata(selection: Mapping[str, Any]) -> str:
    files = selection["metadata"]
    named = ", ".join(code(file["name"]) for file in files[:LISTED])
    more = f" and {len(files) - LISTED:,} more" if len(files) > LISTED else ""
    damaged = sum(selection["unusable"].values())
    return f"{named}{more}; unreadable values in it: {damaged:,}"


def _funnel(selection: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| {code(step['filter'])} | {step['taken']:,} | {step['unknown']:,} | {step['left']:,} |"
        for step in selection["funnel"]
    )


def _table(counts: Mapping[str, int], whole: int) -> str:
    """The rows of a table of names and counts, those of the rarest names together."""
    rows = list(counts.items())
    if len(rows) > LISTED:
        rest = sum(count for _, count in rows[LISTED - 1 :])
        rows = [*rows[: LISTED - 1], (f"{len(counts) - LISTED + 1} others", rest)]
    return "\n".join(
        f"| {code(name)} | {count:,} | {share(count, whole)} |" for name, count in rows
    )


def _listed(counts: Mapping[str, int]) -> str:
    names = [f"{code(name)} {count:,}" for name, count in counts.items()]
    if len(names) > LISTED:
        rest = sum(list(counts.values())[LISTED:])
        names = [*names[:LISTED], f"{len(counts) - LISTED:,} others {rest:,}"]
    return ", ".join(names) or "none"


def _carried(kept: Mapping[str, Any]) -> str:
    carried, count = kept["carried"], kept["samples"]
    whole = [f"{share(carried.get(key, 0), count)} carry {key}" for key in REQUIRED]
    return ", ".join(whole)


REQUIRED = ("sha256", "status", "opt_out", *SCORES)


def _rows(numbers: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| {name.replace('_', ' ')} | {about['samples']:,} | "
        + " | ".join(figure(about[key]) if about["samples"] else "" for key in QUANTILES)
        + " |"
        for name, about in numbers.items()
    )


QUANTILES = ("minimum", "low", "median", "high", "maximum")


def figure(value: float) -> str:
    """Whole numbers whole, others with four digits."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _charts(name: str, quantities: Iterable[str], numbers: Mapping[str, Any]) -> str:
    return "\n".join(
        f"![{CHARTS[each][0]}]({name}/{each}.svg)"
        for each in quantities
        if numbers[each]["samples"]
    )


def _bytes(size: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size:,} bytes"
