"""Tiny models that each hold one thing compression gets wrong, with a few labelled batches: for tests, plugins' too.

Weights are seeded and random, and so are the statistics and gains of every norm, so that no channel is a copy of another
and no fold or cut is right by luck.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import Data, Task

CLASSES = 4
_BATCH = 8


class Plain(nn.Module):
    """Convolutions with batch norms, then a flatten in front of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(12 * 4, 16)
        self.norm = nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """`[n, 3, 8, 8]` to `[n, 4]`."""
        return self.classifier(F.relu(self.norm(self.hidden(self.features(image)))))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two residual blocks, the second with a projection, and global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.first = nn.ModuleDict(self._block(8, 8, 1))
        self.second = nn.ModuleDict(self._block(8, 12, 2))
        self.projection = nn.Conv2d(8, 12, 1, stride=2, bias=False)
        self.projection_norm = nn.BatchNorm2d(12)
        self.classifier = nn.Linear(12, CLASSES)

    @staticmethod
    def _block(inner: int, outer: int, stride: int) -> dict[str, nn.Module]:
        return {
            "conv1": nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False),
            "norm1": nn.BatchNorm2d(outer),
            "conv2": nn.Conv2d(outer, outer, 3, padding=1, bias=False),
            "norm2": nn.BatchNorm2d(outer),
        }

    @staticmethod
    def _branch(block: nn.ModuleDict, image: Tensor) -> Tensor:
        inner = F.relu(block["norm1"](block["conv1"](image)))
        return block["norm2"](block["conv2"](inner))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> Tensor:
        """`[n, 3, 8, 8]` to `[n, 4]`."""
        image = F.relu(self.stem_norm(self.stem(image)))
        image = F.relu(image + self._branch(self.first, image))
        image = F.relu(self.projection_norm(self.projection(image)) + self._branch(self.second, image))
        return self.classifier(image.mean((2, 3)))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """A depthwise separable branch and a plain one, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.other = nn.Conv2d(8, 6, 3, padding=1)
        self.mix = nn.Conv2d(18, 10, 1)
        self.classifier = nn.Linear(10, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """`[n, 3, 8, 8]` to `[n, 4]`."""
        image = F.relu(self.stem(image))
        left = self.pointwise(F.relu6(self.depthwise_norm(self.depthwise(image))))
        mixed = self.mix(torch.cat((F.relu(left), F.relu(self.other(image))), 1))
        return self.classifier(F.adaptive_avg_pool2d(F.relu(mixed), 1).flatten(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """An embedding, an LSTM and a linear layer on its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.lstm = nn.LSTM(12, 16, batch_first=True)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, 6]` tokens to `[n, 4]`."""
        steps, _ = self.lstm(self.embedding(tokens))
        return self.classifier(steps[:, -1])  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention in separate linear layers, with the number of heads as an attribute."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def _split(self, steps: Tensor) -> Tensor:
        return steps.reshape(*steps.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, steps: Tensor) -> Tensor:
        """`[n, steps, width]` to the same shape."""
        query, key, value = self._split(self.query(steps)), self._split(self.key(steps)), self._split(self.value(steps))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """One encoder layer between an embedding and an output layer that share one weight; a table of positions is no state."""

    def __init__(self) -> None:
        super().__init__()
        width, words, length = 16, 20, 6
        self.embedding = nn.Embedding(words, width)
        self.register_buffer(
            "positions", torch.linspace(-1, 1, length * width).reshape(length, width), persistent=False
        )
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, 4)
        self.norm2 = nn.LayerNorm(width)
        self.inner = nn.Linear(width, 24)
        self.outer = nn.Linear(24, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, 6]` tokens to `[n, 20]` logits of the next one."""
        steps = self.embedding(tokens) + self.get_buffer("positions")
        steps = steps + self.attention(self.norm1(steps))
        steps = steps + self.outer(F.gelu(self.inner(self.norm2(steps))))
        return self.head(steps[:, -1])  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One linear layer registered under two names and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, 16)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, values: Tensor) -> Tensor:
        """`[n, 10]` to `[n, 4]`."""
        hidden = F.relu(self.stem(values))
        return self.classifier(F.relu(self.again(F.relu(self.first(hidden)))))  # type: ignore[no-any-return]


def perceptron() -> nn.Module:
    """Return a multilayer perceptron, `[n, 10]` to `[n, 4]`."""
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, CLASSES))


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give every floating-point tensor of the state seeded random values, in place, and return the model.

    Matrices are scaled by their fan-in; norms get gains and variances between 0.5 and 1.5.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            last = name.rpartition(".")[2]
            if tensor.dim() >= 2:
                values = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
            elif last in ("weight", "running_var"):
                values = torch.rand(tensor.shape, generator=generator) + 0.5
            else:
                values = torch.randn(tensor.shape, generator=generator) * 0.3
            tensor.copy_(values)
    return model


def _task(name: str, build: Callable[[], nn.Module], draw: Callable[[torch.Generator], Tensor], classes: int) -> Task:
    generator = torch.Generator().manual_seed(1)

    def batches(count: int) -> list[tuple[Tensor, Tensor]]:
        return [(draw(generator), torch.randint(0, classes, (_BATCH,), generator=generator)) for _ in range(count)]

    train, calibrate, validate, test = (batches(count) for count in (3, 2, 2, 1))
    data = Data(example=train[0][0][:1], train=train, calibrate=calibrate, validate=validate, test=test)
    return Task(randomise(build(), seed=0).eval(), data, name)


def small_models() -> dict[str, Task]:
    """Return fresh tiny models in evaluation mode with their data, by name; the same on every call."""

    def images(generator: torch.Generator) -> Tensor:
        return torch.randn(_BATCH, 3, 8, 8, generator=generator)

    def vectors(generator: torch.Generator) -> Tensor:
        return torch.randn(_BATCH, 10, generator=generator)

    def tokens(generator: torch.Generator) -> Tensor:
        return torch.randint(0, 20, (_BATCH, 6), generator=generator)

    rows = (
        ("perceptron", perceptron, vectors, CLASSES),
        ("plain", Plain, images, CLASSES),
        ("residual", Residual, images, CLASSES),
        ("branches", Branches, images, CLASSES),
        ("recurrent", Recurrent, tokens, CLASSES),
        ("transformer", Transformer, tokens, 20),
        ("twice", Twice, vectors, CLASSES),
    )
    return {row[0]: _task(*row) for row in rows}
