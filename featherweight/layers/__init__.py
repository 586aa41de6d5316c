"""The closed table of layer kinds a Swap may put into a model, each built from JSON-able options alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from featherweight.errors import ModelError, closest
from featherweight.layers.attention import MultiHeadAttention
from featherweight.layers.bags import EmbeddingBag
from featherweight.layers.cells import RecurrentCell
from featherweight.layers.factored import (
    canonical_convolution,
    depthwise_separable_convolution,
    factored_convolution,
    factored_linear,
    separable_convolution,
    tucker_convolution,
)
from featherweight.layers.factored_recurrent import FactoredGRU, FactoredLSTM, looping
from featherweight.layers.plain import convolution, identity, linear
from featherweight.layers.quantized import QuantizedLayer, QuantizedLinear
from featherweight.layers.quantized_convolutions import QuantizedConv, QuantizedTransposedConv
from featherweight.layers.quantized_embedding import QuantizedEmbedding
from featherweight.layers.recurrent import SplitRecurrent, recurrent
from featherweight.layers.scaled import ScaledLinear
from featherweight.layers.shared import SharedConv, SharedEmbedding, SharedLayer, SharedLinear, SharedTransposedConv
from featherweight.layers.skip import Skip
from featherweight.layers.tensorized import CirculantLinear, GroupLinear, TensorTrainEmbedding, TensorTrainLinear

KINDS: dict[str, Callable[..., nn.Module]] = {
    "identity": identity,
    "linear": linear,
    "scaled_linear": ScaledLinear,
    "convolution": convolution,
    "factored_linear": factored_linear,
    "factored_convolution": factored_convolution,
    "separable_convolution": separable_convolution,
    "tucker_convolution": tucker_convolution,
    "depthwise_separable_convolution": depthwise_separable_convolution,
    "canonical_convolution": canonical_convolution,
    "tensor_train_linear": TensorTrainLinear,
    "tensor_train_embedding": TensorTrainEmbedding,
    "group_linear": GroupLinear,
    "circulant_linear": CirculantLinear,
    "factored_lstm": FactoredLSTM,
    "factored_gru": FactoredGRU,
    "quantized_linear": QuantizedLinear,
    "quantized_convolution": QuantizedConv,
    "quantized_transposed_convolution": QuantizedTransposedConv,
    "quantized_embedding": QuantizedEmbedding,
    "shared_linear": SharedLinear,
    "shared_convolution": SharedConv,
    "shared_transposed_convolution": SharedTransposedConv,
    "shared_embedding": SharedEmbedding,
    "recurrent": recurrent,
    "recurrent_cell": RecurrentCell,
    "embedding_bag": EmbeddingBag,
    "attention": MultiHeadAttention,
    "skip": Skip,
}


def build(kind: str, options: dict[str, Any]) -> nn.Module:
    """Return a fresh layer of a kind.

    Args:
        kind: a name in `KINDS`.
        options: its keyword arguments, integers, booleans, strings and lists of them.

    Raises:
        ModelError: the kind is unknown, or does not take these options.
    """
    if kind not in KINDS:
        raise ModelError(f"unknown layer kind {kind!r}.{closest(kind, KINDS)}")
    try:
        return KINDS[kind](**options)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"layer kind {kind!r} cannot be built with {options}: {error}") from error


__all__ = [
    "KINDS",
    "MultiHeadAttention",
    "QuantizedConv",
    "QuantizedEmbedding",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedTransposedConv",
    "SharedLayer",
    "Skip",
    "SplitRecurrent",
    "build",
    "looping",
]
