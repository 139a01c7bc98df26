"""Image-text sources: pictures and captions come out as they were put in, whatever they lie in."""

from __future__ import annotations

import errno
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from latentdiff.data.decode import UnreadableImage
from latentdiff.data.images import ImageTextSource, SourceConfig, open_source
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.errors import InputError

ROOT = Path(__file__).parents[2]
CAPTIONS = ("a fox", "ein Füchschen 🦊", "a red apple, on a table")
SIZES = ((30, 20), (20, 30), (7, 9))


@pytest.fixture(scope="module", autouse=True)
def _datasets_keeps_its_copies_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(cache / "downloads"))
        datasets.disable_progress_bars()
        yield


def picture(number: int) -> np.ndarray:
    width, height = SIZES[number]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(picture(number)).save(sink, "PNG")
    return sink.getvalue()


def source_of(kind: str, path: Path, **options: Any) -> ImageTextSource:
    return open_source(SourceConfig(type=kind, path=path, **options))  # type: ignore[arg-type]


def check(source: ImageTextSource, numbers: tuple[int, ...] = (0, 1, 2)) -> None:
    assert len(source) == len(numbers)
    for index, number in enumerate(numbers):
        assert source.size(index) == SIZES[number]
        np.testing.assert_array_equal(np.asarray(source.image(index)), picture(number))
        assert source.caption(index) == CAPTIONS[number]
        assert source.raw(index) == png(number)


# Scenes


SCENES = ROOT / "configs" / "tiny" / "scenes.yaml"


def test_scenes_are_those_of_their_numbers() -> None:
    from latentdiff.config import load_yaml

    source = source_of("scenes", SCENES, count=5)
    scenes = EmojiScenes(load_yaml(ScenesConfig, SCENES))
    assert len(source) == 5
    for index in (0, 4):
        np.testing.assert_array_equal(np.asarray(source.image(index)), scenes[index]["image"])
        assert source.caption(index) == scenes[index]["caption"]
        assert source.size(index) == source.image(index).size
        assert source.raw(index) is None


def test_scenes_digest_is_of_what_they_are_made_of(tmp_path: Path) -> None:
    other = tmp_path / "scenes.yaml"
    other.write_text(SCENES.read_text().replace("seed: 0", "seed: 1"))
    made = [
        source_of("scenes", SCENES, count=5),
        source_of("scenes", SCENES, count=5, split="held_out"),
        source_of("scenes", other, count=5),
    ]
    assert len({source.digest for source in made}) == 3
    assert source_of("scenes", SCENES, count=6).digest == made[0].digest


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "set count"), ({"count": 3, "split": "test"}, "train or held_out")],
)
def test_scenes_need_a_number_and_a_split_of_theirs(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SourceConfig(type="scenes", path=SCENES, **options)


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 1, 0 and 2 by their names, without captions."""
    path = tmp_path / "pictures"
    (path / "c").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.png", "c/d.png")):
        (path / name).write_bytes(png(number))
    return path


IN_ORDER = (1, 0, 2)


def with_texts(folder: Path) -> None:
    for number, name in enumerate(("b.txt", "a.txt", "c/d.txt")):
        (folder / name).write_text(CAPTIONS[number] + "\n", encoding="utf-8")


def with_metadata(folder: Path, column: str = "text") -> None:
    names = ("b.png", "a.png", "c/d.png")
    rows = [{"file_name": name, column: CAPTIONS[n]} for n, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_captions_beside_the_pictures(folder: Path) -> None:
    with_texts(folder)
    check(source_of("folder", folder), IN_ORDER)
    check(source_of("folder", folder, count=2), IN_ORDER[:2])


def test_captions_in_metadata(folder: Path) -> None:
    with_metadata(folder)
    check(source_of("folder", folder), IN_ORDER)


def test_captions_of_a_named_column(folder: Path) -> None:
    with_metadata(folder, "what")
    check(source_of("folder", folder, caption_column="what"), IN_ORDER)
    with pytest.raises(InputError, match="no column absent"):
        source_of("folder", folder, caption_column="absent")


def test_a_folder_without_captions_says_what_to_add(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no captions: add metadata\.jsonl"):
        source_of("folder", folder)


def test_a_folders_digest_moves_with_its_contents_not_its_place(
    folder: Path, tmp_path: Path
) -> None:
    with_texts(folder)
    digest = source_of("folder", folder).digest
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert source_of("folder", tmp_path / "elsewhere").digest == digest
    (folder / "a.txt").write_text("another caption")
    other = source_of("folder", folder).digest
    (folder / "a.png").write_bytes(png(0))
    assert len({digest, other, source_of("folder", folder).digest}) == 3


def test_unreadable_pictures_keep_their_numbers(folder: Path) -> None:
    with_texts(folder)
    (folder / "a.png").write_bytes(b"nonsense")
    (folder / "b.png").write_bytes(png(0)[:-100])
    source = source_of("folder", folder)
    (folder / "c" / "d.png").unlink()
    assert len(source) == 3
    for index, reason in enumerate(("unknown format", "damaged", "missing")):
        with pytest.raises(UnreadableImage, match=reason):
            source.image(index)
    assert source.size(1) == SIZES[0]
    for read in (source.size, source.raw):
        with pytest.raises(UnreadableImage, match="missing"):
            read(2)


class FailingFile(io.BytesIO):
    """Ends in the middle, as Pillow sees it."""

    def read(self, *arguments: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("where", ["open", "read"])
def test_a_disk_that_fails_is_not_a_picture_that_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with_texts(folder)
    source = source_of("folder", folder)

    def opened(path: Path, mode: str) -> FailingFile:
        if where == "open":
            raise OSError(errno.ESTALE, "Stale file handle")
        return FailingFile(png(0))

    monkeypatch.setattr(Path, "open", opened)
    for read in (source.size, source.image, source.raw):
        with pytest.raises(InputError, match=r"a\.png cannot be read \((Stale|Input/output)"):
            read(0)


def test_looking_for_files_stops_at_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentdiff.data import images

    with_texts(folder)
    looked: list[Path] = []
    real = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: looked.append(path) or real(path))
    monkeypatch.setattr(images, "FolderSource", lambda config: len(looked))
    assert source_of("folder", folder) <= 3  # the folder, perhaps the one in it, and a file


# Tables


def write_parquet(path: Path, numbers: tuple[int, ...] = (0, 1, 2), **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "image": [{"bytes": png(number), "path": None} for number in numbers],
        "text": [CAPTIONS[number] for number in numbers],
    }
    pq.write_table(pa.table(values | columns), path)


def write_tar(path: Path, numbers: tuple[int, ...] = (0, 1, 2), kind: str = "png") -> None:
    """As img2dataset writes them, but for the numbers of the names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            facts = {"caption": CAPTIONS[number], "status": "success", "width": number}
            for ending, data in (
                (kind, png(number)),
                ("json", json.dumps(facts).encode()),
                ("txt", CAPTIONS[number].encode()),
            ):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_parquet_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "0.parquet", (0, 1))
    write_parquet(tmp_path / "data" / "1.parquet", (2,))
    (tmp_path / "data" / "README.md").write_text("About them.")
    for path in (tmp_path / "data", tmp_path / "data" / "*.parquet"):
        check(source_of("parquet", path))
    check(source_of("parquet", tmp_path / "data" / "1.parquet"), (2,))
    check(source_of("parquet", tmp_path / "data", count=2), (0, 1))


