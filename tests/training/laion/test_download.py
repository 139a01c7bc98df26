"""A hostile web ends in shards that hold good pictures alone, and in a reason for all others."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentdiff.config import save_yaml
from latentdiff.errors import InputError
from tests.training.laion import hostile
from tests.training.laion.conftest import Web
from training import alone
from training.laion import download as module
from training.laion import workers
from training.laion.download import REASONS, DownloadConfig, download

ROOT = Path(__file__).parents[3]
CORPUS = hostile.corpus()
MAX_BYTES = 4 << 20
SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("similarity", pa.float32()),
        ("sha256", pa.string()),
    ]
)


def selection(directory: Path, rows: list[dict[str, Any]], parts: int = 1) -> None:
    folder = directory / "selected"
    folder.mkdir(parents=True)
    each = -(-len(rows) // parts)
    for part in range(parts):
        table = pa.Table.from_pylist(rows[part * each : (part + 1) * each], SCHEMA)
        pq.write_table(table, folder / f"part-{part:05d}.parquet")
    (folder / "manifest.json").write_text(json.dumps({"rows": len(rows)}))


def row(number: int, url: str, caption: str | None = "a picture", **others: Any) -> dict[str, Any]:
    return {"sample_id": f"{number:016x}", "url": url, "caption": caption} | others


def settings(web: Web, **options: Any) -> DownloadConfig:
    usual = {
        "local_hosts": (web.host,),
        "timeout": 2,
        "deadline": 3,
        "retries": 0,
        "max_bytes": MAX_BYTES,
        "threads": 4,
        "shard_size": 10,
    }
    return DownloadConfig(**(usual | options))


def found(directory: Path) -> dict[str, dict[str, Any]]:
    """All rows of all shards by sample_id."""
    tables = [pq.read_table(file) for file in sorted((directory / "images").glob("*.parquet"))]
    rows = pa.concat_tables(tables).to_pylist()
    assert len({one["key"] for one in rows}) == len(rows)
    return {one["sample_id"]: one for one in rows}


def members(directory: Path) -> dict[str, bytes]:
    held: dict[str, bytes] = {}
    for file in sorted((directory / "images").glob("*.tar")):
        with tarfile.open(file) as archive:
            for member in archive:
                assert member.isreg()
                assert member.name not in held
                content = archive.extractfile(member)
                assert content is not None
                held[member.name] = content.read()
    return held


RUN = """
import json, resource, sys
from pathlib import Path
from latentdiff.config import load_yaml
from training.laion.download import DownloadConfig, download
if __name__ == "__main__":
    counts = download(load_yaml(DownloadConfig, sys.argv[1]), Path(sys.argv[2]))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print("\\n" + json.dumps({"counts": counts, "peak": peak << 10}))
