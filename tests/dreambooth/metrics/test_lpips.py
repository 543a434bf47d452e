"""LPIPS against its equation, written out over a plain AlexNet, and its weights from the authors' names to ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth.metrics.lpips import Lpips, from_authors

SLICES = {"slice1": (0, 2), "slice2": (2, 5), "slice3": (5, 8), "slice4": (8, 10), "slice5": (10, 12)}
CHANNELS = (64, 192, 384, 256, 256)


def alexnet() -> nn.Sequential:
    """The features of torchvision's AlexNet, whose numbers name the authors' tensors."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """What `lpips.LPIPS(net="alex").state_dict()` holds, by its names."""
    features = alexnet()
    found = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for name, (start, end) in SLICES.items():
        for number in range(start, end):
            for kind, tensor in features[number].state_dict().items():
                found[f"net.{name}.{number}.{kind}"] = tensor
    for layer, channels in enumerate(CHANNELS):
        found[f"lin{layer}.model.1.weight"] = torch.rand(1, channels, 1, 1)
    return found


@pytest.fixture(scope="module")
def judge(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Lpips:
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(from_authors(state), path)
    return Lpips(path)


def pictures(count: int) -> list[Image.Image]:
    draws = np.random.default_rng(1)
    return [Image.fromarray(draws.integers(0, 256, (72, 64, 3), np.uint8)) for _ in range(count)]


@torch.no_grad()
def equation_1(x: Tensor, x_0: Tensor, state: dict[str, Tensor]) -> float:
    features = alexnet()
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, x_0 = ((one - shift[:, None, None]) / scale[:, None, None] for one in (x, x_0))
    distance = 0.0
    for layer, (start, end) in enumerate(SLICES.values()):
        x, x_0 = features[start:end](x), features[start:end](x_0)
        w = state[f"lin{layer}.model.1.weight"].flatten()
        for row in range(x.shape[-2]):
            for column in range(x.shape[-1]):
                y, y_0 = x[0, :, row, column], x_0[0, :, row, column]
                difference = y / (y.norm() + 1e-10) - y_0 / (y_0.norm() + 1e-10)
                distance += float((w * difference**2).sum()) / (x.shape[-2] * x.shape[-1])
    return distance


def test_distances_are_the_equations(judge: Lpips, state: dict[str, Tensor]) -> None:
    drawn = pictures(3)
    found = judge.distances(drawn)
    pixels = [torch.from_numpy(np.asarray(one)).permute(2, 0, 1)[None].float() / 127.5 - 1 for one in drawn]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float(found[one, other]) == pytest.approx(equation_1(pixels[one], pixels[other], state), rel=1e-4)
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.zeros(3))


def test_a_picture_is_at_no_distance_from_itself_and_one_has_no_pairs(judge: Lpips) -> None:
    [one] = pictures(1)
    assert float(judge.distances([one, one]).max()) < 1e-6
    assert judge.distances([one]).tolist() == [[0.0]]


def test_weights_that_are_none_are_named(judge: Lpips, state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Lpips(tmp_path / "nowhere.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        Lpips(tmp_path / "no.safetensors")
    save_file(from_authors(state), tmp_path / "whole.safetensors")
    tensors = load_file(tmp_path / "whole.safetensors")
    del tensors["w.3"]
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"lack w\.3"):
        Lpips(tmp_path / "part.safetensors")
