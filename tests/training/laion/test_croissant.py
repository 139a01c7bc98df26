"""Croissant: what the specification asks for is there, and its own library reads the lockfile."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from latentdiff.data.lockfile import LOCKFILE, SCHEMA
from tests.training.laion.lock_of import lock, rows
from training.laion.card import CardConfig, card
from training.laion.croissant import CONTEXT

CONFIG = CardConfig(creators=("A laboratory",), published=datetime.date(2026, 11, 21), citation="x")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The JSON-LD beside the lockfile that it describes, as they are published."""
    card(CONFIG.model_copy(update={"folder": tmp_path}), "tiny", lock(tmp_path / "data", rows()))
    return tmp_path / "tiny.croissant.json"


def identifiers(node: Any) -> list[str]:
    """Every @id that is defined: that of an object that says more."""
    if isinstance(node, list):
        return [found for each in node for found in identifiers(each)]
    if not isinstance(node, dict):
        return []
    mine = [node["@id"]] if len(node) > 1 and isinstance(node.get("@id"), str) else []
    return mine + [found for each in node.values() for found in identifiers(each)]


def references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [found for each in node for found in references(each)]
    if not isinstance(node, dict):
        return []
    if set(node) == {"@id"}:
        return [node["@id"]]
    return [found for each in node.values() for found in references(each)]


def test_what_the_specification_requires_is_there(written: Path) -> None:
    content = json.loads(written.read_text())
    assert content["@type"] == "sc:Dataset"
    assert "http://mlcommons.org/croissant/1.0" in content["conformsTo"]
    for key in ("name", "description", "license", "url", "creator", "datePublished"):
        assert content[key], key
    (file,) = content["distribution"]
    assert file["@type"] == "cr:FileObject"
    for key in ("@id", "name", "contentUrl", "encodingFormat", "sha256"):
        assert file[key], key
    lockfile = written.parent / file["contentUrl"]
    assert lockfile == written.parent / "tiny" / LOCKFILE
    assert file["contentSize"] == f"{lockfile.stat().st_size} B"
    for records in content["recordSet"]:
        assert records["@type"] == "cr:RecordSet"
        for field in records["field"]:
            assert field["@type"] == "cr:Field"
            assert field["@id"].startswith(f"{records['@id']}/")
            assert field["dataType"] in ("sc:Text", "sc:Integer", "sc:Float", "sc:URL")


def test_identifiers_are_unique_and_what_is_referred_to_is_defined(written: Path) -> None:
    content = json.loads(written.read_text())
    del content["@context"]
    defined = identifiers(content)
    assert len(defined) == len(set(defined))
    assert set(references(content)) <= set(defined)
    assert len(references(content)) > len(SCHEMA)


def test_every_column_of_the_file_is_a_field_of_its_type(written: Path) -> None:
    content = json.loads(written.read_text())
    fields = next(each["field"] for each in content["recordSet"] if each["@id"] == "samples")
    there = pq.read_schema(written.parent / "tiny" / LOCKFILE)
    assert [field["source"]["extract"]["column"] for field in fields] == there.names
    kinds = {"int32": "Integer", "int64": "Integer", "float": "Float", "string": "Text"}
    for field, column in zip(fields, there, strict=True):
        expected = "sc:URL" if column.name == "url" else f"sc:{kinds[str(column.type)]}"
        assert field["dataType"] == expected


def test_prefixes_have_their_addresses() -> None:
    assert CONTEXT["cr"] == "http://mlcommons.org/croissant/"
    assert CONTEXT["@vocab"] == CONTEXT["sc"] == "https://schema.org/"
    assert CONTEXT["rai"] == "http://mlcommons.org/croissant/RAI/"


def test_mlcroissant_finds_no_fault_and_reads_the_lockfile(written: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    dataset = mlcroissant.Dataset(jsonld=str(written))
    assert not dataset.metadata.ctx.issues.errors
    assert not dataset.metadata.ctx.issues.warnings
    assert "pictures" in dataset.metadata.personal_sensitive_information[0]
    read = list(dataset.records("samples"))
    expected = pq.read_table(written.parent / "tiny" / LOCKFILE).to_pylist()
    assert len(read) == len(expected) == 60
    for record, row in zip(read, expected, strict=True):
        for name, value in row.items():
            there = record[f"samples/{name}"]
            assert (there.decode() if isinstance(there, bytes) else there) == value
    splits = [record["splits/name"] for record in dataset.records("splits")]
    assert [each.decode() if isinstance(each, bytes) else each for each in splits] == [
        "train",
        "validation",
    ]


def test_mlcroissant_refuses_another_lockfile(written: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    lock(written.parent / "tiny", rows(59))
    with pytest.raises(mlcroissant.GenerationError, match="Download") as raised:
        list(mlcroissant.Dataset(jsonld=str(written)).records("samples"))
    assert "hash" in str(raised.value.__cause__).lower()
