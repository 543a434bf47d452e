"""Small tokenizers of the real kinds, trained in a second or two on English words by their frequency."""

import functools
import json
from collections.abc import Iterator

from spellchecker import SpellChecker
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import CLIPTokenizer, T5Tokenizer


def _words(least: int = 0) -> Iterator[str]:
    frequency = SpellChecker(language="en").word_frequency.dictionary
    for word, count in sorted(frequency.items()):
        if count >= least:
            yield " ".join([word] * (count.bit_length() ** 2 // 64 + 1))


@functools.cache
def small_clip_tokenizer(vocabulary: int = 4096) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's layout: bytes, bytes that end a word, merges by frequency, the two special tokens."""
    trained = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = sorted(ByteLevel.alphabet())
    room = vocabulary - 2 * len(alphabet) - 2
    trainer = BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    corpus = (word for line in _words() for word in line.split())
    trained.train_from_iterator(corpus, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]][:room]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=77)


@functools.cache
def small_t5_tokenizer(vocabulary: int = 4000) -> T5Tokenizer:
    """A unigram vocabulary in T5's layout: pad, end, unknown, pieces by frequency, 100 sentinels."""
    trained = Tokenizer(Unigram())
    trained.pre_tokenizer = Metaspace()
    trainer = UnigramTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(_words(least=10_000), trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=[*pieces, *((f"<extra_id_{i}>", 0.0) for i in reversed(range(100)))])