"""


def test_a_hostile_web(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own, as a user runs it, twice."""
    expected: list[str | None] = []
    rows: list[dict[str, Any]] = []

    def add(url: str, reason: str | None, **others: Any) -> None:
        rows.append(row(len(rows), url, **others))
        expected.append(reason)

    for name, case in CORPUS.items():
        add(web.add(f"/{name.replace(' ', '-')}.jpg", case.data), case.reason)
    jpeg = CORPUS["jpeg"].data
    digest = hashlib.sha256(jpeg).hexdigest()
    add(web.add("/known.jpg", jpeg), None, sha256=digest.upper(), width=999, height=1)
    add(web.add("/changed.jpg", jpeg), "hash mismatch", sha256="0" * 64)
    add(web.add("/../../../../escaped.jpg", jpeg), None, caption="../../escaped")
    add(web.url("/..%2F..%2Fescaped"), "404", caption="/etc/passwd\0\n" + "x" * 70_000)
    web.add("/odd.jpg", jpeg)
    add(web.url("/odd.jpg"), None, caption=None)
    add(web.add("/html.jpg", b"<html>", headers=(("Content-Type", "text/html"),)), "content type")
    add(web.add("/no.jpg", jpeg, headers=(("X-Robots-Tag", "noai"),)), "opted out")
    add(web.add("/gone.jpg", status=410), "410")
    add(web.add("/forbidden.jpg", status=403), "403")
    add(web.add("/broken.jpg", status=500), "http error")
    add(web.add("/short.jpg", jpeg, length=len(jpeg) + 9), "truncated")
    add(web.endless("/endless.jpg", b"\xff" * 65536), "too many bytes")
    add(web.endless("/drip.jpg", b"\xff", seconds=0.05), "timeout")
    add(web.silent("/silent.jpg"), "timeout")
    packed = (("Content-Type", "image/png"), ("Content-Encoding", "gzip"))
    add(web.add("/packed.png", b"\x1f\x8b", headers=packed), "content encoding")
    add(web.redirect("/away.jpg", "http://169.254.169.254/latest/"), "private address")
    add(web.redirect("/round.jpg", "/round.jpg"), "redirects")
    add("http://127.0.0.1:1/a.jpg", "private address")
    add("http://2130706433/a.jpg", "private address")
    add("http://[::1]/a.jpg", "private address")
    add("http://10.0.0.1/a.jpg", "private address")
    add("file:///etc/passwd", "scheme")
    add("http://user:word@example.org/", "bad url")
    selection(tmp_path, rows, parts=2)

    config = tmp_path / "download.yaml"
    save_yaml(settings(web, shard_size=40), config)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    command = [sys.executable, "-c", RUN, str(config), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout.splitlines()[-1])

    assert printed["counts"] == Counter(reason or "success" for reason in expected)
    # Python with img2dataset, and the files on their way: 3 x threads x max_bytes. A decoder may
    # take more only of addresses, and of those no more than its own limit.
    assert printed["peak"] <= 700 << 20
    made = found(tmp_path)
    reasons = {one["sample_id"]: reason for one, reason in zip(rows, expected, strict=True)}
    assert {name: one["error_message"] for name, one in made.items()} == reasons
    assert {one["sample_id"]: one["url"] for one in made.values()} == {
        one["sample_id"]: one["url"] for one in rows
    }
    held = members(tmp_path)
    kept = {one["key"]: one for one in made.values() if one["status"] == "success"}
    assert set(held) == {f"{key}.{ending}" for key in kept for ending in ("jpg", "txt", "json")}
    for key, one in kept.items():
        body = held[f"{key}.jpg"]
        assert one["sha256"] == hashlib.sha256(body).hexdigest()
        assert one["bytes"] == len(body)
        assert one["opt_out"] == "allowed"
        assert one["http_status"] == 200
        assert held[f"{key}.txt"].decode() == (one["caption"] or "")
        assert json.loads(held[f"{key}.json"]) == one
    for one, (name, case) in zip(rows, CORPUS.items(), strict=False):
        entry = made[one["sample_id"]]
        if case.reason is None:
            assert held[f"{entry['key']}.jpg"] == case.data, name
            assert (entry["original_width"], entry["original_height"]) == case.size
            assert entry["format"] == case.format
    (known,) = (one for one in made.values() if one["url"].endswith("known.jpg"))
    assert (known["meta_width"], known["meta_height"]) == (999, 1)
    assert (known["meta_sha256"], known["sha256"]) == (digest.upper(), digest)
    (refused,) = (one for one in made.values() if one["error_message"] == "opted out")
    assert (refused["opt_out"], refused["status"]) == ("noai", "failed_to_download")

    images = {path for path in (tmp_path / "images").rglob("*") if path.is_file()}
    assert {path.name for path in images} == {
        f"{shard:05d}{ending}"
        for shard in range(2)
        for ending in (".tar", ".parquet", "_stats.json")
    }
    own = {tmp_path / module.RECORD}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before | images | own
    assert not list(tmp_path.parent.glob("**/escaped*"))

    web.requests.clear()
    content = {path: path.read_bytes() for path in images}
    assert download(settings(web, shard_size=40), tmp_path) == printed["counts"]
    assert "success" in capsys.readouterr().out
    assert not web.requests
    assert {path: path.read_bytes() for path in images} == content


# Killed at random


def content(directory: Path) -> tuple[dict[str, dict[str, Any]], dict[str, bytes]]:
    return found(directory), members(directory)


