import itertools

import pytest

from dreambooth.embedded.build.config import PRESETS
from dreambooth.embedded.build.tokenizer import train_tokenizer
from dreambooth.embedded.vocabulary import ACCESSORIES, COLOURS, CONTEXTS, NOUNS
from dreambooth.subjects.identifier import find_identifier


@pytest.fixture(scope="module")
def captions():
    return [
        f"a {c} {n} {p}" for c, n, p in itertools.product(COLOURS, NOUNS, (*CONTEXTS.values(), *ACCESSORIES.values()))
    ]


@pytest.fixture(scope="module")
def tokenizer(captions, tmp_path_factory):
    return train_tokenizer(captions, PRESETS["full"].tokenizer, tmp_path_factory.mktemp("tokenizer"))


def test_it_has_the_size_asked_for_with_the_special_tokens_last(tokenizer):
    size = PRESETS["full"].tokenizer.tokens
    assert len(tokenizer) == size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (size - 2, size - 1)


def test_the_paper_s_rule_finds_an_identifier_for_each_of_many_subjects(tokenizer, captions):
    used: set[str] = set()
    for number in range(40):
        used.add(find_identifier([tokenizer, tokenizer], seed=0, subject=f"subject-{number}", used=used).text)
    assert len(used) == 40
    spoken = {token for caption in captions for token in tokenizer(caption).input_ids}
    for text in used:
        assert spoken.isdisjoint(tokenizer(text).input_ids[1:-1])


def test_caption_words_are_single_tokens(tokenizer):
    words = [word for noun in NOUNS for word in noun.split()] + list(COLOURS)
    whole = [word for word in words if len(tokenizer.tokenize(word)) == 1]
    assert len(whole) > 0.95 * len(words)
