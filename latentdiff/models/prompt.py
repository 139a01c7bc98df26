r"""The prompt syntax of AUTOMATIC1111's web UI: weights, chunks and what they do to embeddings.

`(word)` weighs 1.1 times as much, `((word))` 1.21 times, `(word:1.3)` 1.3 times, `[word]` 1 / 1.1
times; `\(`, `\)`, `\[`, `\]` and `\\` are the characters themselves; BREAK starts a new chunk.
Prompt editing (`[a:b:0.5]`), alternation (`[a|b]`) and AND are not read.

Source: parse_prompt_attention in prompt_parser.py, tokenize_line in sd_hijack_clip.py and
EmphasisOriginal in sd_emphasis.py of github.com/AUTOMATIC1111/stable-diffusion-webui; written anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentdiff.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = list[tuple[str, float]]
"""Texts and their weights, between two BREAKs."""
Token = tuple[int, float]
"""An id and its weight."""
Chunk = list[Token]
"""What stands between the begin and end tokens of one pass through the tower."""

FACTOR = 1.1
"""What a pair of brackets multiplies or divides by."""
LIMIT = 10.0
"""The largest weight, in either direction; A1111 has none."""
COMMA_REACH = 20
"""A chunk ends behind a comma where one of its last 20 tokens is one, as A1111 has it unless set
otherwise (comma_padding_backtrack)."""

_LEXEMES = re.compile(
    r"""
    \\ (?P<escaped> [\\()\[\]]? )
    | (?P<open> [(\[] )
    | : \s* (?P<weight> [+-]? [\d.]+ ) \s* \)
    | (?P<close> [)\]] )
    | (?P<text> : | [^\\:()\[\]]+ )
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def parse(prompt: str) -> list[Piece]:
    """The pieces of a prompt between its BREAKs, each a list of (text, weight).

    Every string is a prompt. As in A1111, brackets that are not closed reach to the end, those
    that close nothing are text, a lone backslash is dropped, and neighbours of equal weight are
    one text. Unlike there, a BREAK within brackets is a BREAK too (A1111 reads a word of negative
    weight), `(a:1.2.3)` is the text `a:1.2.3` in brackets (A1111 fails), and weights end at LIMIT.

    >>> parse("a (red:1.3) fox BREAK [forest]")
    [[('a ', 1.0), ('red', 1.3), (' fox', 1.0)], [('forest', 0.9090909090909091)]]
    """
    runs: list[tuple[str | None, float]] = []  # None is a BREAK
    starts: dict[str, list[int]] = {"(": [], "[": []}  # where brackets opened that are still open

    def add(text: str) -> None:
        for i, part in enumerate(_BREAK.split(text)):
            runs.extend([(None, 1.0)] if i else [])
            runs.append((part, 1.0))

    def weigh(start: int, factor: float) -> None:
        factor = _limited(factor)
        runs[start:] = [(text, _limited(weight * factor)) for text, weight in runs[start:]]

    for lexeme in _LEXEMES.finditer(prompt):
        if (escaped := lexeme["escaped"]) is not None:
            runs.append((escaped, 1.0))
        elif bracket := lexeme["open"]:
            starts[bracket].append(len(runs))
        elif lexeme["weight"] and starts["("]:
            factor = _number(lexeme["weight"])
            if factor is None:
                add(lexeme[0][:-1])
                factor = FACTOR
            weigh(starts["("].pop(), factor)
        elif lexeme["close"] == ")" and starts["("]:
            weigh(starts["("].pop(), FACTOR)
        elif lexeme["close"] == "]" and starts["["]:
            weigh(starts["["].pop(), 1 / FACTOR)
        else:
            add(lexeme[0])
    for start in starts["("]:
        weigh(start, FACTOR)
    for start in starts["["]:
        weigh(start, 1 / FACTOR)
    return _pieces(runs)


def plain_text(prompt: str) -> str:
    """The words of a prompt, without its syntax; a blank stands for BREAK."""
    return " ".join("".join(text for text, _ in piece) for piece in parse(prompt))


