"""From options to subjects: their photos read and checked, their identifiers, and what each photo is called."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

from dreambooth.backbones import Backbone
from dreambooth.embedded.vocabulary import NOUNS as VOCABULARY
from dreambooth.metrics.clip import ClipJudge
from dreambooth.metrics.embedded import EmbeddedClip
from dreambooth.store import SubjectStore
from dreambooth.subjects.class_noun import NOUNS, TEMPLATE, FoundNoun, PictureTextJudge, find_class_noun
from dreambooth.subjects.identifier import Identifier, check_identifier, find_identifier
from dreambooth.subjects.manifest import SubjectSpec, load_manifest
from dreambooth.subjects.photos import Subject, load_subject
from dreambooth.subjects.prompts import fill
from pipelines.planning.options import Options


def subject_specs(options: Options) -> list[SubjectSpec]:
    """The subjects that the options name, unread."""
    chosen = options.subject
    single = {"subject": chosen.subject, "images": chosen.images, "class-noun": chosen.class_noun}
    single["identifier"] = chosen.identifier
    given = [f"--{name}" for name, value in single.items() if value]
    if chosen.manifest is not None:
        if given:
            raise ValueError(f"--manifest lists the subjects itself: leave out {', '.join(given)}")
        return load_manifest(chosen.manifest)
    if not chosen.images:
        if given:
            raise ValueError(f"no images: {', '.join(given)} came without --images FOLDER")
        from dreambooth.embedded import sample_subject

        return [sample_subject()]
    if chosen.class_noun is None and _class_noun_judge(options) is None:
        raise ValueError(
            '--class-noun is missing: say what the images show, for example --class-noun "dog", or name a CLIP model '
            "that finds it, for example --class-noun-judge openai/clip-vit-large-patch14"
        )
    name = chosen.subject or _name_from(chosen.images[0])
    return [SubjectSpec(name, chosen.images, chosen.class_noun, chosen.identifier, ())]


def _name_from(images: str) -> str:
    path = images.split("?")[0] if "://" in images else images
    parts = [part for part in re.split(r"[/\\]", path) if part and not set(part) & set("*?[]")]
    stem = re.sub(r"\.\w+$", "", parts[-1]) if parts else ""
    name = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:63]
    if not name:
        raise ValueError(f"--subject is missing, and no name can be made of --images {images}")
    return name


def read_subject(options: Options, spec: SubjectSpec) -> tuple[Subject, FoundNoun | None]:
    """The subject with its photos, and where its class noun comes from when nobody gave one."""
    captions = options.subject.captions
    if spec.class_noun is not None:
        return load_subject(spec.name, spec.images, spec.class_noun, captions=captions), None
    judge = _class_noun_judge(options)
    if judge is None:
        raise ValueError(
            f"subject {spec.name!r} has no class noun: give it in the manifest, or name a CLIP model that finds it "
            "with --class-noun-judge"
        )
    subject = load_subject(spec.name, spec.images, "subject", captions=captions)
    words = (tuple(VOCABULARY), "a {}") if judge == EmbeddedClip.name else (NOUNS, TEMPLATE)
    found = find_class_noun(_judge(judge), [image.pixels() for image in subject.images], *words)
    return replace(subject, class_noun=found.noun), found


def _class_noun_judge(options: Options) -> str | None:
    """The judge that finds missing class nouns: the one that was named, or beside the embedded backbone its own."""
    own = EmbeddedClip.name if options.model.backbone == "embedded" and EmbeddedClip.ships() else None
    return options.subject.class_noun_judge or own


@cache
def _judge(source: str) -> PictureTextJudge:
    return EmbeddedClip() if source == EmbeddedClip.name else ClipJudge(source)


def identifier_of(
    options: Options, spec: SubjectSpec, backbone: Backbone, store: SubjectStore, taken: set[str]
) -> Identifier:
    """The subject's [V]: the one that was given, the one that it has in the store, or a new one; none is `taken`."""
    tokenizers = tuple(backbone.text.tokenizers.values())
    used = store.identifiers(besides=spec.name) | taken
    wanted = spec.identifier or store.identifier(spec.name)
    if wanted is None:
        return find_identifier(
            tokenizers, seed=options.run.seed, subject=spec.name, used=used, clean=backbone.text.clean
        )
    identifier = check_identifier(wanted, tokenizers, backbone.text.clean)
    if identifier.text in used:
        raise ValueError(f"--identifier {identifier.text!r} belongs to another subject of {store.root}: choose another")
    return identifier


def photo_prompts(subject: Subject, phrase: str, backbone: Backbone) -> tuple[str, ...]:
    """The photos' captions with what the subject is called, or () where they have none.

    Raises ValueError that names the photo of a caption which cannot be a prompt.
    """
    prompts = []
    for image in subject.images:
        if image.caption is not None:
            try:
                prompts.append(fill(image.caption, phrase))
                backbone.text.tokenize(prompts[-1:])
            except ValueError as error:
                raise ValueError(f"subject {subject.name!r}: the caption of {image.name}: {error}") from error
    return tuple(prompts)
