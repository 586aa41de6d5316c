"""Swap layers of many weights for kinds made of ordinary layers: attention, recurrent cells and bags of embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

from featherweight.edits import Swap
from featherweight.layers.cells import GATES
from featherweight.technique import Context, Edits
from featherweight.techniques.attention import attention_swaps
from featherweight.techniques.wholes import holder, taken_apart

_CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_OWNERS = {"ih": "incoming", "hh": "hidden"}


def layer_swaps(model: nn.Module, context: Context) -> Edits:
    """Yield the Swap of each layer in scope that is taken apart into ordinary layers; those that cannot be are recorded.

    The model computes the same after it, but for rounding. Layers of whole sequences are not among them: `recurrent_swaps`.

    Args:
        model: the model as it stands; it is read when each Swap is asked for.
        context: its scope, and where to record.
    """
    yield from attention_swaps(model, context)
    for path, layer in context.targets(model, *_CELLS, nn.EmbeddingBag):
        tied = holder(model, layer)
        if tied is not None:
            context.leave(path, f"its weights are tied to {tied}")
        elif getattr(layer, "max_norm", None) is not None:
            context.leave(path, "a bag of embeddings with max_norm changes its rows at each forward")
        else:
            swap, origins = _bag(path, layer) if isinstance(layer, nn.EmbeddingBag) else _cell(path, layer)
            yield from taken_apart(swap, origins, context)


def _cell(path: str, layer: nn.Module) -> tuple[Swap, dict[str, str]]:
    """The Swap of a recurrent cell, and what its new weights were called."""
    tensors = dict(layer.named_parameters())
    kind = type(layer).__name__.removesuffix("Cell").lower()
    cell = str(layer.nonlinearity) if kind == "rnn" else kind
    names = {f"{_OWNERS[name.partition('_')[2]]}.{name.partition('_')[0]}": name for name in tensors}
    gates, inside = tensors["weight_ih"].shape
    options: dict[str, Any] = {"cell": cell, "input_size": inside, "hidden_size": gates // GATES[cell]}
    state = {new: tensors[old].detach() for new, old in names.items()}
    swap = Swap(path, "recurrent_cell", options | {"bias": "bias_ih" in tensors}, state)
    return swap, {new: old for new, old in names.items() if old.startswith("weight")}


def _bag(path: str, layer: nn.EmbeddingBag) -> tuple[Swap, dict[str, str]]:
    """The Swap of a bag of embeddings, and what its new weight was called."""
    rows, width = layer.weight.shape
    options: dict[str, Any] = {"num_embeddings": rows, "embedding_dim": width, "mode": layer.mode}
    options |= {} if layer.padding_idx is None else {"padding_idx": layer.padding_idx}
    options |= {"include_last_offset": layer.include_last_offset}
    return Swap(path, "embedding_bag", options, {"rows.weight": layer.weight.detach()}), {"rows.weight": "weight"}
