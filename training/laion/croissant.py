"""The data card for programs: Croissant 1.0, JSON-LD of what is in the lockfile.

Akhtar et al. 2024, "Croissant: A Metadata Format for ML-Ready Datasets", and the specifications
at http://mlcommons.org/croissant/1.0 and http://mlcommons.org/croissant/RAI/1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from latentdiff.data.lockfile import LOCKFILE, SCHEMA, SPLITS

CONFORMS_TO = ("http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0")
RECORDS = "samples"

# fmt: off
TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty",
    "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField",
    "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator",
    "source", "subField", "transform",
)
# fmt: on
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{name: f"cr:{name}" for name in TERMS},
}
"""The specification's appendix 1."""

FIELDS = {
    "key": "The sample's number in the downloaded shards, decimal digits.",
    "sample_id": "The first 16 hexadecimal digits of the sha256 of address and caption.",
    "url": "Where the picture was found.",
    "sha256": "Of the picture's file as it was downloaded.",
    "phash": "64-bit perceptual hash of the picture, 16 hexadecimal digits.",
    "status": "`kept`, or the reason why the sample is not part of the data set.",
    "duplicate_of": "The key of the sample that is there in its place.",
    "split": "`train` or `validation`; none where the sample is not kept.",
    "opt_out": "`allowed`, or the server's directive that forbids the use.",
    "caption": "The text beside the picture, as in the metadata.",
    "width": "Pixels, as decoded and turned upright.",
    "height": "Pixels, as decoded and turned upright.",
    "bytes": "Length of the picture's file.",
    "format": "Of the picture's file, such as JPEG.",
    "similarity": "Cosine of CLIP's embeddings of picture and caption, from the metadata.",
    "punsafe": "Estimated probability that the picture is unsafe, from the metadata.",
    "nsfw": "UNLIKELY, UNSURE or NSFW, from the metadata.",
    "pwatermark": "Estimated probability of a watermark, from the metadata.",
    "aesthetic_v1": "LAION's first aesthetic predictor, from the metadata.",
    "aesthetic_v2": "LAION's second aesthetic predictor, about 1 to 10, from the metadata.",
    "language": "Of the caption, from the metadata.",
    "license": "Of the picture, where the metadata names one.",
    "bucket": "The size that the picture is brought to in training, such as 512x704.",
}
"""What each column of a lockfile holds."""


def croissant(
    about: Mapping[str, Any], facts: Mapping[str, Any], rai: Mapping[str, str], lockfile: str
) -> dict[str, Any]:
    """The JSON-LD of a data set.

    about: name, description, license, url, version, and where they are known creator,
    datePublished, citeAs, inLanguage: properties of schema.org. facts: those of the lockfile.
    rai: properties of the RAI vocabulary, such as dataBiases. lockfile: its URL, or where it lies
    relative to this file. It is what is distributed: addresses and captions, no pictures.
    """
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": list(CONFORMS_TO),
        **about,
        **{f"rai:{name}": text for name, text in rai.items()},
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": LOCKFILE,
                "name": LOCKFILE,
                "description": "One row per selected sample: addresses, captions, hashes, scores.",
                "contentUrl": lockfile,
                "contentSize": f"{facts['lockfile']['bytes']} B",
                "encodingFormat": "application/x-parquet",
                "sha256": facts["lockfile"]["sha256"],
            }
        ],
        "recordSet": [_splits(), _samples(facts)],
    }


def _samples(facts: Mapping[str, Any]) -> dict[str, Any]:
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"{RECORDS}/{column.name}",
            "name": column.name,
            "description": FIELDS[column.name],
            "dataType": _type(column),
            "source": {"fileObject": {"@id": LOCKFILE}, "extract": {"column": column.name}},
        }
        for column in SCHEMA
    ]
    fields[SCHEMA.names.index("split")]["references"] = {"field": {"@id": "splits/name"}}
    return {
        "@type": "cr:RecordSet",
        "@id": RECORDS,
        "name": RECORDS,
        "description": f"The {facts['samples']:,} selected samples, of which "
        f"{facts['kept']['samples']:,} are kept.",
        "key": {"@id": f"{RECORDS}/key"},
        "field": fields,
    }


def _splits() -> dict[str, Any]:
    field = {"@type": "cr:Field", "@id": "splits/name", "name": "name", "dataType": "sc:Text"}
    return {
        "@type": "cr:RecordSet",
        "@id": "splits",
        "name": "splits",
        "description": "The values of the field split.",
        "dataType": "cr:Split",
        "key": {"@id": "splits/name"},
        "field": [field],
        "data": [{"splits/name": split} for split in SPLITS],
    }


def _type(column: pa.Field) -> str:
    if column.name == "url":
        return "sc:URL"
    if pa.types.is_integer(column.type):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(column.type) else "sc:Text"
