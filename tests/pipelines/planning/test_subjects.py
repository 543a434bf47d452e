"""What a subject is called when nobody says."""

from __future__ import annotations

import pytest

from pipelines.planning.options import parse
from pipelines.planning.subjects import subject_specs


@pytest.mark.parametrize(
    "images",
    [
        "photos/My Mug",
        "photos/my-mug/*.jpg",
        "s3://bucket/my-mug",
        "s3://bucket/photos/my-mug?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1",
        "s3://bucket/my-mug/*.jpg?region=us-east-1",
    ],
)
def test_a_subject_is_named_for_the_folder_of_its_photos(images: str) -> None:
    [spec] = subject_specs(parse(["--images", images, "--class-noun", "mug"], ""))
    assert spec.name == "my-mug"
