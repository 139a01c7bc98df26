"""A1111's syntax against its documented examples and, for nested brackets, its definition."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.models.prompt import COMMA_REACH, LIMIT, emphasize, parse, plain_text, split_chunks

# Inputs and weights as A1111's documentation and parser give them.
ONE_PIECE = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "a ((word))": [("a ", 1.0), ("word", 1.1 * 1.1)],
    "a [word]": [("a ", 1.0), ("word", 1 / 1.1)],
    "a (word:1.5)": [("a ", 1.0), ("word", 1.5)],
    "a (word:0.25)": [("a ", 1.0), ("word", 0.25)],
    r"a \(word\)": [("a (word)", 1.0)],
    r"anime_\(character\)": [("anime_(character)", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.3 * 1.1 * 1.1),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.1**4),
        (".", 1.1),
    ],
    # Brackets that do not match.
    "(unbalanced": [("unbalanced", 1.1)],
    "[(unbalanced": [("unbalanced", 1.0)],
    "a) b] (c": [("a) b] ", 1.0), ("c", 1.1)],
    "(a [b) c]": [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)],
    "()": [("", 1.0)],
    "": [("", 1.0)],
    # Weights.
    "(a: 1.3 )": [("a", 1.3)],
    "(a:+2)": [("a", 2.0)],
    "(a:-0.5)": [("a", -0.5)],
    "(a:.5)": [("a", 0.5)],
    "(a b:c:2)": [("a b:c", 2.0)],
    "(a:big)": [("a:big", 1.1)],
    "(a:1.3, b)": [("a:1.3, b", 1.1)],
    "a:1.3) b": [("a:1.3) b", 1.0)],
    "[a:1.3)": [("a:1.3)", 1 / 1.1)],
    "(a:1.0) b": [("a b", 1.0)],
    # Escapes.
    r"\(literal\]": [("(literal]", 1.0)],
    r"(a\)b)": [("a)b", 1.1)],
    r"a\\(b)": [("a\\", 1.0), ("b", 1.1)],
    r"a\b\ c": [("ab c", 1.0)],
    r"(a:1.3\)": [("a:1.3)", 1.1)],
    # Not BREAK.
    "BREAKfast break": [("BREAKfast break", 1.0)],
}
LETTERS = st.text("ab ,.é", min_size=1, max_size=5)


@pytest.mark.parametrize("prompt", ONE_PIECE)
def test_documented_examples(prompt: str) -> None:
    [piece] = parse(prompt)
    assert [text for text, _ in piece] == [text for text, _ in ONE_PIECE[prompt]]
    assert [weight for _, weight in piece] == pytest.approx([w for _, w in ONE_PIECE[prompt]])
    assert plain_text(prompt) == "".join(text for text, _ in piece)


def test_break_starts_a_new_piece() -> None:
    assert parse("a BREAK b") == [[("a", 1.0)], [("b", 1.0)]]
    assert parse("a\n BREAK  (b),BREAK") == [[("a", 1.0)], [("b", 1.1), (",", 1.0)], [("", 1.0)]]
    assert parse("BREAK BREAK") == [[("", 1.0)]] * 3
    assert plain_text("a  BREAK (b:1.3)") == "a b"


def test_break_within_brackets_leaves_the_weights_of_both_sides() -> None:
    assert parse("(a BREAK b:2) c") == [[("a", 2.0)], [("b", 2.0), (" c", 1.0)]]


def test_weights_have_a_limit_and_nonsense_is_text() -> None:
    assert parse("(a:1.2.3)") == [[("a:1.2.3", 1.1)]]
    assert parse("(a:.)") == [[("a:.", 1.1)]]
    assert parse("(a:1000)(b:-1000)") == [[("a", LIMIT), ("b", -LIMIT)]]
    assert parse(f"((a:0):{'9' * 400})") == [[("a", 0.0)]]
    assert parse("(" * 1000 + "a") == [[("a", LIMIT)]]


@given(LETTERS)
@settings(deadline=None)
def test_text_without_syntax_is_itself(text: str) -> None:
    assert parse(text) == [[(text, 1.0)]]
    assert plain_text(text) == text


@given(st.text(st.sampled_from("ab:1. ()[]\\"), max_size=20))
@settings(deadline=None)
def test_escaped_text_is_itself(text: str) -> None:
    escaped = re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
    assert parse(escaped) == [[(text, 1.0)]]


TREES = st.recursive(
    LETTERS,
    lambda inner: st.tuples(
        st.sampled_from(["(", "[", 0.5, 1.3, -2.0]), st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@given(st.lists(TREES, min_size=1, max_size=4))
@settings(deadline=None)
def test_each_letter_has_the_product_of_the_brackets_around_it(trees: list) -> None:
    def written(tree: str | tuple) -> str:
        if isinstance(tree, str):
            return tree
        inner = "".join(map(written, tree[1]))
        if isinstance(tree[0], float):
            return f"({inner}:{tree[0]})"
        return f"({inner})" if tree[0] == "(" else f"[{inner}]"

    def letters(tree: str | tuple) -> list[tuple[str, float]]:
        if isinstance(tree, str):
            return [(letter, 1.0) for letter in tree]
        factor = {"(": 1.1, "[": 1 / 1.1}.get(tree[0], tree[0])
        inner = [pair for part in tree[1] for pair in letters(part)]
        return [(letter, max(-LIMIT, min(LIMIT, weight * factor))) for letter, weight in inner]

    expected = [pair for tree in trees for pair in letters(tree)]
    [piece] = parse("".join(map(written, trees)))
    found = [(letter, weight) for text, weight in piece for letter in text]
    assert [letter for letter, _ in found] == [letter for letter, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@given(st.lists(st.sampled_from([*"ab:1.-+()[]\\ ,", "BREAK", ":1.3)", "::", ":."]), max_size=40))
@settings(deadline=None)
def test_every_string_is_a_prompt(parts: list[str]) -> None:
    prompt = "".join(parts)
    pieces = parse(prompt)
    assert all(math.isfinite(w) and abs(w) <= LIMIT for piece in pieces for _, w in piece)
    for piece in pieces:
        assert [text for text, _ in piece] == [""] or all(text for text, _ in piece)
    remaining = iter(prompt)  # nothing is added, nothing changes places
    assert all(letter in remaining for piece in pieces for text, _ in piece for letter in text)


COMMA = 9
TOKENS = st.lists(st.tuples(st.integers(0, COMMA), st.sampled_from([1.0, 1.3])), max_size=120)


@given(st.lists(TOKENS, min_size=1, max_size=3), st.integers(1, 40), st.booleans())
@settings(deadline=None)
def test_chunks_keep_every_token_in_order(
    pieces: list[list[tuple[int, float]]], size: int, commas: bool
) -> None:
    chunks = split_chunks(pieces, size, COMMA if commas else None)
    assert [t for chunk in chunks for t in chunk] == [t for piece in pieces for t in piece]
    assert all(len(chunk) <= size for chunk in chunks)
    if not commas:
        needed = [max(1, math.ceil(len(piece) / size)) for piece in pieces]
        assert len(chunks) == sum(needed) - (len(pieces) > 1 and not pieces[-1])


def chunk_lengths(tokens: str, size: int) -> list[int]:
    return [len(c) for c in split_chunks([[(ord(t), 1.0) for t in tokens]], size, ord(","))]


def test_a_chunk_ends_behind_a_comma_within_reach() -> None:
    assert COMMA_REACH == 20
    assert chunk_lengths("a" * 75, 75) == [75]
    assert chunk_lengths("a" * 76, 75) == [75, 1]
    assert chunk_lengths("a" * 55 + "," + "b" * 20, 75) == [56, 20]
    assert chunk_lengths("a" * 54 + "," + "b" * 21, 75) == [75, 1]  # out of reach
    assert chunk_lengths("a," * 30 + "b" * 16, 75) == [60, 16]  # the last one
    assert chunk_lengths("a" * 55 + "," + "b" * 19, 75) == [75]  # it fits
    assert chunk_lengths("a" * 60 + "," + "b" * 14 + ",c", 75) == [75, 2]  # a comma is next
    assert chunk_lengths("a" * 74 + ",b", 75) == [75, 1]


def test_break_fills_its_chunk() -> None:
    a, b = (1, 1.0), (2, 1.0)
    assert split_chunks([[a], [b]], 3) == [[a], [b]]
    assert split_chunks([[a], []], 3) == [[a]]
    assert split_chunks([[], [b]], 3) == [[], [b]]
    assert split_chunks([[], []], 3) == [[]]
    assert split_chunks([[]], 3) == [[]]
    assert split_chunks([[a] * 3, [b]], 3) == [[a] * 3, [b]]


def test_emphasis_keeps_each_chunks_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 0.3 + torch.randn(2, 3, 5, 7, generator=generator)
    weights = torch.ones(2, 3, 5)
    weights[0, 1, 2:4] = 1.3
    weights[1, 2] = torch.tensor([1.0, 0.0, -1.0, 2.0, 1.0])
    result = emphasize(hidden, weights)
    for prompt in range(2):
        for chunk in range(3):
            z = hidden[prompt, chunk].double()
            weighted = z * weights[prompt, chunk].double()[:, None]
            expected = weighted * (z.mean() / weighted.mean())
            torch.testing.assert_close(result[prompt, chunk].double(), expected, rtol=1e-4, atol=0)
    same = (weights == 1).all(-1)
    assert torch.equal(result[same], hidden[same])
    assert not torch.isclose(result[0, 1], hidden[0, 1]).any()


def test_no_weights_change_nothing() -> None:
    hidden = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(emphasize(hidden, torch.ones(2, 5)), hidden)


def test_emphasis_of_zero_mean_is_finite() -> None:
    assert torch.isfinite(emphasize(torch.zeros(1, 5, 7), torch.full((1, 5), 2.0))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_emphasis_loses_no_more_than_the_dtypes_rounding(dtype: torch.dtype) -> None:
    hidden = (0.3 + torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    weights = torch.ones(1, 32)
    weights[0, 3:9] = 1.37
    weighted = hidden.double() * weights.double().unsqueeze(-1)
    expected = (weighted * (hidden.double().mean() / weighted.mean())).to(dtype)
    result = emphasize(hidden, weights)
    assert result.dtype == dtype
    assert (result == expected).float().mean() > 0.99
