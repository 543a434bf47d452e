"""Subjects: photos, manifests, captions, class nouns, identifiers, prompts and crops."""
