"""Bad input is met before Ray starts: exit code 2, a text that names the file or option, and an untouched store."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from PIL import Image

from pipelines.personalize import main

Bad = Callable[[Path, Path], tuple[list[str], list[str]]]
"""Makes a mistake in a folder of good photos; gives the arguments, and what the error must say."""


def _bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def _file(name: str, data: bytes | Callable[[Path], bytes], *says: str) -> Bad:
    def make(folder: Path, _: Path) -> tuple[list[str], list[str]]:
        content = data if isinstance(data, bytes) else data(folder)
        (folder / name).write_bytes(content)
        return ["--images", str(folder), "--class-noun", "mug"], [name, *says]

    return make


def _truncated(folder: Path) -> bytes:
    data = (folder / "1.png").read_bytes()
    return data[: len(data) // 2]


def _small(folder: Path) -> bytes:
    Image.new("RGB", (20, 20)).save(folder / "tiny.png")
    return (folder / "tiny.png").read_bytes()


def _images(path: str, *says: str) -> Bad:
    return lambda folder, _: (["--images", path.format(folder=folder), "--class-noun", "mug"], list(says))


def _option(*arguments: str, says: tuple[str, ...]) -> Bad:
    return lambda folder, _: (["--images", str(folder), "--class-noun", "mug", *arguments], list(says))


def _backbone(change: Callable[[Path], None], *says: str) -> Bad:
    def make(folder: Path, backbone: Path) -> tuple[list[str], list[str]]:
        copy = folder.parent / "broken-backbone"
        shutil.copytree(backbone, copy)
        change(copy)
        return ["--images", str(folder), "--class-noun", "mug", "--backbone", str(copy)], ["broken-backbone", *says]

    return make


def _pickle_weights(backbone: Path) -> None:
    for path in backbone.glob("unet/*.safetensors"):
        path.unlink()
    torch.save({}, backbone / "unet" / "diffusion_pytorch_model.bin")


def _rename_pipeline(backbone: Path) -> None:
    index = backbone / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "FluxPipeline"))


def _captions(caption: str | None, *says: str, more: tuple[str, ...] = ()) -> Bad:
    """Good captions for all photos but one."""

    def make(folder: Path, _: Path) -> tuple[list[str], list[str]]:
        for number, text in enumerate(["a {subject} here", caption, "a {subject} there"]):
            if text is not None:
                (folder / f"{number}.txt").write_text(text)
        return ["--images", str(folder), "--class-noun", "mug", "--captions", *more], list(says)

    return make


BAD_INPUT: dict[str, Bad] = {
    "no such folder": _images("{folder}/nowhere", "nowhere"),
    "no images in the folder": _images("{folder}/../empty", "empty"),
    "a glob that matches nothing": _images("{folder}/*.webp", "*.webp"),
    "a text file named as an image": _file("notes.jpg", b"not an image at all", "not an image"),
    "an empty file": _file("zero.png", b"", "empty"),
    "a truncated image": _file("cut.png", _truncated, "truncated"),
    "a decompression bomb": _file("bomb.png", _bomb(), "decompression bomb"),
    "an image too small": _file("tiny.png", _small, "20"),
    "an empty class noun": _option("--class-noun", " ", says=("class noun",)),
    "no class noun": lambda folder, _: (["--images", str(folder)], ["--class-noun"]),
    "a class noun without images": lambda *_: (["--class-noun", "mug"], ["--images"]),
    "a subject name that no store can hold": _option("--subject", "My Mug!", says=("my-mug",)),
    "an identifier that is a common word": _option("--identifier", "coffee", says=("coffee", "word")),
    "an identifier that does not round-trip": _option("--identifier", "Xq Z", says=("Xq Z",)),
    "a missing backbone": _option("--backbone", "/nowhere/sdxl", says=("/nowhere/sdxl", "missing")),
    "a backbone of an unknown family": _backbone(_rename_pipeline, "FluxPipeline", "not supported"),
    "a backbone of pickled weights": _backbone(_pickle_weights, "unet", "pickle", "safetensors"),
    "a backbone without weights": _backbone(lambda path: shutil.rmtree(path / "vae"), "vae", "incomplete"),
    "a resolution that does not fit": _option("--resolution", "50", says=("50", "multiple")),
    "a batch that does not divide": _option("--batch", "3", "--workers", "2", says=("--batch 3", "--workers 2")),
    "no steps": _option("--steps", "0", says=("--steps",)),
    "a negative prior weight": _option("--prior-weight", "-1", says=("--prior-weight",)),
    "an average that never moves": _option("--ema-decay", "1", says=("--ema-decay", "below 1")),
    "textual inversion of text encoders": _option(
        *("--method", "textual-inversion", "--train-text-encoder"), says=("textual-inversion", "--train-text-encoder")
    ),
    "a warm-up without end": _option("--steps", "5", "--warmup-steps", "5", says=("--warmup-steps 5", "5 steps")),
    "a rate for text encoders that are frozen": _option(
        "--text-encoder-learning-rate", "1e-6", says=("--train-text-encoder",)
    ),
    "an unknown scheduler": _option("--prior-scheduler", "EulerScheduler", says=("EulerScheduler", "nearest")),
    "a prompt with an unknown placeholder": _option("--sample-prompts", "a {dog}", says=("{dog}",)),
    "a prompt that is too long": _option("--sample-prompts", "{subject} " * 60, says=("tokens",)),
    "bf16 without masters": _option("--precision", "bf16", "--zero-stage", "0", says=("--zero-stage",)),
    "fp16 without masters": _option(
        *("--precision", "fp16", "--zero-stage", "0", "--gpus-per-worker", "1"),
        says=("--precision fp16", "--zero-stage"),
    ),
    "fp16 on CPUs": _option("--precision", "fp16", "--gpus-per-worker", "0", says=("--precision fp16", "GPU", "bf16")),
    "Adafactor over shards": _option(
        *("--optimizer", "adafactor", "--zero-stage", "2"), says=("--optimizer adafactor", "--zero-stage 0")
    ),
    "Adafactor in bf16": _option(
        *("--optimizer", "adafactor", "--zero-stage", "0", "--precision", "bf16"),
        says=("--optimizer adafactor", "--precision fp32"),
    ),
    "8-bit AdamW on CPUs": _option(
        *("--optimizer", "adamw-8bit", "--zero-stage", "0", "--gpus-per-worker", "0"),
        says=("--optimizer adamw-8bit", "GPU", "adafactor"),
    ),
    "offloading what is not sharded": _option(
        "--offload", "cpu", "--zero-stage", "0", says=("--offload cpu", "--zero-stage 1, 2 or 3")
    ),
    "a disk for what is not sharded": _option(
        *("--offload", "nvme", "--nvme-path", ".", "--zero-stage", "2"), says=("--offload nvme", "--zero-stage 3")
    ),
    "a disk without a folder": _option(
        "--offload", "nvme", "--zero-stage", "3", says=("--offload nvme", "--nvme-path")
    ),
    "compiled under stage 3": _option("--compile", "--zero-stage", "3", says=("--compile", "--zero-stage 0, 1 or 2")),
    "compiled for many shapes": _option("--compile", "--buckets", says=("--compile", "--buckets")),
    "a folder without a disk": _option("--nvme-path", ".", says=("--offload nvme", "--nvme-path")),
    "a folder on a disk that is not there": _option(
        *("--offload", "nvme", "--nvme-path", "/nowhere/disk", "--zero-stage", "3"), says=("--nvme-path /nowhere/disk",)
    ),
    "an average of what is on a disk": _option(
        *("--offload", "nvme", "--nvme-path", ".", "--zero-stage", "3", "--ema-decay", "0.9"),
        says=("--offload nvme", "--ema-decay"),
    ),
    "images beside a manifest": _option("--manifest", "m.yaml", says=("--manifest", "--images")),
    "a manifest that is not there": lambda *_: (["--manifest", "nowhere.yaml"], ["nowhere.yaml"]),
    "a photo without its caption": _captions(None, "1.png", "no caption", "1.txt"),
    "a caption that does not name the subject": _captions("a mug on a table", "1.txt", "{subject}"),
    "a caption with an unknown placeholder": _captions("a {subject} on a {thing}", "1.png", "{thing}"),
    "a caption that is too long": _captions("a {subject} on a table " * 20, "1.png", "tokens"),
    "buckets at a side that has none": _option("--buckets", "--resolution", "8", says=("--buckets", "multiples of 8")),
    "square enlargements of what is not square": _option(
        "--buckets", "--super-resolution", "x", says=("--buckets", "--super-resolution")
    ),
    "a teacher without a term": _option(
        "--prior-kind", "teacher", "--prior-weight", "0", says=("--prior-kind teacher", "--prior-weight 0")
    ),
    "a teacher of a super-resolution stage": _option(
        "--prior-kind", "teacher", "--super-resolution", "x", says=("--prior-kind teacher", "--super-resolution")
    ),
    "a teacher of Textual Inversion": _option(
        "--prior-kind", "teacher", "--method", "textual-inversion", says=("--prior-kind teacher", "textual-inversion")
    ),
    "an unwritable store": lambda folder, _: (
        ["--images", str(folder), "--class-noun", "mug", "--store", str(folder / "0.png" / "store")],
        ["store", "0.png", "cannot be written"],
    ),
}


def test_a_disk_that_deepspeed_cannot_write_to_is_told_before_ray_starts(
    folder: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    arguments = ["--images", str(folder), "--class-noun", "mug", "--backbone", str(small_sdxl), "--zero-stage", "3"]
    arguments += ["--offload", "nvme", "--nvme-path", str(tmp_path), "--store", str(tmp_path / "store")]
    assert main(arguments) == 2
    assert "libaio-dev" in capsys.readouterr().err
    assert not ray.is_initialized()


def test_fp16_does_not_train_t5(
    folder: Path, small_if: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--images", str(folder), "--class-noun", "mug", "--backbone", str(small_if), "--precision", "fp16"]
    arguments += ["--gpus-per-worker", "1", "--store", str(tmp_path / "store"), "--dry-run"]
    assert main(arguments) == 0
    assert main([*arguments, "--train-text-encoder"]) == 2
    assert "--precision fp16 overflows in T5" in capsys.readouterr().err


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return Path(shutil.copytree(photos, tmp_path / "mug"))


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_bad_input_is_named_and_touches_nothing(
    mistake: str, folder: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, says = BAD_INPUT[mistake](folder, small_sdxl)
    store = tmp_path / "store"
    assert main(["--backbone", str(small_sdxl), "--store", str(store), *bad]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for text in says:
        assert text in error
    assert not store.exists()
    assert not ray.is_initialized()


def test_too_little_disk_is_told_before_anything_is_written(
    folder: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    store = tmp_path / "store"
    arguments = ["--images", str(folder), "--class-noun", "mug", "--backbone", str(small_sdxl), "--store", str(store)]
    assert main(arguments) == 2
    assert "too little disk" in capsys.readouterr().err
    assert not store.exists()


def test_junk_in_the_folder_is_passed_over_and_named(
    folder: Path, small_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "Thumbs.db").write_bytes(b"junk")
    (folder / ".ipynb_checkpoints").mkdir()
    arguments = ["--images", str(folder), "--class-noun", "mug", "--backbone", str(small_sdxl), "--dry-run"]
    assert main([*arguments, "--store", str(tmp_path / "store")]) == 0
    plan = capsys.readouterr().out
    assert "Thumbs.db" in plan
    assert ".ipynb_checkpoints" in plan
    assert "3: 0.png, 1.png, 2.png" in plan
