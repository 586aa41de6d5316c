"""The tensors that weight pruning may zero: every matrix of the layers in scope, and how they start and gain zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.technique import Context

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.LSTM,
    nn.GRU,
    nn.RNN,
    nn.LSTMCell,
    nn.GRUCell,
    nn.RNNCell,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
)
_INTERVAL = 0.01  # share of the rise after which the weights are ranked anew


def matrices(model: nn.Module, context: Context) -> dict[str, Tensor]:
    """Return every matrix-like parameter of the layers in scope, once, by its first name; biases and norms are none.

    The output projection of an `nn.MultiheadAttention` is one of them, although its module is of a class of its own.
    """
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for path, layer in context.targets(model, *_LAYERS):
        held: list[Tensor | None] = list(layer._parameters.values())
        if isinstance(layer, nn.MultiheadAttention) and context.in_scope(f"{path}.out_proj".lstrip(".")):
            held.append(layer.out_proj.weight)
        for parameter in held:
            if parameter is not None and parameter.dim() >= 2:
                found[first[id(parameter)]] = parameter
    return found


def fresh_masks(weights: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
    """Return masks to begin gradual pruning with: zeros that earlier steps left are out already."""
    return {
        name: weight.detach() != 0 if name in context.sparse else torch.ones_like(weight, dtype=torch.bool)
        for name, weight in weights.items()
    }


def cubic(before: float, done: float, start: float, end: float) -> float | None:
    """Return the share of the final ratio that is due now, `1 - (1 - t)^3`, or None where nothing is to be ranked anew.

    Args:
        before: share of training done before the last step.
        done: share of training done before this one.
        start: share of training at which pruning begins.
        end: share at which the final ratio is reached; what follows heals at that ratio.

    Paper: Zhu & Gupta, "To prune, or not to prune", 2017.
    """
    if before >= end or done < start:
        return None
    rise = min(1.0, (done - start) / (end - start))
    risen = (before - start) / (end - start)
    if int(risen / _INTERVAL) == int(rise / _INTERVAL):
        return None
    return 1 - (1 - rise) ** 3
