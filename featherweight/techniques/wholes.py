"""Swap a whole layer for a kind whose parts are ordinary layers: what must hold before, and what is sparse after."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from featherweight.edits import Swap, Write
from featherweight.technique import Context, Edits


def taken_apart(swap: Swap, origins: Mapping[str, str], context: Context) -> Edits:
    """Yield the Swap and, where it stays, a Write that calls what was sparse by its new names.

    Args:
        swap: of a whole layer.
        origins: the name of each new weight below the layer, to the name of the tensor it is, or is a part of.
        context: says what is sparse.
    """
    kept = yield swap
    sparse = tuple(f"{swap.path}.{new}" for new, old in origins.items() if f"{swap.path}.{old}" in context.sparse)
    if kept and sparse:
        yield Write(None, sparse)


def holder(model: nn.Module, layer: nn.Module) -> str | None:
    """Return the name of a parameter outside the layer that is one of its own, or None."""
    own, inside = {id(value) for value in layer.parameters()}, set(layer.modules())
    for path, module in model.named_modules():
        for name, value in module._parameters.items():
            if module not in inside and id(value) in own:
                return f"{path}.{name}".lstrip(".")
    return None
