"""Rare-token identifiers, by the rule of the DreamBooth paper (section 3.2, "Rare-token Identifiers").

Rare token ids are looked up first and then decoded to a string of k = 1..3 tokens, so that the text encoder has only a
weak prior for it. Random letters instead would give several common tokens, each with a strong prior of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from spellchecker import SpellChecker

from dreambooth.common.streams import stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

MAX_TOKENS = 3
MAX_CHARACTERS = 3  # of one token: "tokens that correspond to 3 or fewer Unicode characters (without spaces)"
_DRAWS = 20_000  # sequences tried for each k


@dataclass(frozen=True)
class Identifier:
    """A [V]: its text, and its token ids in the first tokenizer that it was found or checked with."""

    text: str
    token_ids: tuple[int, ...]


def rare_window(tokenizer: Tokenizer) -> range:
    """Return the ids that hold a tokenizer's rare tokens, a property of how its vocabulary is ordered.

    A unigram vocabulary (T5) takes the paper's 5000-10000 of 32,000. A byte-pair vocabulary (CLIP) is ordered by merge
    frequency, and its ids 5000-10000 are everyday words: it takes the last sixth, where `sks` (48136 of 49,406) lies.
    Both scale with the size of the vocabulary, special tokens left out.

    Raises:
        ValueError: the tokenizer is of another kind.
    """
    size = 1 + max(set(tokenizer.get_vocab().values()) - set(tokenizer.get_added_vocab().values()))
    match type(tokenizer.backend_tokenizer.model).__name__:
        case "Unigram":
            return range(size * 5000 // 32000, size * 10000 // 32000 + 1)
        case "BPE":
            return range(size * 5 // 6, size)
        case kind:
            raise ValueError(
                f"no window of rare tokens is known for the {kind} vocabulary of {type(tokenizer).__name__}; "
                "choose an identifier yourself"
            )


def find_identifier(
    tokenizers: Sequence[Tokenizer],
    *,
    seed: int,
    subject: str,
    used: Collection[str] = (),
    tokens: int | None = None,
    clean: Callable[[str], str] = str,
) -> Identifier:
    """Find a rare-token identifier: as few tokens as give one, the same for the same (seed, subject, used).

    Each token lies in its tokenizer's `rare_window` and has at most 3 characters, ASCII letters and digits; neither the
    whole nor a token of it is an English word; and the string encodes back to the same ids, alone and within a
    sentence. All this holds for every tokenizer of the backbone.

    Args:
        tokenizers: those of the backbone's text encoders; the first one's ids are drawn and returned.
        seed: the run's seed.
        subject: the subject's name, so that subjects of one run draw in different orders.
        used: identifiers that are taken, and any other words to keep clear of.
        tokens: k, the number of tokens; None tries 1, 2, 3.
        clean: what the backbone makes of a prompt before its tokenizers see it; the identifier must survive that.

    Raises:
        ValueError: none is left, or `tokens` is not 1, 2 or 3.
    """
    if tokens is not None and not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"an identifier has 1 to {MAX_TOKENS} tokens, not {tokens}")
    taken = {text.lower() for text in used}
    windows = [rare_window(tokenizer) for tokenizer in tokenizers]
    first = tokenizers[0]
    rare = [token for token in windows[0] if _is_rare_text(_decode([token], first))]
    for k in (tokens,) if tokens else range(1, MAX_TOKENS + 1):
        for drawn in _draw(rare, k, stream(seed, subject, "identifier", k)):
            text = _decode(drawn, first)
            if text.lower() in taken or not text.isalnum() or _is_word(text) or _encode(text, first) != drawn:
                continue
            if not _survives(text, clean):
                continue
            if all(_follows_rule(text, *pair) for pair in zip(tokenizers, windows, strict=True)):
                return Identifier(text, tuple(drawn))
    raise ValueError(f"no rare-token identifier is left for {subject!r} ({len(taken)} are taken); choose one yourself")


def check_identifier(text: str, tokenizers: Sequence[Tokenizer], clean: Callable[[str], str] = str) -> Identifier:
    """Check a user's own identifier; unlike a found one, its tokens may lie anywhere in the vocabulary.

    Raises:
        ValueError: it is empty, holds whitespace, is an English word, or, in any of the tokenizers, takes more than 3
            tokens, holds special or unknown ones, or does not come back as the same string; or `clean`, what the
            backbone makes of a prompt, does not let it be.
    """
    advice = "choose a rare string such as 'sks', or give none and one is found"
    if not text.strip():
        raise ValueError(f"the identifier is empty; {advice}")
    if any(character.isspace() for character in text):
        raise ValueError(f"identifier {text!r} holds whitespace; {advice}")
    if _is_word(text):
        raise ValueError(f"identifier {text!r} is an English word, which the model has a meaning for; {advice}")
    if not _survives(text, clean):
        raise ValueError(
            f"identifier {text!r} is lost to this backbone, which cleans prompts: it reads {_sentence(text)!r} as "
            f"{clean(_sentence(text))!r}; {advice}"
        )
    for tokenizer in tokenizers:
        ids = _encode(text, tokenizer)
        if len(ids) > MAX_TOKENS:
            raise ValueError(
                f"identifier {text!r} takes {len(ids)} tokens ({tokenizer.convert_ids_to_tokens(ids)}), "
                f"and at most {MAX_TOKENS} are allowed; {advice}"
            )
        if not set(ids).isdisjoint(tokenizer.all_special_ids):
            raise ValueError(f"identifier {text!r} holds a token that is special or unknown to the tokenizer; {advice}")
        if (back := _decode(ids, tokenizer)) != text:
            raise ValueError(
                f"identifier {text!r} does not survive the tokenizer, which reads it as {back!r}; {advice}"
            )
        if not _stands_in_sentence(ids, text, tokenizer):
            raise ValueError(f"identifier {text!r} gets other tokens within a sentence than alone; {advice}")
    return Identifier(text, tuple(_encode(text, tokenizers[0])))


@functools.cache
def english_words() -> frozenset[str]:
    """Return the 160,000 English words of pyspellchecker, in lower case; loaded once."""
    return frozenset(SpellChecker(language="en").word_frequency.words())


def _is_word(text: str) -> bool:
    return text.lower() in english_words()


def _is_rare_text(text: str) -> bool:
    return len(text) <= MAX_CHARACTERS and text.isascii() and text.isalnum() and not _is_word(text)


def _follows_rule(text: str, tokenizer: Tokenizer, window: range) -> bool:
    ids = _encode(text, tokenizer)
    return (
        len(ids) <= MAX_TOKENS
        and all(token in window and _is_rare_text(_decode([token], tokenizer)) for token in ids)
        and _decode(ids, tokenizer) == text
        and _stands_in_sentence(ids, text, tokenizer)
    )


def _sentence(text: str) -> str:
    return f"a {text} dog"


def _survives(text: str, clean: Callable[[str], str]) -> bool:
    return clean(_sentence(text)) == _sentence(text)


def _stands_in_sentence(ids: list[int], text: str, tokenizer: Tokenizer) -> bool:
    return _encode(_sentence(text), tokenizer) == [*_encode("a", tokenizer), *ids, *_encode("dog", tokenizer)]


def _draw(rare: list[int], k: int, generator: np.random.Generator) -> Iterator[list[int]]:
    """Yield distinct sequences of k rare ids, uniformly."""
    shape = (len(rare),) * k
    count = math.prod(shape)
    for index in generator.choice(count, size=min(count, _DRAWS), replace=False):
        yield [rare[position] for position in np.unravel_index(index, shape)]


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _decode(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids)
