"""Captions: the text file beside a photo, NAME.txt beside NAME.jpg, as kohya's scripts and SimpleTuner have it."""

from __future__ import annotations

import posixpath

import pyarrow.fs as pafs

from dreambooth.subjects.prompts import PLACEHOLDER


def caption_file(photo: str) -> str:
    """Where the caption of the photo at this path is."""
    return posixpath.splitext(photo)[0] + ".txt"


def read_caption(filesystem: pafs.FileSystem, photo: str) -> str:
    """The caption of the photo at this path: one line that names the subject as {subject}.

    Raises:
        ValueError: the file is missing, not one line of UTF-8 text, or does not name {subject}; the text says which.
    """
    path = caption_file(photo)
    example = f"such as 'a {PLACEHOLDER} on a table'"
    if filesystem.get_file_info(path).type != pafs.FileType.File:
        raise ValueError(f"{photo}: it has no caption; write one to {path}, {example}")
    with filesystem.open_input_stream(path) as stream:
        data = stream.read()
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as such") from error
    if len(lines) != 1:
        raise ValueError(f"{path}: a caption is one line of text, and it has {len(lines)}; write one, {example}")
    if PLACEHOLDER not in lines[0]:
        raise ValueError(
            f"{path}: the caption {lines[0]!r} does not name {PLACEHOLDER}; write one that does, {example}"
        )
    return lines[0]
