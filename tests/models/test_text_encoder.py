"""The text encoders against diffusers' encode_prompt and transformers' towers themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from tokenizers import pre_tokenizers
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.bert.tokenization_bert import BertTokenizer
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.models.gpt2.tokenization_gpt2 import GPT2Tokenizer
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from latentdiff.checkpoint import ModelParts
from latentdiff.errors import InputError
from latentdiff.models.text_encoder import TextEncoder, TextEncoders

TEXTS = ["a fox", "", "A Red  APPLE, ünïcode"]
LONG = "rocket " * 20  # 5 words are the 30 tokens of a chunk
CPU = torch.device("cpu")


@pytest.fixture
def encoder(tiny_parts: ModelParts) -> TextEncoder:
    return tiny_parts.text_encoder


@pytest.fixture(scope="module")
def like_sd2(tiny_parts: ModelParts) -> TextEncoder:
    """Three layers, gelu, padded with "!"."""
    return TextEncoder(padding_with_0(tiny_parts), lively(CLIPTextModel(clip_config())))


@pytest.fixture(scope="module")
def pair(tiny_parts: ModelParts) -> TextEncoders:
    """SDXL's: a narrow tower with end tokens as padding, a wide one with "!" and a projection."""
    config = clip_config(hidden_size=64, num_hidden_layers=4, projection_dim=40)
    first = CLIPTextModel(clip_config(hidden_size=32, hidden_act="quick_gelu"))
    return TextEncoders(
        [
            TextEncoder(tiny_parts.text_encoder.tokenizer, lively(first)),
            TextEncoder(padding_with_0(tiny_parts), lively(CLIPTextModelWithProjection(config))),
        ]
    )


def padding_with_0(parts: ModelParts) -> CLIPTokenizer:
    vocabulary = parts.text_encoder.tokenizer.get_vocab()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="!", model_max_length=32)
    assert tokenizer.pad_token_id == 0
    return tokenizer


def clip_config(**values: object) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": 514,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 0,
            **values,
        }
    )


