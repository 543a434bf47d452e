import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import Replace
from transformers import BertTokenizer

from dreambooth.subjects.identifier import Identifier, check_identifier, english_words, find_identifier, rare_window
from tests.small_tokenizers import small_clip_tokenizer, small_t5_tokenizer

TOKENIZERS = {"clip": small_clip_tokenizer, "small clip": lambda: small_clip_tokenizer(2048), "t5": small_t5_tokenizer}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def inner_ids(tokenizer, text):
    return tuple(tokenizer.encode(text, add_special_tokens=False))


@given(
    make=st.sampled_from(list(TOKENIZERS.values())),
    seed=st.integers(0, 2**63),
    subject=st.text(min_size=1, max_size=63),
    tokens=st.sampled_from([None, 1, 2, 3]),
)
@settings(max_examples=60, deadline=None)
def test_found_identifiers_follow_the_rule(make, seed, subject, tokens):
    tokenizer = make()
    found = find_identifier([tokenizer], seed=seed, subject=subject, tokens=tokens)
    assert len(found.token_ids) == (tokens or 1)
    assert inner_ids(tokenizer, found.text) == found.token_ids
    assert tokenizer.decode(list(found.token_ids)) == found.text
    sentence = inner_ids(tokenizer, f"a {found.text} dog")
    assert sentence == (*inner_ids(tokenizer, "a"), *found.token_ids, *inner_ids(tokenizer, "dog"))
    assert found.text.isascii()
    assert found.text.isalnum()
    assert found.text.lower() not in english_words()
    for token in found.token_ids:
        assert token in rare_window(tokenizer)
        assert len(tokenizer.decode([token])) <= 3
        assert tokenizer.decode([token]).lower() not in english_words()
    assert check_identifier(found.text, [tokenizer]) == found


def test_the_draw_is_a_function_of_seed_and_subject(tokenizer):
    def draw(seed, subject):
        return find_identifier([tokenizer], seed=seed, subject=subject)

    assert draw(0, "rex") == draw(0, "rex")
    assert len({draw(seed, "rex") for seed in range(20)}) > 5
    assert len({draw(0, f"dog{number}") for number in range(20)}) > 5


def test_used_identifiers_stay_unique_and_k_grows_when_the_window_runs_out(tokenizer):
    used: list[str] = []
    lengths = []
    for _ in range(120):
        found = find_identifier([tokenizer], seed=0, subject="rex", used=[text.upper() for text in used])
        used.append(found.text)
        lengths.append(len(found.token_ids))
        assert inner_ids(tokenizer, found.text) == found.token_ids
    assert len(set(used)) == len(used)
    assert lengths == sorted(lengths)
    assert set(lengths) == {1, 2}


def test_nothing_left_is_an_error(tokenizer):
    every = {tokenizer.decode([token]) for token in rare_window(tokenizer)}
    spared = find_identifier([tokenizer], seed=0, subject="rex", tokens=1).text
    assert find_identifier([tokenizer], seed=1, subject="max", used=every - {spared}, tokens=1).text == spared
    with pytest.raises(ValueError, match="no rare-token identifier is left for 'rex'"):
        find_identifier([tokenizer], seed=0, subject="rex", used=every, tokens=1)


def test_the_rule_holds_for_every_tokenizer():
    first, second = small_clip_tokenizer(3700), small_clip_tokenizer()  # what is rare in one may be common in the other
    subjects = [f"dog{number}" for number in range(50)]
    for found in (find_identifier([first, second], seed=0, subject=subject) for subject in subjects):
        assert found.token_ids == inner_ids(first, found.text)
        assert all(token in rare_window(second) for token in inner_ids(second, found.text))
    alone = [find_identifier([first], seed=0, subject=subject) for subject in subjects]
    assert any(token not in rare_window(second) for found in alone for token in inner_ids(second, found.text))


def test_windows_belong_to_the_kind_of_vocabulary():
    clip, t5 = small_clip_tokenizer(), small_t5_tokenizer()
    assert rare_window(clip) == range(4094 * 5 // 6, 4094)  # the two special tokens left out
    size = len(t5) - 100  # the sentinels left out
    assert rare_window(t5) == range(size * 5000 // 32000, size * 10000 // 32000 + 1)


def test_an_unknown_kind_of_vocabulary_is_named():
    with pytest.raises(ValueError, match="WordPiece vocabulary of BertTokenizer"):
        find_identifier([BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "dog": 2})], seed=0, subject="rex")


@pytest.mark.parametrize("tokens", [0, 4])
def test_k_is_1_to_3(tokens):
    with pytest.raises(ValueError, match="1 to 3 tokens"):
        find_identifier([small_clip_tokenizer()], seed=0, subject="rex", tokens=tokens)


@pytest.mark.parametrize("text", ["sks", "zwx", "phy", "xlr"])
def test_rare_strings_of_a_user_pass(text):
    tokenizer = small_clip_tokenizer()
    assert check_identifier(text, [tokenizer, tokenizer]) == Identifier(text, inner_ids(tokenizer, text))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("my dog", "holds whitespace"),
        ("sks\n", "holds whitespace"),
        ("dog", "'dog' is an English word"),
        ("Beautiful", "'Beautiful' is an English word"),
        ("qxzvjqxzvj", "tokens"),
        ("SKS", "reads it as 'sks'"),
        ("x7", "reads it as 'x 7'"),
        ("x-7", "reads it as 'x - 7'"),
        ("<|endoftext|>", "special"),
    ],
)
def test_a_users_bad_identifier_is_an_error_that_helps(text, named):
    with pytest.raises(ValueError, match=named) as error:
        check_identifier(text, [small_clip_tokenizer()])
    assert "such as 'sks'" in str(error.value)


def test_an_identifier_must_keep_its_tokens_within_a_sentence():
    tokenizer = small_clip_tokenizer.__wrapped__(600)
    check_identifier("sks", [tokenizer])
    tokenizer.backend_tokenizer.normalizer = Replace(" sks ", " s ks ")
    with pytest.raises(ValueError, match="other tokens within a sentence"):
        check_identifier("sks", [tokenizer])


def test_a_users_identifier_must_suit_every_tokenizer():
    large, small = small_clip_tokenizer(), small_clip_tokenizer(600)
    check_identifier("tryx", [large])
    with pytest.raises(ValueError, match="takes 4 tokens"):
        check_identifier("tryx", [large, small])


def test_an_identifier_survives_what_the_backbone_makes_of_prompts():
    def without_vowels(prompt):
        return " ".join(word if word in ("a", "dog") else re.sub("[aeiou]", "", word) for word in prompt.split())

    tokenizer = small_clip_tokenizer()
    with pytest.raises(ValueError, match=r"'xeq' is lost .* reads 'a xeq dog' as 'a xq dog'"):
        check_identifier("xeq", [tokenizer], without_vowels)
    assert check_identifier("xqz", [tokenizer], without_vowels).text == "xqz"
    found = [find_identifier([tokenizer], seed=s, subject="rex", tokens=2, clean=without_vowels).text for s in range(9)]
    assert not any(set(text) & set("aeiou") for text in found)
    anywhere = [find_identifier([tokenizer], seed=s, subject="rex", tokens=2).text for s in range(9)]
    assert any(set(text) & set("aeiou") for text in anywhere)
