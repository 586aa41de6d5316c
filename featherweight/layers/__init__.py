"""The closed table of layer kinds a Swap may put into a model, each built from JSON-able options alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from featherweight.errors import ModelError, closest
from featherweight.layers.plain import convolution, factored_convolution, factored_linear, identity, linear
from featherweight.layers.quantized import QuantizedConv, QuantizedLayer, QuantizedLinear

KINDS: dict[str, Callable[..., nn.Module]] = {
    "identity": identity,
    "linear": linear,
    "convolution": convolution,
    "factored_linear": factored_linear,
    "factored_convolution": factored_convolution,
    "quantized_linear": QuantizedLinear,
    "quantized_convolution": QuantizedConv,
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


__all__ = ["KINDS", "QuantizedConv", "QuantizedLayer", "QuantizedLinear", "build"]
