"""The subject store."""

from dreambooth.store.subject_store import SubjectStore, Version

__all__ = ["SubjectStore", "Version"]
