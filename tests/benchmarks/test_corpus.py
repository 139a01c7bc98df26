"""The corpus: drawings behind limits, pictures as the web has them, a server of known paths."""

from __future__ import annotations

import http.client
import io
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.corpus.behaviour import BEHAVIOURS
from benchmarks.corpus.drawings import Drawing, Rasteriser, describe, sprites
from benchmarks.corpus.make import TRUTH
from benchmarks.corpus.pictures import ENCODINGS, again, encode, place
from benchmarks.corpus.serve import served
from latentdiff.data.decode import decode

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="40pt" height="20pt" viewBox="0 0 40 20"
  xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
  xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:cc="http://web.resource.org/cc/"><metadata>
  <rdf:RDF><cc:Work><dc:title>Red_Bar</dc:title>
  <dc:creator><cc:Agent><dc:title>A. Nybody</dc:title></cc:Agent></dc:creator>
  <dc:subject><rdf:Bag><rdf:li>shape</rdf:li><rdf:li>a. nybody</rdf:li><rdf:li></rdf:li></rdf:Bag>
  </dc:subject></cc:Work></rdf:RDF></metadata><rect width="20" height="20" fill="red"/></svg>"""
LAUGHS = (
    '<!DOCTYPE svg [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 40}">' for n in range(9))
    + ']><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><text>&j;</text></svg>'
)


def test_metadata_of_an_svg_are_its_title_and_subjects(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text(SVG)
    assert describe(tmp_path / "a.svg") == ("red bar", ["shape"])
    (tmp_path / "laughs.svg").write_text(LAUGHS)
    assert describe(tmp_path / "laughs.svg") == ("", [])
    (tmp_path / "none.svg").write_bytes(b"\x00")
    assert describe(tmp_path / "none.svg") == ("", [])


def test_drawings_that_cannot_be_drawn_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    from benchmarks.corpus.drawings import openclipart

    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "bar.svg").write_text(SVG)
    (tmp_path / "shapes" / "laughs.svg").write_text(LAUGHS)
    (tmp_path / "shapes" / "nothing.svg").write_text("<svg/>")
    (tmp_path / "shapes" / "zebra.svg").write_text(SVG.replace("Red_Bar", "Clipart by A"))
    found = list(openclipart(tmp_path, 80))
    assert [drawing.name for drawing in found] == ["shapes/bar.svg", "shapes/zebra.svg"]
    assert [drawing.caption for drawing in found] == ["red bar, shape", "zebra, shape"]
    pixels = np.asarray(found[0].picture)
    assert abs(pixels.shape[0] - 40) <= 1
    assert pixels.shape[1:] == (80, 4)
    assert pixels[20, 10].tolist() == [255, 0, 0, 255]
    assert pixels[20, 70].tolist() == [0, 0, 0, 0]


def test_a_child_that_was_killed_costs_one_drawing(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    file = tmp_path / "bar.svg"
    file.write_text(SVG)
    with Rasteriser() as rasteriser:
        child = rasteriser.begin()
        child.process.kill()
        child.process.join()
        assert rasteriser.draw(file, 80) is None
        picture = rasteriser.draw(file, 80)
    assert picture is not None
    assert picture.width == 80


def test_a_caption_says_nothing_twice() -> None:
    nothing = Image.new("RGBA", (1, 1))
    assert Drawing("a", "red fox", ("fox", "animal"), nothing).caption == "red fox, animal"
    assert Drawing("a", "", ("fox",), nothing).caption == "fox"


def test_every_encoding_shows_the_picture() -> None:
    sprite = next(sprites(1)).picture
    flat = Image.new("RGB", sprite.size, "white")
    flat.paste(sprite, mask=sprite.getchannel("A"))
    wanted = np.asarray(flat, dtype=float)
    grey = wanted @ [0.299, 0.587, 0.114]
    modes = set()
    for number in range(250):
        data, suffix = encode(sprite, Random(str(number)))
        image = Image.open(io.BytesIO(data))
        modes.add((suffix, image.mode, "icc_profile" in image.info, bool(image.getexif())))
        found = np.asarray(decode(data), dtype=float)
        error = np.abs(found @ [0.299, 0.587, 0.114] - grey).mean()
        assert error < 6, (number, suffix, image.mode)
    assert len(modes) == len(ENCODINGS)


def test_copies_look_alike_and_are_other_files() -> None:
    sprite = next(sprites(1)).picture
    data, _ = encode(place(sprite, Random(0)), Random(1))
    small = np.asarray(decode(data).resize((16, 16)), dtype=float)
    for number in range(12):
        copy, suffix = again(data, Random(number))
        assert copy != data
        assert suffix == "jpg"
        assert np.abs(np.asarray(decode(copy).resize((16, 16)), dtype=float) - small).mean() < 22


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A corpus with one address of each behaviour."""
    corpus = tmp_path_factory.mktemp("corpus")
    (corpus / "pictures").mkdir()
    Image.new("RGB", (32, 32), "red").save(corpus / "pictures" / "a.png")
    (corpus / "secret").write_text("secret")
    rows = [
        {"path": f"/{number}.png", "behaviour": name, "file": "a.png"}
        for number, name in enumerate([*BEHAVIOURS, "picture"])
    ]
    pq.write_table(pa.Table.from_pylist(rows, TRUTH), corpus / "truth.parquet")
    with served(corpus, "127.0.0.1:0") as running:
        yield f"127.0.0.1:{running.server_address[1]}"


def get(server: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def path_of(name: str) -> str:
    return f"/{[*BEHAVIOURS, 'picture'].index(name)}.png"


def test_paths_outside_the_corpus_do_not_exist(server: str) -> None:
    assert get(server, path_of("picture"))[0] == 200
    for path in ("/", "/secret", "/../secret", "/%2e%2e/secret", "//etc/passwd", "/a.png"):
        status, body = get(server, path)
        assert status == 404
        assert b"secret" not in body


def test_busy_servers_answer_at_the_second_time(server: str) -> None:
    assert [get(server, path_of("busy"))[0] for _ in range(2)] == [503, 200]


def test_a_moved_picture_is_at_its_new_place(server: str) -> None:
    path = path_of("moved")
    assert get(server, path)[0] == 302
    assert get(server, f"/moved{path}") == get(server, path_of("picture"))


@pytest.mark.parametrize("code", ["404", "403", "410", "500"])
def test_errors_are_what_they_are_called(server: str, code: str) -> None:
    assert get(server, path_of(code))[0] == int(code)
