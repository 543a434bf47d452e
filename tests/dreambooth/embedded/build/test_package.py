import pytest
import torch
from transformers import CLIPTextModel

from dreambooth.embedded.build.config import PRESETS
from dreambooth.embedded.build.judges import Individuals, new_clip, save_judges
from dreambooth.embedded.build.package import SHARD_BYTES, TOTAL_BYTES, assemble, check_sizes, save_backbone
from dreambooth.embedded.build.stages import Build
from dreambooth.embedded.build.text import new_contrast
from dreambooth.embedded.build.tokenizer import train_tokenizer
from dreambooth.embedded.build.training import Clock
from dreambooth.embedded.build.unet import new_scheduler


def test_what_ships_keeps_the_limits_at_its_full_shapes(tmp_path):
    config = PRESETS["full"]
    build = Build(tmp_path, config, Clock(float("inf"), torch.device("cpu")))
    tokenizer = train_tokenizer(["a dog on the beach"], config.tokenizer, tmp_path / "tokenizer")
    first, second = new_contrast(tokenizer, config.text).towers()
    encoders = CLIPTextModel(first.config), second
    weights = tmp_path / "weights"
    save_backbone(
        assemble(build.new_vae(), encoders, tokenizer, build.new_unet(), new_scheduler()), weights / "backbone"
    )
    save_judges(new_clip(tokenizer, config.judges), Individuals(config.judges), tokenizer, 64, weights / "judges")
    assert TOTAL_BYTES / 2 < check_sizes(weights) <= TOTAL_BYTES
    assert max(path.stat().st_size for path in weights.rglob("*")) <= SHARD_BYTES


def test_a_file_or_a_folder_over_its_limit_is_refused(tmp_path):
    def write(name: str, size: int) -> None:
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)

    for number in range(4):
        write(f"{number}.safetensors", TOTAL_BYTES // 4)
    assert check_sizes(tmp_path) == TOTAL_BYTES
    write("one-more.json", 1)
    with pytest.raises(ValueError, match="in all"):
        check_sizes(tmp_path)
    write("large.safetensors", SHARD_BYTES + 1)
    with pytest.raises(ValueError, match="large"):
        check_sizes(tmp_path)
