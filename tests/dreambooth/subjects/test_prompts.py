import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth.subjects import prompts
from dreambooth.subjects.manifest import parse_classes

DREAMBENCH = Path(os.environ.get("DREAMBENCH_DIR", Path(__file__).parents[3] / "../shared/dreambench"))


@pytest.fixture
def dreambench_text() -> str:
    file = DREAMBENCH / "prompts_and_classes.txt"
    if not file.exists():
        pytest.skip(f"needs the DreamBench lists, and there is no {file}; set DREAMBENCH_DIR")
    return file.read_text()


def test_labels_are_the_papers():
    assert prompts.instance_prompt("sks dog") == "a sks dog"
    assert prompts.class_prompt("stuffed animal") == "a stuffed animal"
    assert prompts.class_prompt("owl") == "a owl"


def test_both_lists_are_dreambenchs(dreambench_text):
    lines = [line.replace("{0} {1}", "{subject}") for line in re.findall(r"^'(.*)'\.format", dreambench_text, re.M)]
    assert tuple(lines[:25]) == prompts.OBJECT_PROMPTS
    assert tuple(lines[25:]) == prompts.LIVE_PROMPTS


def test_live_subjects_are_dreambenchs(dreambench_text):
    classes = parse_classes(dreambench_text)
    live = {name for name, noun in classes.items() if prompts.is_live(noun)}
    assert live == {name for name in classes if re.fullmatch(r"(cat|dog)\d?", name)}
    assert len(classes) == 30
    assert len(live) == 9


@pytest.mark.parametrize(
    ("noun", "live"),
    [
        ("dog", True),
        ("Golden Retriever dog", True),
        ("woman", True),
        ("backpack", False),
        ("stuffed animal", False),
        ("toy dog", False),
        ("hotdog", False),
        ("dog bowl", False),
        ("", False),
    ],
)
def test_is_live(noun, live):
    assert prompts.is_live(noun) is live
    assert prompts.dreambench_prompts(noun) == (prompts.LIVE_PROMPTS if live else prompts.OBJECT_PROMPTS)


@pytest.mark.parametrize("noun", ["dog", "backpack"])
def test_every_template_holds_the_subject_once(noun):
    applications = [template for templates in prompts.APPLICATIONS.values() for template in templates]
    samples = prompts.default_samples(noun)
    assert len(set(samples)) == 6
    for template in (*prompts.dreambench_prompts(noun), *applications, *samples):
        assert template.count(prompts.PLACEHOLDER) == 1
        assert prompts.fill(template, f"sks {noun}").count(f"sks {noun}") == 1


def test_fill_puts_the_phrase_wherever_the_subject_stands():
    assert prompts.fill("a red {subject} and a {subject}", "dog") == "a red dog and a dog"


@given(st.text(st.characters(exclude_characters="{}")).filter(str.strip))
def test_text_without_braces_is_a_plain_prompt(text):
    assert prompts.fill(text, "sks dog") == text
    assert prompts.fill(text + "{subject}", "sks dog") == text + "sks dog"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("a {subjekt} on the beach", "'{subjekt}'"),
        ("a {subject} in {place}", "'{place}'"),
        ("a {} dog", "'{}'"),
        ("a {subject!r}", "'{subject!r}'"),
        ("a {subject on the beach", "'{'"),
        ("a subject} on the beach", "'}'"),
        ("a {{subject}}", "'{}'"),
        (" ", "empty"),
    ],
)
def test_unknown_braces_are_named(template, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        prompts.fill(template, "sks dog")
