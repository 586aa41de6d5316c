"""What the codes of quantized layers take in a file."""

from __future__ import annotations

from typing import Any

from torch import nn

from featherweight.coding import encode_tensor
from featherweight.layers import QuantizedLayer


def stored(model: nn.Module, bits: int | None = None) -> dict[str, Any]:
    """Return bits a weight of the codes as they are in a file, and the bytes of scales and biases beside them.

    Args:
        model: with quantized layers.
        bits: only of layers of this width; None for all.
    """
    found = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer) and layer.codes is not None]
    layers = [layer for layer in found if bits is None or layer.bits == bits]
    codes = sum(layer.codes.numel() for layer in layers)
    beside = [value for layer in layers for name, value in layer.state_dict().items() if name != "codes"]
    return {
        "codes": codes,
        "bits": 8 * sum(len(encode_tensor(layer.codes)) for layer in layers) / max(1, codes),
        "bytes_beside": sum(len(encode_tensor(value)) for value in beside),
    }
