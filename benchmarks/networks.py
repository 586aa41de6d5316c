"""The benchmark networks that are in no package: CIFAR ResNets (He et al., 2016) with option-A shortcuts, and VGG-19."""

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
        model.load_state_dict({key.removeprefix("module."): value for key, value in load_file(weights).items()})
    return model.eval()


def resnet20(folder: Path) -> nn.Module:
    """Return ResNet-20 with the weights trained on lossless CIFAR-10."""
    torch.manual_seed(0)
    return resnet(20, folder / "weights" / "cifar10_resnet20.safetensors")


def resnet56(folder: Path) -> nn.Module:
    """Return ResNet-56 with the weights trained on lossless CIFAR-10; 853,018 parameters."""
    return resnet(56, folder / "weights" / "cifar10_resnet56.safetensors")


class VGG(nn.Module):
    """VGG-19 (Simonyan & Zisserman, 2015) for 32 x 32 images: 16 convolutions with batch norm and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(count):
                layers += [nn.Conv2d(inside, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                inside = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[n, 10]` of images `[n, 3, 32, 32]`."""
        return self.classifier(self.features(x).flatten(1))


def vgg19(folder: Path) -> nn.Module:
    """Return VGG-19 with the weights trained on the JPEG copy of CIFAR-10; 20,035,018 parameters, float32."""
    model = VGG()
    stored = load_file(folder / "weights" / "cifar10jpeg_vgg19.safetensors")
    model.load_state_dict({key: value.float() for key, value in stored.items()})
    return model.eval()