def lively(network: torch.nn.Module) -> torch.nn.Module:
    """Random weights, large enough that every token shows; norms have a mean, as trained ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if parameter.dim() > 1 else parameter + 0.1 + 0.1 * noise)
    return network.eval()


def stable_diffusion(encoder: TextEncoder) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(towers: TextEncoders) -> StableDiffusionXLPipeline:
    first, second = [None, *towers.towers][-2:]
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=first and first.model,
        text_encoder_2=second.model,
        tokenizer=first and first.tokenizer,
        tokenizer_2=second.tokenizer,
        unet=None,
        scheduler=None,
        add_watermarker=False,
    )


@pytest.mark.parametrize("name", ["encoder", "like_sd2"])
def test_equals_stable_diffusions_prompt_embeddings(
    name: str, request: pytest.FixtureRequest
) -> None:
    encoder = request.getfixturevalue(name)
    pipeline = stable_diffusion(encoder)
    cond, uncond = pipeline.encode_prompt([*TEXTS, LONG], CPU, 1, True)
    ours = encoder.encode([*TEXTS, LONG])
    torch.testing.assert_close(ours.hidden[:, :32], cond)  # diffusers drops what follows
    assert ours.pooled is None
    empty = encoder.encode([""] * 4)
    torch.testing.assert_close(empty.hidden, uncond)
    assert empty.truncated == ours.truncated == []


@pytest.mark.parametrize("name", ["encoder", "like_sd2"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_is_diffusers(
    name: str, skip: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = request.getfixturevalue(name)
    if skip == encoder.model.config.num_hidden_layers:
        with pytest.raises(InputError, match="clip_skip must be from 0 to 1 for this model, not 2"):
            encoder.encode(TEXTS, clip_skip=skip)
        return
    # diffusers asks for the norm where transformers had it before version 5.
    monkeypatch.setitem(encoder.model.__dict__, "text_model", encoder.model)
    cond, _ = stable_diffusion(encoder).encode_prompt(TEXTS, CPU, 1, False, clip_skip=skip)
    torch.testing.assert_close(encoder.encode(TEXTS, clip_skip=skip).hidden, cond)
    plain = encoder.encode(TEXTS).hidden
    assert torch.equal(encoder.encode(TEXTS, clip_skip=skip).hidden, plain) == (skip == 0)


@pytest.mark.parametrize("skip", [None, 1])
@pytest.mark.parametrize("end", [513, 2], ids=["pools at end", "pools at largest"])
@pytest.mark.parametrize("count", [2, 1], ids=["pair", "refiner"])
def test_equals_stable_diffusion_xls_prompt_embeddings(
    pair: TextEncoders,
    skip: int | None,
    end: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pair.towers[1].model.config, "eos_token_id", end)
    monkeypatch.setattr(pair.towers[1].model.text_model, "eos_token_id", end)
    towers = TextEncoders(list(pair.towers)[-count:])
    pipeline = stable_diffusion_xl(towers)
    hidden, _, pooled, _ = pipeline.encode_prompt(
        [*TEXTS, LONG], device=CPU, do_classifier_free_guidance=False, clip_skip=skip
    )
    ours = towers.encode([*TEXTS, LONG], clip_skip=skip)
    torch.testing.assert_close(ours.hidden[:, :32], hidden)
    torch.testing.assert_close(ours.pooled, pooled)
    assert ours.hidden.shape == (4, 4 * 32, towers.hidden_size)
    assert ours.pooled is not None
    assert ours.pooled.shape == (4, towers.pooled_size)
    assert ours.ids.shape == (4, count, 4 * 32)
    if skip is None:
        ids = towers.tokenize([*TEXTS, LONG])
        assert torch.equal(ids, ours.ids[:, :, :32])
        torch.testing.assert_close(towers.encode_ids(ids), (hidden, pooled))


def test_pooled_is_the_projected_end_token(pair: TextEncoders) -> None:
    tower = pair.towers[1]
    text = "a fox"  # begin, a, f, o, x, end
    states = tower.model(tower.tokenize([text]), output_hidden_states=True).hidden_states
    end = tower.model.text_model.final_layer_norm(states[-1])[:, 5]
    torch.testing.assert_close(pair.encode([text]).pooled, tower.model.text_projection(end))


def test_negative_prompts_are_prompts(pair: TextEncoders) -> None:
    _, negative, _, pooled = stable_diffusion_xl(pair).encode_prompt(
        ["a fox"], device=CPU, negative_prompt=["blurred"]
    )
    ours = pair.encode(["blurred"])
    torch.testing.assert_close(ours.hidden, negative)
    torch.testing.assert_close(ours.pooled, pooled)


def test_long_prompts_are_read_in_chunks(encoder: TextEncoder, pair: TextEncoders) -> None:
    for towers in (encoder, pair):
        whole, parts = towers.encode([LONG]), towers.encode(["rocket " * 5])
        assert towers.chunks([LONG, "a", "a BREAK b"]) == [4, 1, 2]
        torch.testing.assert_close(whole.hidden, parts.hidden.repeat(1, 4, 1))
        assert torch.equal(whole.ids, parts.ids.repeat(*[1] * (parts.ids.dim() - 1), 4))
        if whole.pooled is not None:
            torch.testing.assert_close(whole.pooled, parts.pooled)


def test_break_and_empty_chunks(encoder: TextEncoder, pair: TextEncoders) -> None:
    for towers in (encoder, pair):
        fox, apple, nothing = (towers.encode([t]) for t in ("a fox", "an apple", ""))
        both = towers.encode(["a fox BREAK an apple", "an apple"])
        torch.testing.assert_close(both.hidden[0], torch.cat([fox.hidden[0], apple.hidden[0]]))
        torch.testing.assert_close(both.hidden[1], torch.cat([apple.hidden[0], nothing.hidden[0]]))
        forced = towers.encode(["an apple"], chunks=2)
        torch.testing.assert_close(forced.hidden[0], both.hidden[1])
        if fox.pooled is not None and apple.pooled is not None:
            torch.testing.assert_close(both.pooled, torch.cat([fox.pooled, apple.pooled]))
        with pytest.raises(InputError, match="takes 2 chunks of 32 tokens, more than 1"):
            towers.encode(["a fox BREAK an apple"], chunks=1)


def test_weights_multiply_hidden_states_and_keep_their_mean(
    encoder: TextEncoder, pair: TextEncoders
) -> None:
    # begin, a, b, c, d, e, end and padding
    weights = torch.tensor([1, 1, 1, 1.5, 1.5, 1 / 1.1] + [1] * 26, dtype=torch.float64)
    for towers, widths in ((encoder, [48]), (pair, [32, 64])):
        plain, weighted = towers.encode(["ab cd e"]), towers.encode(["ab (cd:1.5) [e]"])
        assert torch.equal(weighted.ids, plain.ids)
        expected = []
        for tower in plain.hidden[0].double().split(widths, dim=-1):
            product = tower * weights[:, None]
            expected.append(product * (tower.mean() / product.mean()))
        torch.testing.assert_close(weighted.hidden[0], torch.cat(expected, -1).float())
        assert not torch.allclose(weighted.hidden, plain.hidden)
        if plain.pooled is not None:
            torch.testing.assert_close(weighted.pooled, plain.pooled)


def test_weights_stay_with_their_chunk_and_picture(encoder: TextEncoder) -> None:
    prompts = ["a fox BREAK (an apple:1.4)", "[a rocket]", "a fox"]
    fox, apple, rocket = (
        encoder.encode([t]).hidden[0] for t in ("a fox", "(an apple:1.4)", "[a rocket]")
    )
    hidden = encoder.encode(prompts).hidden
    torch.testing.assert_close(hidden[0], torch.cat([fox, apple]))
    torch.testing.assert_close(hidden[1, :32], rocket)
    torch.testing.assert_close(hidden[2, :32], fox)


def test_without_weights_nothing_changes(encoder: TextEncoder, pair: TextEncoders) -> None:
    for towers in (encoder, pair):
        plain = towers.encode([*TEXTS, LONG], weighted=False)
        weighted = towers.encode([*TEXTS, LONG])
        assert torch.equal(weighted.hidden, plain.hidden)
        one = towers.encode(["a (fox:1.0)"]).hidden
        assert torch.equal(one, towers.encode(["a fox"]).hidden)
    assert torch.equal(encoder.encode(TEXTS).hidden, encoder.encode_ids(encoder.tokenize(TEXTS)))


def test_unweighted_prompts_are_plain_text(encoder: TextEncoder) -> None:
    text = "(a BREAK:2)"
    assert encoder.chunks([text], weighted=False) == [1]
    assert torch.equal(encoder.encode([text], weighted=False).ids, encoder.tokenize([text]))


def test_ids_are_the_tokenizers_padded_to_its_length(encoder: TextEncoder) -> None:
    ids = encoder.tokenize(["ab", ""])
    assert ids.dtype == torch.int64
    begin, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    a, b = encoder.tokenizer.convert_tokens_to_ids(["a", "b</w>"])
    assert ids.tolist() == [[begin, a, b] + [end] * 29, [begin] + [end] * 31]
    assert torch.equal(encoder.encode(["ab", ""]).ids, ids)


def test_ids_are_cut_to_the_towers_length(encoder: TextEncoder) -> None:
    assert encoder.tokenize([LONG]).shape == (1, 32)


def test_a_text_does_not_depend_on_its_neighbours(encoder: TextEncoder) -> None:
    alone = encoder.encode(["a fox"]).hidden[0]
    torch.testing.assert_close(encoder.encode([*TEXTS, "a fox"]).hidden[-1], alone)


def test_ids_encode_with_gradients(encoder: TextEncoder, pair: TextEncoders) -> None:
    hidden = encoder.encode_ids(encoder.tokenize(["a fox"]))
    assert hidden.shape == (1, 32, encoder.hidden_size)
    hidden.square().sum().backward()
    gradient = encoder.model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    encoder.zero_grad()
    sum(x.square().sum() for x in pair.encode_ids(pair.tokenize(["a fox"]))).backward()
    for tower in pair.towers:
        assert tower.model.get_input_embeddings().weight.grad.abs().sum() > 0
    pair.zero_grad()


def t5(length: int) -> TextEncoder:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    return TextEncoder(tokenizer, lively(T5EncoderModel(T5Config(vocab_size=32, **sizes))))


def bert(length: int) -> TextEncoder:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{a}" for a in letters)]
    tokenizer = BertTokenizer(vocab={t: i for i, t in enumerate(tokens)}, model_max_length=length)
    config = BertConfig(
        vocab_size=64,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return TextEncoder(tokenizer, lively(BertModel(config)))


def gpt2(length: int, pad_token: str | None = "<|endoftext|>") -> TextEncoder:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = GPT2Tokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, pad_token=pad_token, model_max_length=length
    )
    config = GPT2Config(
        vocab_size=257, n_positions=16, n_embd=24, n_layer=2, n_head=3, bos_token_id=256
    )
    return TextEncoder(tokenizer, lively(GPT2Model(config)))


@pytest.mark.parametrize("build", [t5, bert, gpt2])
def test_other_towers_see_a_texts_own_tokens_alone(build: Callable[[int], TextEncoder]) -> None:
    encoder = build(12)
    texts = ["a fox", "", "red apple"]
    embeddings = encoder.encode(texts)
    assert embeddings.hidden.shape == (3, 12, encoder.hidden_size) == (3, 12, 24)
    assert embeddings.pooled is None
    assert encoder.chunks([*texts, "a" * 99]) == [1] * 4
    assert torch.equal(encoder.encode_ids(encoder.tokenize(texts)), embeddings.hidden)
    for text, hidden in zip(texts, embeddings.hidden, strict=True):
        ids = encoder.tokenizer([text], return_tensors="pt")["input_ids"].long()
        count = ids.shape[1]
        assert (count == 0) == (build is gpt2 and text == "")
        if count:
            alone = encoder.model(input_ids=ids).last_hidden_state[0]
            torch.testing.assert_close(hidden[:count], alone)
        assert not hidden[count:].any()
        torch.testing.assert_close(encoder.encode([text]).hidden[0], hidden)


@pytest.mark.parametrize("build", [t5, bert, gpt2])
def test_other_towers_have_finite_gradients(build: Callable[[int], TextEncoder]) -> None:
    encoder = build(12)
    encoder.encode_ids(encoder.tokenize(["", "fox"])).square().sum().backward()
    for parameter in encoder.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    gradient = encoder.model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient.any()


def test_gpt2s_padding_token_may_stand_in_a_text() -> None:
    encoder = gpt2(12)
    hidden = encoder.encode(["a<|endoftext|>b"]).hidden[0]
    assert hidden[:3].any(dim=-1).all()
    assert not hidden[3:].any()


@pytest.mark.parametrize(("build", "special"), [(t5, 2), (bert, 2), (gpt2, 0)])
def test_other_towers_report_what_does_not_fit(
    build: Callable[[int], TextEncoder], special: int
) -> None:
    encoder = build(8)
    fits = "x" * (8 - special)
    long = "a" * (8 - special) + " Tail is  LOST "
    assert encoder.encode([fits, long, "", fits + "y"]).truncated == ["Tail is  LOST", "y"]
    assert encoder.encode([fits]).truncated == []
    assert encoder.tokenize([long]).shape == (1, 8)


def test_other_towers_refuse_what_is_clips() -> None:
    encoder = t5(8)
    with pytest.raises(InputError, match=r"clip_skip and chunks are of CLIP; .* T5EncoderModel"):
        encoder.encode(["a"], clip_skip=1)
    with pytest.raises(InputError, match="clip_skip and chunks are of CLIP"):
        encoder.encode(["a"], chunks=2)
    torch.testing.assert_close(
        encoder.encode(["a"], clip_skip=0, chunks=1).hidden, encoder.encode(["a"]).hidden
    )


def test_refuses_a_tokenizer_of_another_model(encoder: TextEncoder) -> None:
    tokenizer, model = encoder.tokenizer, encoder.model
    longer = type(tokenizer)(vocab=tokenizer.get_vocab(), merges=[], model_max_length=33)
    with pytest.raises(InputError, match=r"pads to 33 tokens .* 32 positions"):
        TextEncoder(longer, model)
    vocabulary = {**tokenizer.get_vocab(), "fox</w>": 514}
    larger = type(tokenizer)(vocab=vocabulary, merges=[], model_max_length=32)
    with pytest.raises(InputError, match=r"has 515 tokens .* embeds 514"):
        TextEncoder(larger, model)
    endless = type(tokenizer)(vocab=tokenizer.get_vocab(), merges=[])
    with pytest.raises(InputError, match=r"does not say how many tokens .* set model_max_length"):
        TextEncoder(endless, model)
    with pytest.raises(InputError, match=r"no padding token; set pad_token"):
        gpt2(8, pad_token=None)


def test_refuses_other_kinds_of_tower(encoder: TextEncoder) -> None:
    class Other(torch.nn.Module):
        config = BertConfig(vocab_size=514)

    Other.config.model_type = "roberta"
    with pytest.raises(InputError, match="type 'roberta' is not supported; these are: clip"):
        TextEncoder(encoder.tokenizer, Other())


def test_refuses_what_is_no_pair(pair: TextEncoders, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair.towers
    with pytest.raises(InputError, match="one or two text encoders and all are CLIP's"):
        TextEncoders([])
    with pytest.raises(InputError, match="one or two text encoders and all are CLIP's"):
        TextEncoders([t5(8), second])
    with pytest.raises(InputError, match=r"is a CLIPTextModelWithProjection, but .* CLIPTextModel"):
        TextEncoders([second, first])
    shorter = CLIPTokenizer(
        vocab=first.tokenizer.get_vocab(), merges=[], model_max_length=30, pad_token="!"
    )
    with pytest.raises(InputError, match="read 30 and 32 tokens; set one model_max_length"):
        TextEncoders([TextEncoder(shorter, first.model), second])
    monkeypatch.setattr(second.model.config, "eos_token_id", 511)
    with pytest.raises(
        InputError, match="pools at token 511 but its tokenizer ends texts with 513"
    ):
        TextEncoders([first, second])
    with pytest.raises(InputError, match="clip_skip must be from 0 to 1 for this model, not 2"):
        pair.encode(["a"], clip_skip=2)