def test_splits_of_parquet_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", (0, 1))
    write_parquet(tmp_path / "test-0.parquet", (2,))
    check(source_of("parquet", tmp_path), (0, 1))
    check(source_of("parquet", tmp_path, split="test"), (2,))
    with pytest.raises(InputError, match="no parquet files of the split validation"):
        source_of("parquet", tmp_path, split="validation")


def test_plain_bytes_and_named_columns(tmp_path: Path) -> None:
    jpg = [png(number) for number in range(3)]
    texts = [[caption, "another"] for caption in CAPTIONS]
    write_parquet(tmp_path / "0.parquet", jpg=jpg, texts=texts)
    check(source_of("parquet", tmp_path, image_column="jpg", caption_column="texts"))
    with pytest.raises(InputError, match="no column photo but image, text, jpg, texts"):
        source_of("parquet", tmp_path, image_column="photo")
    with pytest.raises(InputError, match="texts holds no pictures"):
        open_source(SourceConfig(type="parquet", path=tmp_path, image_column="texts"))


def test_missing_values(tmp_path: Path) -> None:
    image = [None, {"bytes": b"", "path": "x.png"}, {"bytes": png(2), "path": None}]
    write_parquet(tmp_path / "0.parquet", image=image, text=[None, "b", CAPTIONS[2]])
    source = source_of("parquet", tmp_path)
    assert [source.caption(index) for index in range(3)] == ["", "b", CAPTIONS[2]]
    for index in (0, 1):
        for read in (source.size, source.image, source.raw):
            with pytest.raises(UnreadableImage, match="missing"):
                read(index)
    assert source.size(2) == SIZES[2]


def test_tars_of_img2dataset(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", (0, 1), "jpg")  # whatever the pictures are
    write_tar(tmp_path / "00001.tar", (2,), "jpg")
    (tmp_path / "00000_stats.json").write_text("{}")
    write_parquet(tmp_path / "00000.parquet")
    check(source_of("webdataset", tmp_path))
    check(source_of("webdataset", tmp_path / "0000[1-9].tar"), (2,))


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_files_that_are_something_else_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "0.file"
    path.write_bytes(b"nonsense" * 200)
    with pytest.raises(InputError, match=f"cannot be read as {kind}, split train"):
        source_of(kind, path)


@pytest.mark.parametrize("kind", ["scenes", "folder", "parquet", "webdataset"])
def test_a_path_without_files_is_refused(tmp_path: Path, kind: str) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "*.tar"):
        with pytest.raises(InputError, match="There are no files at"):
            source_of(kind, path, count=1)


def test_a_tables_digest_moves_with_its_files_and_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a" / "0.parquet", what=list(CAPTIONS))
    digest = source_of("parquet", tmp_path / "a").digest
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert source_of("parquet", tmp_path / "b").digest == digest
    other = source_of("parquet", tmp_path / "a", caption_column="what").digest
    write_parquet(tmp_path / "b" / "0.parquet", (0, 1))
    assert len({digest, other, source_of("parquet", tmp_path / "b").digest}) == 3
