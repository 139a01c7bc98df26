"""Retrieval: ranks counted by hand, and the program on tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from inference import retrieval
from inference.retrieval import RetrievalConfig, figures, ranks, similarities
from latentdiff.errors import InputError
from latentdiff.metrics.clip_features import ClipConfig, ClipExtractor
from latentdiff.pipeline import TextToImage

COUNT = 10


@given(
    st.integers(1, 12).flatmap(
        lambda n: hnp.arrays(np.float32, (n, n), elements=st.sampled_from((-0.5, 0.0, 0.25, 1.0)))
    )
)
def test_a_rank_is_the_number_of_other_captions_as_near(similarity: np.ndarray) -> None:
    expected = [
        sum(1 for j, value in enumerate(row) if j != i and value >= row[i])
        for i, row in enumerate(similarity)
    ]
    assert ranks(torch.from_numpy(similarity)).tolist() == expected
    found = figures(torch.from_numpy(similarity))
    assert found["top_1"] == pytest.approx(np.mean([r < 1 for r in expected]), abs=1e-4)
    assert found["top_5"] == pytest.approx(np.mean([r < 5 for r in expected]), abs=1e-4)


def test_a_judge_that_knows_nothing_is_never_right() -> None:
    assert figures(torch.zeros(9, 9)) == {"top_1": 0.0, "top_5": 0.0, "cosine": 0.0}


def test_what_is_no_number_comes_last() -> None:
    similarity = torch.eye(3)
    similarity[0, 0] = similarity[1, 2] = torch.nan
    assert ranks(similarity).tolist() == [2, 0, 0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tokenizer_of: Any) -> Path:
    """A CLIP of 32 x 32 pixels with random weights, as training.clip leaves it."""
    directory = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    size["num_attention_heads"] = 2
    tokens = {"vocab_size": 514, "max_position_embeddings": 32, "bos_token_id": 512}
    tokens |= {"eos_token_id": 513, "pad_token_id": 513}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=size | tokens,
                vision_config=size | {"image_size": 32, "patch_size": 8},
                projection_dim=16,
            )
        )
    model.save_pretrained(directory / "clip")
    tokenizer_of(32).save_pretrained(directory / "tokenizer")
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        noise = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"number {number}")
    return folder


def test_similarity_is_the_cosine_of_clips_embeddings(clip: Path) -> None:
    extractor = ClipExtractor(ClipConfig(directory=clip))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = similarities(extractor, images, ["a fox", "a robot"])
    model = CLIPModel.from_pretrained(clip / "clip").eval()
    ids = extractor.encoder.tokenize(["a fox", "a robot"])
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=images.double().float() / 127.5 - 1)
    expected = output.logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=1e-4)


def test_the_clip_sees_few_at_a_time(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = ClipExtractor(ClipConfig(directory=clip))
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    captions = [f"number {n}" for n in range(7)]
    whole = similarities(extractor, images, captions)
    sizes: list[int] = []

    def counted(self: ClipExtractor, batch: torch.Tensor) -> np.ndarray:
        sizes.append(len(batch))
        return see(self, batch)

    see = ClipExtractor.__call__
    monkeypatch.setattr(ClipExtractor, "__call__", counted)
    monkeypatch.setattr(retrieval, "BATCH", 3)
    torch.testing.assert_close(
        similarities(extractor, images, captions), whole, atol=1e-6, rtol=1e-5
    )
    assert sizes == [3, 3, 1]


def run(run_dir: Path, clip: Path, folder: Path, models: dict[str, str]) -> dict[str, Any]:
    words = f"""
run_dir: {run_dir}
models: {json.dumps(models)}
clip: {clip}
source: {{type: folder, path: {folder}}}
captions: 6
num_inference_steps: 2
"""
    run_dir.mkdir()
    (run_dir / "retrieval.yaml").write_text(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["retrieval", "--config", str(run_dir / "retrieval.yaml")])
        retrieval.main()
    found: dict[str, Any] = json.loads((run_dir / "retrieval.json").read_text())
    return found


def test_models_are_judged_on_the_same_seeds(
    tiny_model: Path,
    clip: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    models = {"before": str(tiny_model), "after": str(tiny_model)}
    monkeypatch.setattr(retrieval, "BATCH", 4)
    monkeypatch.setattr(retrieval, "SHOWN", 5)
    found = run(tmp_path / "run", clip, folder, models)
    assert found["captions"] == 6
    assert found["before"] == found["after"]
    assert found["chance"] == {"top_1": 0.1667, "top_5": 0.8333}
    model, extractor = TextToImage.load(tiny_model), ClipExtractor(ClipConfig(directory=clip))
    captions = [f"number {n}" for n in range(6)]
    pictures = [
        model.generate(caption, seed=n, num_inference_steps=2, guidance_scale=4.0, sampler="ddim")
        for n, caption in enumerate(captions)
    ]
    halves = [picture.resize((32, 32), Image.Resampling.LANCZOS) for picture in pictures]
    images = torch.from_numpy(np.stack([np.asarray(half) for half in halves])).permute(0, 3, 1, 2)
    assert found["before"] == pytest.approx(
        figures(similarities(extractor, images, captions)), abs=2e-3
    )
    for name in ("before", "after", "side_by_side"):
        assert Image.open(tmp_path / "run" / f"{name}.png").width > 256


def test_a_missing_clip_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"clip is missing; train it with training\.clip first"):
        run(tmp_path / "run", tmp_path / "none", folder, {"any": "emoji"})


def test_a_model_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="models"):
        RetrievalConfig(run_dir=tmp_path, models={}, clip=tmp_path, source={})
