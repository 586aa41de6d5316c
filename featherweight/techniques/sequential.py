"""Quantize layers one after the other, each on what reaches it through those before, towards the original's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from featherweight.edits import private_copy
from featherweight.layers import SplitRecurrent
from featherweight.technique import Context, Edits
from featherweight.techniques.compensated_rounding import fitted
from featherweight.techniques.paired import Pair, Pairs, waves
from featherweight.techniques.ranges import Grid
from featherweight.techniques.swaps import COMPUTING, fresh_kind, quantized_swap

Grids = dict[str, Tensor]


def sequential_swaps(
    model: nn.Module,
    context: Context,
    layers: Sequence[tuple[str, nn.Module]],
    widths: Mapping[str, int],
    per_channel: bool,
    count: int,
    group: int = 0,
    grids: Mapping[str, Grids] | None = None,
    known: Mapping[str, Pair] | None = None,
) -> Edits:
    """Yield a Swap for each layer by its quantized kind, in the order in which they are called.

    Args:
        model: the model as it stands; it is read when each Swap is asked for.
        context: calibration data, and what is sparse.
        layers: `(path, layer)`; those without inputs to be watched (embeddings, transposed convolutions) get the nearest codes.
        widths: width of the codes, by path.
        per_channel: one scale for each output channel, or one in all.
        count: calibration batches to read for each layer.
        group: inputs of a row of a linear layer that share a scale; 0 for all of them.
        grids: of activations, by path, as `quantized_swap` takes them.
        known: moments that are known already, by path: of the matrices of recurrent layers, which are read off.
    """
    grids = grids or {}
    entered = {path: (own["input_scale"], own["input_zero"]) for path, own in grids.items() if "input_scale" in own}
    for path, layer, pair in reached(model, context, layers, count, entered, known):
        bits = widths[path]
        if pair is None:
            yield quantized_swap(path, layer, bits, per_channel, grids.get(path), group)
            continue
        fresh = fresh_kind(layer, bits, per_channel, group, grids.get(path))[2]
        found = fitted(layer, fresh, pair, f"{path}.weight".lstrip(".") in context.sparse)
        yield quantized_swap(
            path, layer, bits, per_channel, grids.get(path), group, found.scale, found.codes, found.bias
        )


def reached(
    model: nn.Module,
    context: Context,
    layers: Sequence[tuple[str, nn.Module]],
    count: int,
    entered: Mapping[str, Grid] | None = None,
    known: Mapping[str, Pair] | None = None,
) -> Iterator[tuple[str, nn.Module, Pair | None]]:
    """Yield every layer in the order of the calls with what reaches it, None where that is not known or not finite.

    Args:
        model: the model as it stands; it is read when each layer is asked for, and those before may be other ones by then.
        context: calibration data.
        layers: `(path, layer)`; those without inputs to be watched (embeddings, transposed convolutions) come first.
        count: calibration batches to read for each layer.
        entered: grids of what enters, by path, where it is rounded.
        known: moments that are known already, by path: of the matrices of recurrent layers, which are read off.
    """
    known = known or {}
    original, _ = private_copy(model)
    by_path = dict(layers)
    inside = inside_recurrent(model)
    watched = [path for path, layer in layers if isinstance(layer, COMPUTING) and not path.startswith(inside)]
    for path in [path for path in by_path if path not in watched]:
        pair = known.get(path)
        yield path, by_path.pop(path), pair if pair is not None and _finite(pair) else None
    order = waves(model, context, watched)
    with Pairs(original, model, context, order, count, entered) as pairs:
        for wave in order:
            found = pairs.at(wave)
            for path in wave.paths:
                pair = found.get(path)
                yield path, by_path.pop(path), pair if pair is not None and _finite(pair) else None
    for path, layer in by_path.items():  # the example does not reach them
        yield path, layer, None


def _finite(pair: Pair) -> bool:
    return bool(torch.isfinite(pair.second).all())


def inside_recurrent(model: nn.Module) -> tuple[str, ...]:
    """Return the beginnings of the paths of layers whose matrices are read off, and which meet no inputs."""
    return tuple(f"{path}.".lstrip(".") for path, module in model.named_modules() if isinstance(module, SplitRecurrent))
