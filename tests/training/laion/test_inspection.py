"""Files are looked into by a process that can do nothing else, and told by their own reasons."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from latentdiff.data.decode import MAX_PIXELS, decode
from tests.training.laion import hostile
from training.laion import inspection as module
from training.laion.inspection import InspectConfig, Inspected, Inspector, Inspectors

ROOT = Path(__file__).parents[3]
CORPUS = hostile.corpus()


@pytest.fixture(scope="module")
def inspector() -> Iterator[Inspector]:
    made = Inspector(InspectConfig())
    yield made
    made.close()


def peak_bytes(pid: int | None) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmPeak:"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("name", CORPUS)
def test_each_file_has_its_own_reason(inspector: Inspector, name: str) -> None:
    case = CORPUS[name]
    found = inspector(case.data)
    assert found.reason == case.reason
    if case.reason is None:
        assert (found.width, found.height) == case.size
        assert found.format == case.format
        assert decode(case.data).size == case.size
    assert peak_bytes(inspector.pid) <= inspector.config.decode_memory << 20


def test_one_decoder_is_used_again_and_again(inspector: Inspector) -> None:
    inspector(CORPUS["jpeg"].data)
    pid = inspector.pid
    for name in ("truncated jpeg", "svg", "webp promising a canvas", "png"):
        inspector(CORPUS[name].data)
    assert inspector.pid == pid


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["jpeg", "png", "webp", "gif", "icc", "animated webp"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    kept=st.floats(0, 1),
)
def test_what_is_accepted_decodes(
    inspector: Inspector, name: str, changes: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(CORPUS[name].data)
    for place, value in changes:
        data[int(place * len(data))] = value
    found = inspector(bytes(data[: int(kept * len(data)) or 1]))
    if found.reason is None:
        picture = decode(bytes(data[: int(kept * len(data)) or 1]))
        assert picture.size == (found.width, found.height)


def test_pictures_leave_nothing_for_the_next_one() -> None:
    """Their colour profiles, for one, which would fill the memory."""
    made = Inspector(InspectConfig(decode_memory=256))
    try:
        pid = None
        for number in range(40):
            found = made(hostile.profiled(bytes([number]) * (4 << 20)))
            assert found == Inspected(None, hostile.WIDTH, hostile.HEIGHT, "JPEG"), number
            pid = pid or made.pid
        assert made.pid == pid
    finally:
        made.close()


def test_formats_can_be_fewer() -> None:
    made = Inspector(InspectConfig(formats=("JPEG",), max_pixels=100 * 100))
    try:
        assert made(CORPUS["jpeg"].data).reason is None
        assert made(CORPUS["webp"].data).reason == "format"
        assert made(hostile.encoded(hostile.picture(size=(101, 100)), "JPEG")).reason == (
            "too many pixels"
        )
    finally:
        made.close()


def test_memory_has_a_limit() -> None:
    made = Inspector(InspectConfig(decode_memory=256, max_pixels=MAX_PIXELS))
    try:
        assert made(hostile.png(7000, 7000)).reason == "decode out of memory"
        assert made(b"\xff\xd8\xff" + bytes(300 << 20)).reason == "decode out of memory"
        assert made(CORPUS["jpeg"].data).reason is None
        assert peak_bytes(made.pid) <= 256 << 20
    finally:
        made.close()


def test_processor_time_has_a_limit() -> None:
    made = Inspector(InspectConfig(decode_seconds=1))
    data = hostile.many_scans(5000)
    assert len(data) < 16 << 20
    try:
        assert made(data).reason == "decode timeout"
        assert made(CORPUS["jpeg"].data).reason is None
    finally:
        made.close()


def meanwhile(made: Inspector, do: list[signal.Signals]) -> Inspected:
    """Inspect a picture with a decoder that stands still, and then is sent signals."""
    assert made(CORPUS["jpeg"].data).reason is None
    assert made.pid is not None
    os.kill(made.pid, signal.SIGSTOP)

    def later(pid: int) -> None:
        time.sleep(0.3)
        for one in do:
            os.kill(pid, one)

    thread = threading.Thread(target=later, args=(made.pid,))
    thread.start()
    found = made(CORPUS["jpeg"].data)
    thread.join()
    return found


def test_a_crash_is_the_pictures_own_and_the_next_one_is_fine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Inspector(InspectConfig(decode_seconds=1))
    try:
        assert meanwhile(made, [signal.SIGKILL]).reason == "decode crashed"
        assert made(CORPUS["jpeg"].data).reason is None
        monkeypatch.setattr(module, "WALL", 0.8)
        assert meanwhile(made, []).reason == "decode timeout"
        assert made(CORPUS["jpeg"].data).reason is None
    finally:
        made.close()


def test_a_decoder_that_died_between_pictures_costs_none() -> None:
    made = Inspector(InspectConfig())
    try:
        assert made(CORPUS["jpeg"].data).reason is None
        assert made.pid is not None
        os.kill(made.pid, signal.SIGKILL)
        os.waitid(os.P_PID, made.pid, os.WEXITED | os.WNOWAIT)
        assert made(CORPUS["jpeg"].data).reason is None
    finally:
        made.close()


def test_closing_ends_the_decoders() -> None:
    made = Inspectors(InspectConfig(), 2)
    made(CORPUS["jpeg"].data)
    made(CORPUS["png"].data)
    pids = [inspector.pid for inspector in made._all]
    assert None not in pids
    made.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)  # type: ignore[arg-type]


def test_one_that_does_not_start_is_nobodys_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        Inspector(InspectConfig())(CORPUS["jpeg"].data)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"reason": "because"},
        {"reason": 4},
        {"width": 3, "height": 3},
        {"width": -3, "height": -3, "format": "PNG"},
        {"width": 10**6, "height": 10**6, "format": "PNG"},
        {"width": "3", "height": 3, "format": "PNG"},
        {"width": 3, "height": 3, "format": "SVG"},
    ],
)
def test_answers_that_make_no_sense_are_not_believed(answer: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no answer"):
        module._inspected(answer)


CONFINED = """
import json, os, resource, socket, sys
from training.laion.decoder import confine
confine(1 << 30)
os.close(2)
done = []
def attempt(name, what):
    try:
        what()
        done.append(name)
    except (OSError, MemoryError, ValueError):
        pass
