"""The benchmark networks that are in no package: CIFAR ResNets (He et al., 2016), VGG-19, and three random ones for speed."""

from __future__ import annotations

from collections.abc import Callable
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
    """ResNet of `6 n + 2` layers for 32 x 32 images and ten classes; its stages have `width`, twice and four times as many channels."""

    def __init__(self, blocks: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

        def stage(inside: int, outside: int, stride: int) -> nn.Sequential:
            rest = (Block(outside, outside, 1) for _ in range(blocks - 1))
            return nn.Sequential(Block(inside, outside, stride), *rest)

        self.layer1 = stage(width, width, 1)
        self.layer2, self.layer3 = stage(width, 2 * width, 2), stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, 10)

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


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a shortcut that is a 1 x 1 convolution where the shape changes (He et al., 2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[n, outside, h / stride, w / stride]`."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18, with the 3 x 3 stem for 32 pixels or the 7 x 7 one with max pooling for 224."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        size, stride, padding = (7, 2, 3) if pixels > 64 else (3, 1, 1)
        self.conv1 = nn.Conv2d(3, 64, size, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1) if pixels > 64 else nn.Identity()
        layers, inside = [], 64
        for width, first in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [Residual(inside, width, first), Residual(width, width, 1)]
            inside = width
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[n, classes]` of images `[n, 3, pixels, pixels]`."""
        x = self.layers(self.pool(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class EncoderLayer(nn.Module):
    """A pre-norm Transformer layer: 4 heads of 64, a hidden layer of 1024 with GELU (Xiong et al., 2020)."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[n, steps, width]` of the same."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Four pre-norm Transformer layers of width 256 over 128 steps, averaged and classified; 3.2 million parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EncoderLayer() for _ in range(4)))
        self.norm = nn.LayerNorm(256)
        self.linear = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[n, classes]` of embeddings `[n, 128, 256]`."""
        return self.linear(self.norm(self.layers(x)).mean(1))


RANDOM: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18_224": (lambda: ResNet18(224, 1000), (3, 224, 224)),
    "resnet18_32": (lambda: ResNet18(32, 10), (3, 32, 32)),
    "encoder": (Encoder, (128, 256)),
}
"""The networks of random weights, by name: what builds one, and the shape of a sample of noise."""


def random_network(name: str, batches: int = 4, batch: int = 8) -> tuple[nn.Module, list[Tensor]]:
    """Return a network of `RANDOM` in evaluation mode, its norms settled on noise, and batches of that noise.

    Args:
        name: in `RANDOM`.
        batches: of noise.
        batch: samples in each.
    """
    build, shape = RANDOM[name]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build().train()
        noise = [torch.randn(batch, *shape) for _ in range(batches)]
        for inputs in noise:
            model(inputs)
    return model.eval(), noise
