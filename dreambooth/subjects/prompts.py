"""Prompts: the paper's two labels, the 25 + 25 DreamBench prompts, and templates for the paper's applications.

A template holds the placeholder `{subject}`, which stands for "[V] [class noun]"; the article before it is always "a",
as in the paper. The DreamBench prompts are those of `prompts_and_classes.txt` in the DreamBooth data set (CC BY 4.0,
github.com/google/dreambooth).
"""

import re

PLACEHOLDER = "{subject}"

_SCENES = (
    "a {subject} in the jungle",
    "a {subject} in the snow",
    "a {subject} on the beach",
    "a {subject} on a cobblestone street",
    "a {subject} on top of pink fabric",
    "a {subject} on top of a wooden floor",
    "a {subject} with a city in the background",
    "a {subject} with a mountain in the background",
    "a {subject} with a blue house in the background",
    "a {subject} on top of a purple rug in a forest",
)
_PROPERTIES = (
    "a red {subject}",
    "a purple {subject}",
    "a shiny {subject}",
    "a wet {subject}",
    "a cube shaped {subject}",
)

OBJECT_PROMPTS = (
    *_SCENES,
    "a {subject} with a wheat field in the background",
    "a {subject} with a tree and autumn leaves in the background",
    "a {subject} with the Eiffel Tower in the background",
    "a {subject} floating on top of water",
    "a {subject} floating in an ocean of milk",
    "a {subject} on top of green grass with sunflowers around it",
    "a {subject} on top of a mirror",
    "a {subject} on top of the sidewalk in a crowded street",
    "a {subject} on top of a dirt road",
    "a {subject} on top of a white rug",
    *_PROPERTIES,
)
"""DreamBench's 25 templates for objects."""

LIVE_PROMPTS = (
    *_SCENES,
    "a {subject} wearing a red hat",
    "a {subject} wearing a santa hat",
    "a {subject} wearing a rainbow scarf",
    "a {subject} wearing a black top hat and a monocle",
    "a {subject} in a chef outfit",
    "a {subject} in a firefighter outfit",
    "a {subject} in a police outfit",
    "a {subject} wearing pink glasses",
    "a {subject} wearing a yellow shirt",
    "a {subject} in a purple wizard outfit",
    *_PROPERTIES,
)
"""DreamBench's 25 templates for live subjects."""

APPLICATIONS = {
    "recontextualization": (
        "a {subject} on the beach",
        "a {subject} in the snow",
        "a {subject} with the Eiffel Tower in the background",
    ),
    "art rendition": (
        "a painting of a {subject} in the style of Vincent van Gogh",
        "a painting of a {subject} in the style of Johannes Vermeer",
        "a statue of a {subject} in the style of Michelangelo",
    ),
    "view synthesis": (
        "a {subject} seen from the top",
        "a {subject} seen from the bottom",
        "a {subject} seen from the side",
        "a {subject} seen from the back",
    ),
    "property modification": (
        "a red {subject}",
        "a cross of a {subject} and a panda",
        "a cross of a {subject} and a lion",
    ),
    "accessorization": (
        "a {subject} wearing a chef outfit",
        "a {subject} wearing a police outfit",
        "a {subject} wearing a witch outfit",
    ),
}
"""Templates for the applications of the paper's section 4, by the paper's name for each."""

_LIVE_NOUN = re.compile(
    r"\b(animal|baby|bear|bird|boy|bunny|calf|cat|chicken|child|cow|deer|dog|dolphin|donkey|duck|elephant|fish|fox|frog|"
    r"girl|goat|goldfish|goose|hamster|hedgehog|horse|kitten|lamb|lion|lizard|man|monkey|mouse|owl|panda|parrot|penguin|"
    r"person|pet|pig|pony|puppy|rabbit|rat|sheep|snake|squirrel|tiger|toddler|turtle|wolf|woman|zebra)$"
)
_LIKENESS = re.compile(r"\b(cartoon|ceramic|figurine|plush|plushie|statue|stuffed|toy|wooden)\b")


def instance_prompt(phrase: str) -> str:
    """Label the instance images: "a [V] [class noun]", or what else the subject is called."""
    return fill("a {subject}", phrase)


def class_prompt(class_noun: str) -> str:
    """Label the class-prior images: "a [class noun]"."""
    return fill("a {subject}", class_noun)


def fill(template: str, phrase: str) -> str:
    """Put the subject's phrase, "[V] [class noun]", into a template; the class noun alone is any subject of the class.

    A template without the placeholder is a plain prompt and comes back as it is.

    Raises:
        ValueError: the template is blank, or holds braces other than `{subject}`.
    """
    if not template.strip():
        raise ValueError(f"a prompt is empty; write one such as 'a {PLACEHOLDER} on the beach'")
    unknown = re.findall(r"\{[^{}]*\}|[{}]", template.replace(PLACEHOLDER, ""))
    if unknown:
        raise ValueError(f"prompt {template!r} holds {unknown[0]!r}; the only placeholder is {PLACEHOLDER!r}")
    return template.replace(PLACEHOLDER, phrase)


def is_live(class_noun: str) -> bool:
    """Whether the noun names a living subject: DreamBench's own (cat, dog), common animals, people.

    The last word decides ("golden retriever dog"), unless another says it is a likeness ("stuffed animal", "toy dog").
    """
    noun = class_noun.lower().strip()
    return bool(_LIVE_NOUN.search(noun)) and not _LIKENESS.search(noun)


def dreambench_prompts(class_noun: str) -> tuple[str, ...]:
    """Return the 25 DreamBench templates that suit the noun: those for live subjects, or for objects."""
    return LIVE_PROMPTS if is_live(class_noun) else OBJECT_PROMPTS


def default_samples(class_noun: str) -> tuple[str, ...]:
    """Six templates for a contact sheet: the subject alone, in two scenes, altered twice, and painted."""
    return (
        "a {subject}",
        "a {subject} on the beach",
        "a {subject} in the snow",
        "a {subject} wearing a red hat" if is_live(class_noun) else "a {subject} floating on top of water",
        "a purple {subject}",
        "a painting of a {subject} in the style of Vincent van Gogh",
    )