def processes_of(parent: int) -> list[int]:
    """Those that it began, but for multiprocessing's own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, above = stat.read_text().rpartition(")")[2].split()[:2]
            command = stat.with_name("cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if int(above) == parent and state != "Z" and b"resource_tracker" not in command:
            found.append(int(stat.parent.name))
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_at_random_and_finished(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step or one of its workers, after some answers and a moment: the same rows and files."""
    import training.laion.guarded  # noqa: F401  once, for all that fork from here

    monkeypatch.setattr(workers, "START", "fork")
    fork, chance = multiprocessing.get_context("fork"), random.Random(0)
    rows = []
    for number in range(60):
        data = hostile.encoded(hostile.picture(seed=number), "JPEG")
        url = web.add(f"/{number}", data, status=404 if number % 7 == 3 else 200)
        rows.append(row(number, url, f"number {number}"))
    config = settings(web, processes=2, shard_size=10, host_interval=0.02)
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    for directory in (whole, ended):
        selection(directory, rows, parts=2)

    def begin(directory: Path) -> multiprocessing.process.BaseProcess:
        web.requests.clear()
        gc.collect()
        process = fork.Process(target=download, args=(config, directory))
        process.start()
        return process

    undisturbed = begin(whole)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    codes = []
    for victim in ("step", "worker") * 3:
        process = begin(ended)
        assert process.pid is not None
        after = chance.randrange(1, 8)
        while len(web.requests) < after and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        begun = processes_of(process.pid)
        if not begun:
            process.join()
            break
        with suppress(ProcessLookupError):
            os.kill(process.pid if victim == "step" else chance.choice(begun), signal.SIGKILL)
        process.join()
        while any(map(runs, begun)):
            time.sleep(0.01)
        codes.append(process.exitcode)
        for file in (ended / "images").glob("*_stats.json"):  # what has its statistics is whole
            name = file.name.partition("_")[0]
            table = pq.read_table(file.with_name(f"{name}.parquet"))
            with tarfile.open(file.with_name(f"{name}.tar")) as archive:
                kept = [one for one in table["status"].to_pylist() if one == "success"]
                assert len(archive.getnames()) == 3 * len(kept)
    assert codes[:2] == [-signal.SIGKILL, 1]
    last = begin(ended)
    last.join()
    assert last.exitcode == 0
    assert not (ended / "images" / "_tmp").exists()
    assert content(ended) == content(whole)
    assert len(found(whole)) == 60


# What is refused


def test_nothing_selected(web: Web, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the step select first"):
        download(settings(web), tmp_path)


def test_another_selection_or_other_shards(web: Web, tmp_path: Path) -> None:
    selection(tmp_path, [row(0, web.add("/a.jpg", CORPUS["jpeg"].data))])
    module._check_record(settings(web), tmp_path)
    with pytest.raises(InputError, match="another selection or shard_size"):
        download(settings(web, shard_size=20), tmp_path)
    (tmp_path / "selected" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="another selection or shard_size"):
        download(settings(web), tmp_path)


def test_two_at_a_time(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "PATIENCE", 0.1)
    selection(tmp_path, [row(0, web.url("/a.jpg"))])
    with alone.alone_in(tmp_path), pytest.raises(InputError, match="Another process"):
        download(settings(web), tmp_path)


def test_what_is_not_installed(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selection(tmp_path, [row(0, web.url("/a.jpg"))])
    missing = {
        "img2dataset": r"latentdiff\[laion\]",
        "pyspark": "pip install pyspark",
        "ray": "ray",
    }
    for name, message in missing.items():
        monkeypatch.setattr(
            module.importlib.util, "find_spec", lambda one, name=name: one != name or None
        )
        distributor = "multiprocessing" if name == "img2dataset" else name
        with pytest.raises(InputError, match=message):
            download(settings(web, distributor=distributor), tmp_path)


def test_more_shards_than_names(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selection(tmp_path, [row(number, web.url("/a.jpg")) for number in range(30)])
    monkeypatch.setattr(module, "MAX_SHARDS", 2)
    with pytest.raises(InputError, match="raise shard_size"):
        download(settings(web), tmp_path)


def test_shards_that_fail_for_good(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection(tmp_path, [row(0, web.url("/a.jpg"))])
    monkeypatch.setattr(module, "_run", lambda *_: None)
    with pytest.raises(InputError, match="1 of 1 shards failed"):
        download(settings(web), tmp_path)


def test_workers_need_not_be_where_the_step_is(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection(tmp_path, [row(0, web.url("/a.jpg"))])
    given: list[Path] = []
    monkeypatch.setattr(module, "_run", lambda _, part, images, done: given.extend((part, images)))
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(InputError, match="1 of 1 shards failed"):
        download(settings(web), Path(tmp_path.name))
    assert given == [tmp_path / "selected" / "part-00000.parquet", tmp_path / "images"]


def test_reasons_are_named_once() -> None:
    assert len(set(REASONS)) == len(REASONS)
    assert {case.reason for case in CORPUS.values()} - {None} <= set(REASONS)