for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
    attempt("limit", lambda: resource.setrlimit(limit, (64, 64)))
attempt("memory limit", lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)))
attempt("copy", lambda: os.dup(0))
attempt("read", lambda: open("pyproject.toml"))
attempt("write", lambda: open("escaped", "w"))
attempt("socket", socket.socket)
attempt("pipe", os.pipe)
attempt("memory", lambda: bytearray(2 << 30))
os.write(1, json.dumps(done).encode())
os.execv(sys.executable, [sys.executable, "-c", "print('another program')"])
"""


def test_a_decoder_reaches_nothing(tmp_path: Path) -> None:
    """Not even a file that its user may read."""
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CONFINED],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert json.loads(done.stdout) == []
    assert done.returncode != 0


def test_a_decoder_has_no_privileges(inspector: Inspector) -> None:
    inspector(CORPUS["jpeg"].data)
    lines = Path(f"/proc/{inspector.pid}/status").read_text().splitlines()
    values = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert values["NoNewPrivs"] == "1"
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(values[name], 16) == 0


def test_the_environment_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    made = Inspector(InspectConfig())
    try:
        made(CORPUS["jpeg"].data)
        assert b"hidden" not in Path(f"/proc/{made.pid}/environ").read_bytes()
    finally:
        made.close()


def test_previews_behind_a_photograph_do_not_animate_it(inspector: Inspector) -> None:
    file = io.BytesIO()
    hostile.picture().save(file, "MPO", save_all=True, append_images=[hostile.picture(seed=1)])
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        assert opened.format == "MPO"
    assert inspector(file.getvalue()) == Inspected(None, hostile.WIDTH, hostile.HEIGHT, "JPEG")
