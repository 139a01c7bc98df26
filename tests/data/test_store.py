"""Files by name, wherever they are: on disk, in memory, behind HTTP, in a real S3 server."""

from __future__ import annotations

import errno
import functools
import http.server
import io
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from latentdiff.data import store as store_module
from latentdiff.data.store import LocalCopy, Store
from latentdiff.errors import InputError

HELD = 4

forked = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _no_pauses_and_few_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "HELD", HELD)
    monkeypatch.setattr(store_module, "PAUSE", 0.0)


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> str:
    return f"memory://{request.node.name}"


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The endpoint of a server on this machine that speaks S3, with an empty bucket "data"."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "id")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            s3fs.S3FileSystem.clear_instance_cache()
            s3fs.S3FileSystem().mkdir("data")
            yield "s3://data"
            s3fs.S3FileSystem.clear_instance_cache()
    finally:
        server.stop()


@pytest.fixture(params=["directory", "file URL", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_server')}/{request.node.name}"
    if request.param == "memory":
        return f"memory://{request.node.name}"
    folder = tmp_path / "a store"
    return str(folder) if request.param == "directory" else folder.as_uri()


def test_what_is_written_can_be_read(url: str, tmp_path: Path) -> None:
    store = Store(url, tmp_path / "local")
    assert store.names() == []
    assert not store.exists("b/two.bin")
    file = tmp_path / "two.bin"
    file.write_bytes(bytes(range(256)) * 1000)
    store.write("one.json", b"{}")
    Store(f"{url}0", tmp_path / "local").write("neighbour", b"")  # whose name begins alike
    store.write("b/two.bin", file)
    store.write("empty", b"")

    other = Store(url, tmp_path / "elsewhere")
    assert other.names() == ["b/two.bin", "empty", "one.json"]
    assert other.exists("b/two.bin")
    assert not other.exists("b")
    for name, content in [
        ("one.json", b"{}"),
        ("b/two.bin", file.read_bytes()),
        ("empty", b""),
    ]:
        assert other.read_bytes(name) == content
        assert other.local(name).read_bytes() == content
    assert np.memmap(other.local("b/two.bin"), np.uint8, "r")[-1] == 255


def test_a_file_written_anew_is_read_anew(url: str, tmp_path: Path) -> None:
    store = Store(url, tmp_path / "local")
    store.write("name", b"first")
    assert store.local("name").read_bytes() == b"first"
    store.write("name", b"other")
    assert store.exists("name")
    assert store.local("name").read_bytes() == store.read_bytes("name") == b"other"


def test_missing_files_and_large_ones_are_said_so(url: str, tmp_path: Path) -> None:
    store = Store(url, tmp_path / "local")
    store.write("other", b"12345")
    for read in (store.local, store.read_bytes):
        with pytest.raises(InputError, match="holds no file missing"):
            read("missing")
    assert store.read_bytes("other", max_bytes=5) == b"12345"
    with pytest.raises(InputError, match="larger than 4 bytes"):
        store.read_bytes("other", max_bytes=4)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/"])
def test_names_stay_inside(url: str, tmp_path: Path, name: str) -> None:
    store = Store(url, tmp_path / "local")
    calls: list[Callable[[], object]] = [
        lambda: store.local(name),
        lambda: store.read_bytes(name),
        lambda: store.exists(name),
        lambda: store.write(name, b""),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no name of a file"):
            call()


def test_over_http(tmp_path: Path) -> None:
    served = tmp_path / "served"
    Store(served).write("deep/file", b"content" * 10_000)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=served)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        store = Store(f"http://127.0.0.1:{server.server_port}", tmp_path / "local")
        assert store.local("deep/file").read_bytes() == b"content" * 10_000
        assert store.exists("deep/file")
        assert not store.exists("deep/other")
        with pytest.raises(InputError, match="holds no file deep/other"):
            store.local("deep/other")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_unknown_places_are_refused_at_once() -> None:
    with pytest.raises(InputError, match="nonsense://x cannot be opened"):
        Store("nonsense://x")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.write("name", b"whole")
    with pytest.raises(FileNotFoundError):
        store.write("name", tmp_path / "missing")
    assert store.read_bytes("name") == b"whole"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["name"]


def test_a_store_travels_to_other_processes(memory: str, tmp_path: Path) -> None:
    store = Store(memory, tmp_path, local_bytes=5)
    store.write("name", b"content")
    store.local("name")
    other = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert other.local("name") == store.local("name")


# What a network does.


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the next downloads go wrong, one after the other."""
    faults: list[str] = []
    whole = MemoryFileSystem.get_file

    def get_file(self: MemoryFileSystem, remote: str, target: str) -> None:
        fault = faults.pop(0) if faults else ""
        if fault == "refused":
            raise PermissionError("Forbidden")
        if fault == "lost":
            raise ConnectionResetError(errno.ECONNRESET, "connection reset by peer")
        if fault == "full":
            Path(target).write_bytes(b"ha")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, remote, target)
        if fault == "cut":
            os.truncate(target, 2)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return faults


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_a_faulty_network_is_asked_again(memory: str, tmp_path: Path, flaky: list[str]) -> None:
    store = Store(memory, tmp_path)
    store.write("name", b"content")
    flaky += ["lost", "cut", "lost"]
    assert store.local("name").read_bytes() == b"content"
    assert kept(tmp_path) == [store.local("name")]


@pytest.mark.parametrize(("fault", "error"), [("lost", ConnectionResetError), ("cut", OSError)])
def test_and_given_up_in_the_end(
    memory: str, tmp_path: Path, flaky: list[str], fault: str, error: type[Exception]
) -> None:
    store = Store(memory, tmp_path)
    store.write("name", b"content")
    flaky += [fault] * store_module.ATTEMPTS
    with pytest.raises(error):
        store.local("name")
    assert kept(tmp_path) == []
    assert store.local("name").read_bytes() == b"content"


def test_a_full_disk_and_a_refusal_are_said_so(
    memory: str, tmp_path: Path, flaky: list[str]
) -> None:
    store = Store(memory, tmp_path)
    store.write("name", b"content")
    for fault, message in (("full", "is full; free 7 bytes"), ("refused", "credentials")):
        flaky.append(fault)
        with pytest.raises(InputError, match=message):
            store.local("name")
        assert kept(tmp_path) == []


def test_a_network_that_fails_is_not_an_absent_file(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(self: MemoryFileSystem, path: str) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    with pytest.raises(ConnectionResetError):
        Store(memory, tmp_path).exists("name")


def test_of_a_file_of_unknown_length_no_more_is_fetched_than_may_be(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(memory, tmp_path)
    store.write("name", b"x" * 100)
    real = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda fs, path: real(fs, path) | {"size": None})
    monkeypatch.setattr(MemoryFileSystem, "cat_file", None)
    assert store.read_bytes("name", max_bytes=100) == b"x" * 100
    read: list[int] = []
    begin = store_module._begin
    monkeypatch.setattr(
        store_module, "_begin", lambda *asked: read.append(len(got := begin(*asked))) or got
    )
    with pytest.raises(InputError, match="larger than 9 bytes"):
        store.read_bytes("name", max_bytes=9)
    assert read == [10]


def test_tables_are_read_or_said_to_be_damaged(url: str, tmp_path: Path) -> None:
    store = Store(url, tmp_path / "local")
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1, 2], "b": [3, 4]}), sink)
    store.write("whole", sink.getvalue())
    assert store.read_table("whole", ["b"]).to_pydict() == {"b": [3, 4]}
    store.write("cut", sink.getvalue()[:-1])
    store.write("thrift", sink.getvalue()[:-12] + b"\xff" * 4 + sink.getvalue()[-8:])
    for name in ("cut", "thrift", "absent"):
        with pytest.raises(store_module.UnusableFileError, match=name):
            store.read_table(name)


# The local copy.


def writer(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def test_the_least_recently_used_make_way(tmp_path: Path) -> None:
    copy = LocalCopy(tmp_path, 6000)
    for number in range(20):
        path = copy.get(f"{number}", 1000, writer(bytes([number]) * 1000))
        assert path.read_bytes() == bytes([number]) * 1000
        os.utime(path, ns=(number, number))  # a clock that is fine enough for this
        assert sum(file.stat().st_size for file in kept(tmp_path)) == min(6, number + 1) * 1000
    assert {path.name for path in kept(tmp_path)} == {str(number) for number in range(14, 20)}


def test_asking_again_keeps_a_file(tmp_path: Path) -> None:
    copy = LocalCopy(tmp_path, 6000)
    for number in range(12):
        path = copy.get(f"{number}", 1000, writer(b"x" * 1000))
        os.utime(path, ns=(number, number))
        copy.get("0", 1000, writer(b"again"))
    assert (tmp_path / "0").read_bytes() == b"x" * 1000


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    """Held files outlast the bound; what has been mapped stays readable when its file is gone."""
    copy = LocalCopy(tmp_path, 1)
    first = copy.get("0", 1000, writer(b"0" * 1000))
    mapped = np.memmap(first, np.uint8, "r")
    for number in range(1, HELD):
        copy.get(f"{number}", 1000, writer(b"x" * 1000))
    assert len(kept(tmp_path)) == HELD
    copy.get("one", 1000, writer(b"x" * 1000))  # lets go of the first
    copy.get("two", 1000, writer(b"x" * 1000))
    assert not first.exists()
    assert len(kept(tmp_path)) == HELD + 1  # the one that "two" let go of is still there
    assert bytes(mapped) == b"0" * 1000


def test_what_another_process_uses_stays(tmp_path: Path) -> None:
    other = LocalCopy(tmp_path, 1)  # locks belong to open files: this is as good as a process
    used = other.get("used", 10, writer(b"0123456789"))
    copy = LocalCopy(tmp_path, 1)
    for number in range(10):
        copy.get(f"{number}", 10, writer(b"x" * 10))
    assert used.read_bytes() == b"0123456789"
    del other
    copy.get("last", 10, writer(b"x" * 10))
    assert not used.exists()


def content(name: str) -> bytes:
    return (name * 500).encode()


def ask(folder: Path, seed: int, log: Path) -> None:
    """Ask for 60 files of 8, of which 3 fit, and look at each."""
    rng = random.Random(seed)
    copy = LocalCopy(folder, 1500)

    def fetch(name: str, path: Path) -> None:
        with path.open("wb") as file:
            file.write(content(name)[:200])
            time.sleep(0.001)
            file.write(content(name)[200:])
        with log.open("a") as lines:
            lines.write(f"{name}\n")

    for _ in range(60):
        name = str(rng.randrange(8))
        path = copy.get(name, 500, functools.partial(fetch, name))
        assert path.read_bytes() == content(name)


def run(*targets: Callable[[], None]) -> list[int | None]:
    """Exit statuses of processes that run at the same time."""
    processes = [forked.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_processes_share_a_folder(tmp_path: Path) -> None:
    log = tmp_path / "log"
    folder = tmp_path / "folder"
    assert run(*(functools.partial(ask, folder, seed, log) for seed in range(4))) == [0] * 4
    assert len(kept(folder)) <= 4 * HELD
    assert not [path for path in kept(folder) if path.name.startswith(".")]


def test_threads_share_a_store(memory: str, tmp_path: Path) -> None:
    store = Store(memory, tmp_path, local_bytes=1500)
    for name in "abcdefgh":
        store.write(name, content(name))
    read: list[bool] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(50):
            name = rng.choice("abcdefgh")
            read.append(store.local(name).read_bytes() == content(name))

    users = [threading.Thread(target=use, args=(seed,)) for seed in range(HELD)]
    for user in users:
        user.start()
    for user in users:
        user.join(60)
    assert read == [True] * 50 * HELD


def test_a_file_is_fetched_once_for_all_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def fetch(path: Path) -> None:
        with log.open("a") as lines:
            lines.write("fetched\n")
        time.sleep(0.2)
        path.write_bytes(b"content")

    def get() -> None:
        assert LocalCopy(tmp_path / "folder", 100).get("name", 7, fetch).read_bytes() == b"content"

    assert run(*[get] * 4) == [0] * 4
    assert log.read_text() == "fetched\n"


def test_a_process_killed_while_it_fetches_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    def fetch(path: Path) -> None:
        path.write_bytes(b"half of ")
        os.kill(os.getpid(), signal.SIGKILL)

    for name in ("same", "other"):
        killed = functools.partial(LocalCopy(tmp_path, 100).get, name, 90, fetch)
        assert run(killed) == [-signal.SIGKILL]  # type: ignore[arg-type]
    # The second has cleared up after the first.
    assert [path.name for path in kept(tmp_path)] == [".other.new", ".other.part"]
    copy = LocalCopy(tmp_path, 100)
    assert copy.get("same", 90, writer(b"s" * 90)).read_bytes() == b"s" * 90
    assert kept(tmp_path) == [tmp_path / "same"]
