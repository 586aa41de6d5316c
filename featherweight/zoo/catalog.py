"""`architectures()`: every architecture of the zoo by name, built when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import Inputs
from featherweight.zoo import generative, imported, sequences, transformers
from featherweight.zoo.images import (
    VGG,
    BasicBlock,
    Bottleneck,
    ConvNeXt,
    DenseNet,
    Detector,
    Inception,
    Reshaped,
    ResNet,
    Reused,
    UNet,
)
from featherweight.zoo.mobile import EfficientNet, MobileNetV2, MobileNetV3, ShuffleNetV2
from featherweight.zoo.small import randomise

BATCH = 2


@dataclass(frozen=True)
class Architecture:
    """A model that people compress, small.

    Attributes:
        name: in lower case, unique.
        build: a fresh model in evaluation mode; the same weights on every call.
        args: example of its positional inputs, two samples.
        kwargs: example of its keyword inputs; it has one kind of inputs or the other.
        family: `"convolutional"`, `"mobile"`, `"transformer"`, `"recurrent"` or `"mixed"`.
        fixed: what its forward hard-codes, where a size of it cannot follow a cut.
        extra: the extra of this library it needs, or an empty string.
    """

    name: str
    build: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    family: str
    fixed: str = ""
    extra: str = ""

    @property
    def inputs(self) -> Inputs:
        """The example as `Data` takes it."""
        if self.kwargs:
            return dict(self.kwargs)
        return self.args[0] if len(self.args) == 1 else self.args


def architectures() -> dict[str, Architecture]:
    """Return every architecture by name; nothing is built, and nothing optional imported, before `build` is called.

    Example:
        >>> model = architectures()["resnet18"].build()
    """
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    def tokens(steps: int) -> Tensor:
        return torch.randint(1, sequences.WORDS, (BATCH, steps), generator=generator)

    image, small, features, words = draw(3, 32, 32), draw(3, 8, 8), draw(10, 20), tokens(transformers.STEPS)
    # the second sentence is shorter
    sentence = {"input_ids": words, "attention_mask": (torch.arange(words.shape[1]) < torch.tensor([[12], [9]])).long()}
    rows: list[tuple[str, str, Callable[[], nn.Module], tuple[Tensor, ...]]] = [
        ("resnet18", "convolutional", lambda: ResNet(BasicBlock, (2, 2, 2, 2)), (image,)),
        ("resnet50", "convolutional", lambda: ResNet(Bottleneck, (1, 2, 2, 1)), (image,)),
        ("resnext", "convolutional", lambda: ResNet(Bottleneck, (1, 2, 2), groups=8, base_width=16), (image,)),
        ("vgg", "convolutional", VGG, (image,)),
        ("densenet", "convolutional", DenseNet, (small,)),
        ("convnext", "convolutional", ConvNeXt, (image,)),
        ("unet", "convolutional", UNet, (image,)),
        ("inception", "convolutional", Inception, (image,)),
        ("reused", "convolutional", Reused, (small,)),
        ("reshaped", "convolutional", Reshaped, (small,)),
        ("detector", "mixed", Detector, (image, draw(12))),
        ("mobilenet_v2", "mobile", MobileNetV2, (image,)),
        ("mobilenet_v3", "mobile", MobileNetV3, (image,)),
        ("efficientnet", "mobile", EfficientNet, (image,)),
        ("shufflenet_v2", "mobile", ShuffleNetV2, (image,)),
        ("transformer_encoder", "transformer", transformers.EncoderClassifier, (words,)),
        ("vit_torchvision", "transformer", transformers.VisionTransformer, (image,)),
        ("vit_timm", "transformer", transformers.TimmVisionTransformer, (image,)),
        ("swin", "transformer", transformers.Swin, (image,)),
        ("mixer", "transformer", transformers.Mixer, (image,)),
        ("gpt", "transformer", generative.GPT, (words,)),
        ("llama", "transformer", generative.Llama, (words,)),
        ("lstm", "recurrent", lambda: sequences.LSTMClassifier(64), (tokens(10),)),
        ("lstm_layers", "recurrent", lambda: sequences.LSTMClassifier(48, layers=2), (tokens(10),)),
        ("lstm_projection", "recurrent", lambda: sequences.LSTMClassifier(96, projection=32), (tokens(10),)),
        ("bilstm", "recurrent", sequences.BiLSTMClassifier, (features,)),
        ("bilstm_stacked", "recurrent", sequences.StackedBiLSTM, (tokens(10),)),
        ("gru", "recurrent", sequences.GRUClassifier, (features,)),
        ("seq2seq", "recurrent", sequences.Seq2Seq, (tokens(9), tokens(7))),
        ("tied_language_model", "recurrent", sequences.TiedLanguageModel, (tokens(10),)),
        ("crnn", "mixed", sequences.CRNN, (draw(1, 16, 24),)),
        ("tcn", "convolutional", sequences.TCN, (features,)),
    ]
    fixed = {"reshaped": "the forward hard-codes reshape(-1, 256)"}
    found = [
        Architecture(name, _random(build), args, {}, family, fixed.get(name, "")) for name, family, build, args in rows
    ]
    found.append(Architecture("bert", _random(imported.bert), (), sentence, "transformer", extra="transformers"))
    found.append(Architecture("minilm", _pretrained, (), sentence, "transformer", extra="bench"))
    return {architecture.name: architecture for architecture in found}


def _random(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: randomise(build(), seed=0).eval()


def _pretrained() -> nn.Module:
    model = imported.minilm()
    randomise(model.get_submodule("classifier"), seed=0)
    return model.eval()
