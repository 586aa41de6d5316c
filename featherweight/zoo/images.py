"""Convolutional networks for images, small, with the structure of their papers and written as people write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
BOX = 4


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, groups: int = 1, base_width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(inplanes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, inplanes, h, w]` to `[n, planes, h / stride, w / stride]`."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt) and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, groups: int = 1, base_width: int = 64) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inplanes, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, inplanes, h, w]` to `[n, 4 * planes, h / stride, w / stride]`."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


def _downsample(inplanes: int, outplanes: int, stride: int) -> nn.Module | None:
    if stride == 1 and inplanes == outplanes:
        return None
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


class ResNet(nn.Module):
    """Residual network as torchvision lays it out.

    Papers: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; grouped: Xie et al., "Aggregated Residual
    Transformations for Deep Neural Networks" (ResNeXt), CVPR 2017.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], layers: tuple[int, ...], groups: int = 1, base_width: int = 64
    ) -> None:
        super().__init__()
        self.inplanes = 16
        self.conv1 = nn.Conv2d(3, self.inplanes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = []
        for place, blocks in enumerate(layers):
            planes, rows = 16 << place, []
            for number in range(blocks):
                stride = 2 if place and not number else 1
                rows.append(block(self.inplanes, planes, stride, groups, base_width))
                self.inplanes = planes * block.expansion
            stages.append(nn.Sequential(*rows))
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 10]`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = torch.flatten(self.avgpool(self.layers(x)), 1)
        return self.fc(x)  # type: ignore[no-any-return]


class VGG(nn.Module):
    """Plain stacked 3x3 convolutions with batch norm and three linear layers.

    Paper: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (16, 0, 32, 0, 64, 64, 0):
            if not width:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(64 * 2 * 2, 128),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(128, 128),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(128, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, 32, 32]` to `[n, 10]`."""
        x = self.avgpool(self.features(x))
        return self.classifier(x.view(x.size(0), -1))  # type: ignore[no-any-return]


class DenseLayer(nn.Module):
    """Norm, 1x1, norm, 3x3; its input stays in the concatenation."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Every earlier map of the block to `[n, growth, h, w]`."""
        x = torch.cat(features, 1)
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x)))  # type: ignore[no-any-return]


