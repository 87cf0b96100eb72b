"""Prompts of real text, by the number of tokens."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from models import texts

if TYPE_CHECKING:
    from pathlib import Path


@functools.cache
def tokenizer(model: Path) -> Tokenizer:
    """Load the tokenizer of a model folder."""
    return Tokenizer.from_file(str(model / "tokenizer.json"))


def encode(model: Path, text: str) -> list[int]:
    """Encode a whole text as a prompt, with what the model wants before it."""
    return tokenizer(model).encode(text).ids


def prompts(model: Path, length: int, count: int) -> list[list[int]]:
    """Return ``count`` prompts of ``length`` tokens that share no more than their first token."""
    return [prompt(model, length, f"{length} tokens, text {i}", i) for i in range(count)]


def prompt(model: Path, length: int, title: str, text: int) -> list[int]:
    """Return the first ``length`` tokens of a text under a title; another title makes it miss every cache.

    Raises ValueError if the text is too short.
    """
    available = texts.long_texts()
    ids = encode(model, f"{title}\n\n{available[text % len(available)]}")[:length]
    if len(ids) < length:
        raise ValueError(f"text {text} has {len(ids)} tokens, not {length}")
    return ids
