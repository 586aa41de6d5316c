"""The benchmark networks that are in no package: the CIFAR ResNets of He et al. (2016) with option-A shortcuts."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut that subsamples and pads with zero channels where the width doubles."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride = stride
        self.padding = (outside - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return `[n, outside, h / stride, w / stride]`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet(nn.Module):
    """ResNet of `6 n + 2` layers for 32 x 32 images and ten classes, widths 16, 32 and 64."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(Block(32 if i else 16, 32, 1 if i else 2) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(Block(64 if i else 32, 64, 1 if i else 2) for i in range(blocks)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[n, 10]` of images `[n, 3, 32, 32]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet(depth: int, weights: Path | None = None) -> nn.Module:
    """Return a ResNet-20 or -56, with the weights of a safetensors file if one is given."""
    model = ResNet((depth - 2) // 6)
    if weights is not None:
        model.load_state_dict(
            {key.removeprefix("module."): value for key, value in load_file(weights).items()}, strict=False
        )
    return model.eval()


def resnet20(folder: Path) -> nn.Module:
    """Return ResNet-20 with the weights trained on lossless CIFAR-10."""
    torch.manual_seed(0)
    return resnet(20, folder / "weights" / "cifar10_resnet20.safetensors")