class DenseNet(nn.Module):
    """Dense blocks with transitions that halve the channels.

    Paper: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.
    """

    def __init__(self, growth: int = 16, blocks: tuple[int, ...] = (3, 3, 3)) -> None:
        super().__init__()
        channels = 32
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for count in blocks:
            self.blocks.append(nn.ModuleList(DenseLayer(channels + n * growth, growth) for n in range(count)))
            channels += count * growth
            if len(self.blocks) < len(blocks):
                conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
                self.transitions.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), conv, nn.AvgPool2d(2, 2)))
                channels //= 2
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 10]`."""
        x = self.stem(x)
        for place, block in enumerate(self.blocks):
            features = [x]
            for layer in block:  # type: ignore[attr-defined]
                features.append(layer(features))
            x = torch.cat(features, 1)
            if place < len(self.transitions):
                x = self.transitions[place](x)
        x = F.adaptive_avg_pool2d(F.relu(self.norm(x), inplace=True), (1, 1))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, h, w]` to the same shape."""
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm, inverted bottleneck of linear layers, layer scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, dim, h, w]` to the same shape."""
        residual = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        return residual + (self.gamma * x).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patch stem, stages of blocks, downsampling by 2x2 convolutions.

    Paper: Liu et al., "A ConvNet for the 2020s", CVPR 2022.
    """

    def __init__(self, dims: tuple[int, ...] = (24, 48, 96), depths: tuple[int, ...] = (1, 1, 2)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, dims[0], 4, 4), LayerNorm2d(dims[0], eps=1e-6)]
        for place, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if place:
                layers += [LayerNorm2d(dims[place - 1], eps=1e-6), nn.Conv2d(dims[place - 1], dim, 2, 2)]
            layers += [ConvNeXtBlock(dim) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 10]`; h and w multiples of 16."""
        return self.head(self.norm(self.features(x).mean([-2, -1])))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Encoder and decoder with skip connections, upsampling by transposed convolutions.

    Paper: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1 = self._double(3, width)
        self.down2 = self._double(width, 2 * width)
        self.bottom = self._double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.dec2 = self._double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.dec1 = self._double(2 * width, width)
        self.out = nn.Conv2d(width, CLASSES, 1)

    @staticmethod
    def _double(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inner, outer, 3, padding=1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(inplace=True),
            nn.Conv2d(outer, outer, 3, padding=1, bias=False),
            nn.BatchNorm2d(outer),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 10, h, w]`; h and w multiples of 4."""
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.up2(self.bottom(F.max_pool2d(second, 2)))
        x = self.up1(self.dec2(torch.cat([x, second], dim=1)))
        return self.out(self.dec1(torch.cat([x, first], dim=1)))  # type: ignore[no-any-return]


class BasicConv2d(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inner: int, outer: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outer, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, inner, h, w]` to `[n, outer, h, w]`."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBlock(nn.Module):
    """Four branches, concatenated."""

    def __init__(self, channels: int, one: int, reduce3: int, three: int, reduce5: int, five: int, pool: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(channels, one, 1)
        self.branch2 = nn.Sequential(BasicConv2d(channels, reduce3, 1), BasicConv2d(reduce3, three, 3))
        self.branch3 = nn.Sequential(BasicConv2d(channels, reduce5, 1), BasicConv2d(reduce5, five, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), BasicConv2d(channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, channels, h, w]` to `[n, one + three + five + pool, h, w]`."""
        return torch.cat([branch(x) for branch in (self.branch1, self.branch2, self.branch3, self.branch4)], 1)


class Inception(nn.Module):
    """A stem and three inception blocks.

    Paper: Szegedy et al., "Going Deeper with Convolutions" (GoogLeNet), CVPR 2015.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv2d(3, 32, 3)
        self.inception3a = InceptionBlock(32, 16, 24, 32, 8, 16, 16)
        self.inception3b = InceptionBlock(80, 32, 32, 48, 8, 24, 16)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.inception4a = InceptionBlock(120, 48, 32, 64, 8, 24, 24)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(160, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 10]`."""
        x = self.inception3b(self.inception3a(F.max_pool2d(self.stem(x), 2)))
        x = F.adaptive_avg_pool2d(self.inception4a(self.maxpool(x)), (1, 1))
        return self.fc(self.dropout(torch.flatten(x, 1)))  # type: ignore[no-any-return]


class Reused(nn.Module):
    """One convolution applied twice, as recursive networks do.

    Paper: Kim et al., "Deeply-Recursive Convolutional Network for Image Super-Resolution", CVPR 2016.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, padding=1)
        self.shared = nn.Conv2d(48, 48, 3, padding=1)
        self.mix = nn.Conv2d(48, 64, 3, stride=2, padding=1)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, h, w]` to `[n, 10]`."""
        x = F.relu(self.stem(x))
        x = F.relu(self.shared(x))
        x = F.relu(self.shared(x))
        return self.fc(F.relu(self.mix(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Reshaped(nn.Module):
    """LeNet-like, with the number of features written into the forward.

    Paper: LeCun et al., "Gradient-Based Learning Applied to Document Recognition", Proceedings of the IEEE, 1998.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(256, 128)
        self.fc2 = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, 8, 8]` to `[n, 10]`."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.reshape(-1, 256)
        return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]


class Detector(nn.Module):
    """An image and a vector in, a class and a box out, as a dict.

    Paper: the pair of heads is that of Girshick, "Fast R-CNN", ICCV 2015.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.embed = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
        self.fuse = nn.Linear(64 + 32, 96)
        self.class_head = nn.Linear(96, CLASSES)
        self.box_head = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, BOX))

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        """`[n, 3, h, w]` and `[n, 12]` to `{"class": [n, 10], "box": [n, 4]}`."""
        seen = F.adaptive_avg_pool2d(self.backbone(image), 1).flatten(1)
        fused = F.relu(self.fuse(torch.cat((seen, self.embed(vector)), dim=1)))
        return {"class": self.class_head(fused), "box": self.box_head(fused)}
