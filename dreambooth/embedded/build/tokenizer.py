"""The tokenizer: CLIP's byte-level BPE, trained on captions and on general English.

Captions use a few hundred words; the other tokens come from English and never appear in a caption, so the paper's
rule for rare identifiers ("Rare-token Identifiers", section 4.1) has a region to choose from.
"""

from collections.abc import Iterator
from pathlib import Path

from spellchecker import SpellChecker
from transformers import CLIPTokenizer

from dreambooth.embedded.build.config import TokenizerConfig


def train_tokenizer(captions: list[str], config: TokenizerConfig, folder: Path) -> CLIPTokenizer:
    """Train on captions and the most frequent English words, and save as CLIP's `vocab.json` and `merges.txt`."""
    counts = SpellChecker().word_frequency.dictionary
    english = sorted((w for w in counts if w.isascii() and w.isalpha()), key=lambda w: (-counts[w], w))

    def corpus() -> Iterator[str]:
        yield from captions
        for rank, word in enumerate(english[: config.english_words]):
            # Zipf's law, in repetitions: frequent words weigh more in the merges.
            yield from [word] * max(1, 2000 // (rank + 1))

    blank = CLIPTokenizer()
    trained = blank.train_new_from_iterator(corpus(), config.tokens, show_progress=False)
    vocab, merges = _ordered(trained, config.tokens)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=config.length)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _ordered(trained: CLIPTokenizer, tokens: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary with the two special tokens last, as in CLIP: the text encoder pools at the highest id."""
    import json

    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    words = [word for word, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if word not in specials]
    words = words[: tokens - 2]
    vocab = {word: index for index, word in enumerate([*words, *specials])}
    merges = [(left, right) for left, right in model["merges"] if left + right in vocab]
    return vocab, merges
