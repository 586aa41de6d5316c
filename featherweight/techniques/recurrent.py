"""Swap `nn.LSTM`, `nn.GRU` and `nn.RNN` for the kind `recurrent`: their matrices become those of linear layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from featherweight.edits import Swap
from featherweight.technique import Context, Edits
from featherweight.techniques.moments import moments
from featherweight.techniques.paired import Pair
from featherweight.techniques.wholes import holder, taken_apart

_OWNERS = {"ih": "incoming", "hh": "hidden", "hr": "projection"}
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def recurrent_swaps(model: nn.Module, context: Context) -> Edits:
    """Yield the Swap by the kind `recurrent` for every `nn.LSTM`, `nn.GRU` and `nn.RNN` in scope; others are recorded.

    The model computes the same after it. Left alone are layers that share a weight, which would come apart.

    Args:
        model: the model as it stands; it is read when each Swap is asked for.
        context: its scope, and where to record.
    """
    for path, layer in context.targets(model, nn.LSTM, nn.GRU, nn.RNN):
        tied, held = holder(model, layer), list(layer._parameters.values())
        if tied is not None:
            context.leave(path, f"its weights are tied to {tied}")
        elif len(set(map(id, held))) < len(held):
            context.leave(path, "two of its own weights are tied")
        else:
            names = inner_names(layer._parameters)
            origins = {new: old for new, old in names.items() if old.startswith("weight")}
            yield from taken_apart(recurrent_swap(path, layer), origins, context)


def recurrent_swap(path: str, layer: nn.RNNBase) -> Swap:
    """Return the Swap of one recurrent layer by the kind `recurrent`, with its weights.

    Args:
        path: where the layer is.
        layer: an `nn.LSTM`, `nn.GRU` or `nn.RNN`; sizes are read from its tensors.
    """
    tensors = dict(layer.named_parameters())
    options: dict[str, Any] = {
        "cell": layer.mode.lower(),
        "input_size": tensors["weight_ih_l0"].shape[1],
        "hidden_size": tensors["weight_hh_l0"].shape[0] // _GATES[layer.mode],
        "layers": layer.num_layers,
        "bias": layer.bias,
        "batch_first": layer.batch_first,
        "dropout": layer.dropout,
        "bidirectional": layer.bidirectional,
    }
    if layer.proj_size:
        options["proj_size"] = tensors["weight_hr_l0"].shape[0]
    state: dict[str, Tensor] = {new: tensors[old].detach() for new, old in inner_names(layer._parameters).items()}
    return Swap(path, "recurrent", options, state)


def recurrent_moments(model: nn.Module, context: Context, count: int) -> dict[str, Pair]:
    """Return the moments of what enters each matrix of the recurrent layers in scope, by the path it has once taken apart.

    Args:
        model: with its recurrent layers whole.
        context: gives scope and calibration data.
        count: calibration batches to read.

    Raises:
        DataError: there is no calibration data.
    """
    found: dict[str, Pair] = {}
    layers = dict(context.targets(model, nn.LSTM, nn.GRU, nn.RNN))
    seen = moments(model, context, layers, count) if layers else {}
    for path, layer in layers.items():
        for new, old in inner_names(layer._parameters).items():
            name = f"{path}.{old}".lstrip(".")
            if name in seen:
                mean, second = seen[name]
                found[f"{path}.{new}".lstrip(".").rpartition(".")[0]] = Pair(mean, mean, second, second)
    return found


def inner_names(names: Iterable[str]) -> dict[str, str]:
    """Return the name of each tensor once its layer is taken apart, to the one in PyTorch: `hidden.1.bias` is `bias_hh_l0_reverse`.

    Args:
        names: of tensors of one `nn.LSTM`, `nn.GRU` or `nn.RNN`, of both directions where it has two.
    """
    names = list(names)
    ways = 2 if any(name.endswith("_reverse") for name in names) else 1
    found: dict[str, str] = {}
    for name in names:
        kind, owner, place, *backward = name.split("_")
        found[f"{_OWNERS[owner]}.{int(place[1:]) * ways + bool(backward)}.{kind}"] = name
    return found