def split_chunks(
    pieces: Sequence[Sequence[Token]], size: int, comma: int | None = None
) -> list[Chunk]:
    """Chunks of at most `size` tokens, in order and complete; each piece starts a new one.

    A piece that does not fit is cut after `size` tokens, or behind the last comma (the token id
    `comma`) when that is among the chunk's last COMMA_REACH tokens and the next token is none.
    """
    chunks: list[Chunk] = []
    for piece in pieces:
        rest = list(piece)
        while len(rest) > size:
            cut = size
            if rest[size][0] != comma:
                reach = range(max(0, size - COMMA_REACH), size)
                cut = max((i + 1 for i in reach if rest[i][0] == comma), default=size)
            chunks.append(rest[:cut])
            rest = rest[cut:]
        chunks.append(rest)
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()  # nothing follows the last BREAK
    return chunks


def prompt_chunks(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], weighted: bool
) -> list[list[Chunk]]:
    """Each prompt's chunks of at most `tokenizer.model_max_length` - 2 tokens.

    Texts of different weight are tokenized by themselves. Without `weighted`, a prompt is one text
    of weight 1.
    """
    parsed = [parse(prompt) if weighted else [[(prompt, 1.0)]] for prompt in prompts]
    texts = [text for pieces in parsed for piece in pieces for text, _ in piece]
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    size, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(",</w>")
    return [
        split_chunks(
            [[(i, weight) for _, weight in piece for i in next(ids)] for piece in pieces],
            size,
            comma,
        )
        for pieces in parsed
    ]


def chunk_tensors(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Chunk]], number: int | None
) -> tuple[Tensor, Tensor]:
    """Ids [B, C, L] int64 and weights [B, C, L] float32 of B prompts' chunks, on the CPU.

    Each chunk gets its begin token, end token and padding, of weight 1; each prompt is filled up
    with empty chunks to C = `number`, or to what the longest takes. Raises InputError where one
    takes more than `number`.
    """
    length, most = tokenizer.model_max_length, max(map(len, prompts))
    count = most if number is None else number
    if most > count:
        raise InputError(
            f"A prompt takes {most} chunks of {length} tokens, more than {count}; shorten it or "
            "ask for more chunks."
        )
    begin, end, pad = (
        (token, 1.0)
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    )

    def framed(chunk: Chunk) -> Chunk:
        return [begin, *chunk, end, *[pad] * (length - 2 - len(chunk))]

    rows = [[framed(c) for c in [*chunks, *[[]] * (count - len(chunks))]] for chunks in prompts]
    ids = torch.tensor([[[i for i, _ in chunk] for chunk in row] for row in rows])
    weights = [[[weight for _, weight in chunk] for chunk in row] for row in rows]
    return ids, torch.tensor(weights, dtype=torch.float32)


def emphasize(hidden: Tensor, weights: Tensor) -> Tensor:
    """Hidden states [..., L, D] times their tokens' weights [..., L], with their mean restored.

    The mean is that over one chunk's L x D numbers, before and after; A1111 takes it over the
    tensor of one call, which there holds one chunk of one prompt. Chunks that have no weight but 1
    stay as they are, bit for bit.
    """
    weights = weights.to(hidden.device)
    rows = (weights != 1).any(dim=-1)
    if not rows.any():
        return hidden
    before = hidden[rows].to(torch.promote_types(hidden.dtype, torch.float32))
    after = before * weights[rows].unsqueeze(-1)
    mean, new_mean = (x.mean(dim=(-2, -1), keepdim=True) for x in (before, after))
    after = after * torch.where(new_mean == 0, 1, mean / new_mean)
    result = hidden.clone()
    result[rows] = after.to(hidden.dtype)
    return result


def _pieces(runs: Sequence[tuple[str | None, float]]) -> list[Piece]:
    pieces: list[Piece] = [[]]
    for text, weight in runs:
        if text is None:
            pieces.append([])
        elif pieces[-1] and pieces[-1][-1][1] == weight:
            pieces[-1][-1] = (pieces[-1][-1][0] + text, weight)
        else:
            pieces[-1].append((text, weight))
    return [[run for run in piece if run[0]] or [("", 1.0)] for piece in pieces]


def _number(digits: str) -> float | None:
    try:
        return float(digits)
    except ValueError:
        return None


def _limited(weight: float) -> float:
    return min(max(weight, -LIMIT), LIMIT)
