"""Networks made for phones: inverted residuals, squeeze-and-excitation, channel split and shuffle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.zoo.images import CLASSES


def _conv(inner: int, outer: int, kernel: int, stride: int, groups: int, act: type[nn.Module] | None) -> nn.Sequential:
    """Convolution, batch norm and activation, as torchvision's `Conv2dNormActivation`."""
    layers: list[nn.Module] = [
        nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outer),
    ]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


class SqueezeExcitation(nn.Module):
    """Channel attention by two 1x1 convolutions (Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018)."""

    def __init__(self, channels: int, squeeze: int, act: type[nn.Module], scale: type[nn.Module]) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation, self.scale_activation = act(), scale()

    def forward(self, x: Tensor) -> Tensor:
        """`[n, channels, h, w]` to the same shape."""
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-and-excitation where asked for, project; added to the input where shapes allow."""

    def __init__(
        self,
        inner: int,
        outer: int,
        stride: int,
        expand: int,
        kernel: int = 3,
        act: type[nn.Module] = nn.ReLU6,
        gate: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        hidden = inner * expand
        layers: list[nn.Module] = [_conv(inner, hidden, 1, 1, 1, act)] if expand != 1 else []
        layers.append(_conv(hidden, hidden, kernel, stride, hidden, act))
        if gate is not None:
            squeeze = hidden // 4 if gate is nn.Hardsigmoid else max(1, inner // 4)
            layers.append(SqueezeExcitation(hidden, squeeze, nn.ReLU if gate is nn.Hardsigmoid else act, gate))
        layers.append(_conv(hidden, outer, 1, 1, 1, None))
        self.block = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        """`[n, inner, h, w]` to `[n, outer, h / stride, w / stride]`."""
        if self.use_res_connect:
            return x + self.block(x)  # type: ignore[no-any-return]
        return self.block(x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """Inverted residuals with linear bottlenecks.

    Paper: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
    """

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [_conv(3, 32, 3, 2, 1, nn.ReLU6)]
        channels = 32
        for expand, outer, count, stride in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 1, 1)):
            for number in range(count):
                features.append(InvertedResidual(channels, outer, stride if not number else 1, expand))
                channels = outer
        features.append(_conv(channels, 160, 1, 1, 1, nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(160, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 10]`."""
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


class MobileNetV3(nn.Module):
    """Inverted residuals with squeeze-and-excitation and hard swish.

    Paper: Howard et al., "Searching for MobileNetV3", ICCV 2019.
    """

    def __init__(self) -> None:
        super().__init__()
        swish, gate = nn.Hardswish, nn.Hardsigmoid
        self.features = nn.Sequential(
            _conv(3, 16, 3, 2, 1, swish),
            InvertedResidual(16, 16, 2, 1, 3, nn.ReLU, gate),
            InvertedResidual(16, 24, 1, 4, 3, nn.ReLU),
            InvertedResidual(24, 24, 1, 4, 3, nn.ReLU),
            InvertedResidual(24, 40, 2, 4, 5, swish, gate),
            InvertedResidual(40, 40, 1, 4, 5, swish, gate),
            _conv(40, 160, 1, 1, 1, swish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(160, 128), nn.Hardswish(True), nn.Dropout(0.2), nn.Linear(128, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 10]`."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))  # type: ignore[no-any-return]


class EfficientNet(nn.Module):
    """MBConv blocks: inverted residuals with squeeze-and-excitation and SiLU.

    Paper: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019.
    """

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [_conv(3, 32, 3, 2, 1, nn.SiLU)]
        channels = 32
        for expand, outer, count, stride, kernel in (
            (1, 16, 1, 1, 3),
            (6, 24, 2, 2, 3),
            (6, 40, 2, 2, 5),
            (6, 64, 1, 1, 3),
        ):
            for number in range(count):
                step = stride if not number else 1
                features.append(InvertedResidual(channels, outer, step, expand, kernel, nn.SiLU, nn.Sigmoid))
                channels = outer
        features.append(_conv(channels, 192, 1, 1, 1, nn.SiLU))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(192, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 10]`."""
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


def _shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Channel split (or two strided branches), concatenation, channel shuffle."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, outer // 2
        start = inner if stride > 1 else half
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                *_conv(inner, inner, 3, stride, inner, None), *_conv(inner, half, 1, 1, 1, nn.ReLU)
            )
        self.branch2 = nn.Sequential(
            *_conv(start, half, 1, 1, 1, nn.ReLU),
            *_conv(half, half, 3, stride, half, None),
            *_conv(half, half, 1, 1, 1, nn.ReLU),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[n, inner, h, w]` to `[n, outer, h / stride, w / stride]`."""
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return _shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """Units that split, transform one half and shuffle.

    Paper: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018.
    """

    def __init__(self, widths: tuple[int, ...] = (48, 96), repeats: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv(3, 24, 3, 1, 1, nn.ReLU)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, stages = 24, []
        for width in widths:
            rest = [ShuffleUnit(width, width, 1) for _ in range(repeats - 1)]
            stages.append(nn.Sequential(ShuffleUnit(channels, width, 2), *rest))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.conv5 = _conv(channels, 160, 1, 1, 1, nn.ReLU)
        self.fc = nn.Linear(160, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 10]`."""
        x = self.conv5(self.stages(self.maxpool(self.conv1(x))))
        return self.fc(x.mean([2, 3]))  # type: ignore[no-any-return]
