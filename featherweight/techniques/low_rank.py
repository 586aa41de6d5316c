"""Factor linear layers and convolutions into two or three smaller ones in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Swap
from featherweight.layers.plain import convolution_options
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.factorizations import (
    Metric,
    composed,
    input_energies,
    matrix_factors,
    principal,
    separable_factors,
    tucker_factors,
)
from featherweight.techniques.metrics import FROM_DATA, METHODS, metrics
from featherweight.techniques.moments import first_names, in_call_order
from featherweight.techniques.ranks import (
    Choices,
    bayesian_rank,
    by_energy,
    by_parameters,
    joined,
    nearest,
    of_one_rank,
    of_two_ranks,
    spread,
)
from featherweight.techniques.targets import output_layers, untied

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TINY = 1e-300
_NARROW = 4


@final
@dataclass(frozen=True)
class LowRank(Technique):
    """Replace a layer by two or three in a row, `W [out, in]` by `A [out, r] B [r, in]`, where that has fewer parameters.

    `method` says which error is least: of the weight (`svd`), of the outputs on calibration data, their mean made good in the
    bias (`whitened`; the squared error is exactly the energy that is dropped), or the same with each output weighed by squared
    gradients of the loss (`fisher`). `shape` says what a k x k convolution becomes: k x k to r channels and 1 x 1
    (`channel`), k x 1 and 1 x k (`spatial`), 1 x 1, k x k and 1 x 1 (`tucker`), or the best of them (`auto`). `rank` chooses
    how far: the smallest form that keeps `energy`; the share `ratio` of the parameters removed in each layer (`ratio`) or
    from all together, where the least energy goes (`spread`: shares of each layer's own, with `fisher` all of one unit); or
    `ratio` of the directions that variational Bayes calls noise (`bayes`; 1 removes all).
    Where every layer loses the same share, one that gives the model's outputs and has a quarter as many as inputs, or fewer, stays
    dense, unless `only` names it alone or it is most of the model: fewer ranks than classes confuse some of them, and save little.
    With `sequential` each layer is fitted to what reaches it through those already factored. Attention is first taken apart
    into linear layers. A layer whose factors are not smaller is left dense; so are grouped and specially padded convolutions.

    Paper: Eckart & Young, 1936; Zhang et al., TPAMI 2016 (channel); Tai et al., ICLR 2016 (spatial); Kim et al., ICLR 2016
        (tucker, bayes); Wang et al., "SVD-LLM", ICLR 2025 (whitened); Hsu et al., ICLR 2022, Chekalina et al.,
        "Generalized Fisher-Weighted SVD", 2025 (fisher).
    Use when: layers are wide and the target computes dense matrices; heal with `distill` afterwards.
    Costs: one decomposition a layer; from data, `batches` passes over calibration batches, of which some 4,096 inputs and one a
        column are read, and 8 in^2 bytes a layer; twice the passes for each layer when sequential.
    """

    stage: ClassVar[Stage | None] = Stage.FACTOR
    energy: float = setting(0.9, low=0.01, high=1.0)
    ratio: float = setting(0.5, low=0.0, high=0.99)
    rank: str = setting("energy", choices=("energy", "ratio", "spread", "bayes"))
    method: str = setting("svd", choices=METHODS)
    shape: str = setting("channel", choices=("channel", "spatial", "tucker", "auto"))
    multiple: int = setting(1, low=1, high=512)
    sequential: bool = setting(False)
    batches: int = setting(8, low=1, high=100_000)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Calibration data, unless weights alone decide."""
        return frozenset({"calibrate"}) if self.method in FROM_DATA else frozenset()

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap by layers in a row for each layer that gets smaller."""
        yield from layer_swaps(model, context)
        layers = {path: layer for path, layer in untied(model, context, *_LAYERS) if factorable(path, layer, context)}
        layers = self._without_heads(model, context, layers)
        found = self._metrics(model, context, layers)
        ways = {path: self._choices(layer, found[path]) for path, layer in layers.items() if path in found}
        picked = self._pick({path: layers[path] for path in ways}, ways, context)
        again = self.sequential and self.method in FROM_DATA
        for path in _ordered(model, context, picked) if again else list(picked):
            metric = self._metrics(model, context, {path: layers[path]})[path] if again else found[path]
            yield _factored(path, layers[path], metric, ways[path], picked[path])

    def mildest(self) -> Technique:
        """Return factoring that keeps all energy."""
        return LowRank(energy=1.0)

    def _without_heads(self, model: nn.Module, context: Context, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """The layers without those that give the outputs, which are recorded as left dense."""
        forced = self.rank == "ratio" and len(layers) > 1
        if len(layers) == 1 and self.rank in ("ratio", "spread") and not context.scope:
            (layer,) = layers.values()  # all other weights may be in layers of other kinds
            forced = 2 * layer.get_parameter("weight").numel() < sum(weight.numel() for weight in model.parameters())
        if not forced:
            return layers
        left = [path for path in output_layers(model, context, layers) if like_a_head(*_weight(layers[path]).shape)]
        for path in left:
            context.leave(path, "gives the model's outputs; it is factored if `only` names it alone")
        return {path: layer for path, layer in layers.items() if path not in left}

    def _metrics(self, model: nn.Module, context: Context, layers: Mapping[str, nn.Module]) -> dict[str, Metric]:
        names = first_names(model)
        by_name = metrics(model, context, list(layers), self.method, self.batches)
        found: dict[str, Metric] = {}
        for path, layer in layers.items():
            name = names[id(layer.get_parameter("weight"))]
            if name in by_name:
                found[path] = by_name[name]
            else:
                context.leave(path, "calibration data never reached it")
        return found

    def _choices(self, layer: nn.Module, metric: Metric) -> Choices:
        """Every way to factor a layer."""
        weight = _weight(layer)
        out, inside = weight.shape[0], weight.shape[1]
        fixed = out if metric.mean is not None or isinstance(layer.bias, Tensor) else 0
        scaled = weight if metric.rows is None else weight * metric.rows.reshape(-1, *[1] * (weight.dim() - 1))
        energies, _ = principal(scaled.flatten(1), metric.inputs)
        found = []
        shapes = _shapes(layer, self.shape)
        if "channel" in shapes:
            found.append(of_one_rank("channel", energies, out + weight[0].numel(), fixed, self.multiple))
        if "spatial" in shapes:
            tall, wide = inside * weight.shape[2], weight.shape[3]
            columns, _ = input_energies(weight.reshape(out, tall, wide), metric)
            found.append(of_one_rank("spatial", columns, tall + out * wide, fixed, self.multiple))
        if "tucker" in shapes:
            taps = weight[0, 0].numel()
            inputs, _ = input_energies(weight.reshape(out, inside, taps), metric)
            found.append(of_two_ranks("tucker", inputs, energies, inside, taps, out, fixed, self.multiple))
        # squared gradients give the energies of all layers one unit; otherwise a share of any counts alike
        return joined(found, max(float(energies.sum()), _TINY) if self.method == "fisher" else 1.0)

    def _pick(self, layers: dict[str, nn.Module], ways: dict[str, Choices], context: Context) -> dict[str, int]:
        """Return the way of each layer that is factored; the others are recorded."""
        dense = {path: sum(value.numel() for value in layer.parameters()) for path, layer in layers.items()}
        if self.rank == "spread":
            allotted = spread(list(ways.values()), list(dense.values()), self.ratio)
        picked: dict[str, int] = {}
        for place, (path, choices) in enumerate(ways.items()):
            if self.rank == "energy":
                best: int | None = by_energy(choices, self.energy)
            elif self.rank == "ratio":
                best = by_parameters(choices, (1 - self.ratio) * dense[path])
            elif self.rank == "bayes":
                best = self._bayesian(_weight(layers[path]), choices)
            else:
                best = allotted[place]
            if best is None:
                context.leave(path, f"no rank saves enough of its {dense[path]} parameters at the loss of the others")
            elif choices.parameters[best] >= dense[path]:
                context.leave(
                    path,
                    f"{_said(choices, best)} keeps {1 - choices.dropped[best]:.0%} of the energy and would not be smaller: "
                    f"{int(choices.parameters[best])} parameters, {dense[path]} as it is",
                )
            else:
                picked[path] = best
        return picked

    def _bayesian(self, weight: Tensor, choices: Choices) -> int:
        """The smallest way whose ranks keep what Bayes calls signal and `1 - ratio` of the rest."""
        out, inside = weight.shape[:2]
        found = []
        for place, shape in enumerate(choices.shapes):
            unfolded = [weight.flatten(1)]
            if shape == "spatial":
                unfolded = [weight.permute(0, 3, 1, 2).reshape(out * weight.shape[3], -1)]
            elif shape == "tucker":
                unfolded.insert(0, weight.transpose(0, 1).reshape(inside, -1))
            ranks = []
            for matrix in unfolded:
                signal, most = bayesian_rank(matrix), min(matrix.shape)
                ranks.append(round(signal + (1 - self.ratio) * (most - signal)))
            found.append(nearest(choices, place, ranks))
        return min(found, key=lambda way: float(choices.parameters[way]))


def low_rank_swap(path: str, layer: nn.Module, ratio: float) -> Swap | None:
    """Return the Swap of a layer by two in a row whose product is nearest to its weight, without a share of its parameters.

    Args:
        path: where the layer is.
        layer: `factorable`.
        ratio: share of its parameters that go at least, 0 to 1; None comes back where even rank 1 has too many.
    """
    weight, bias = _weight(layer), layer.bias.numel() if isinstance(layer.bias, Tensor) else 0
    energies, _ = principal(weight.flatten(1), None)
    choices = of_one_rank("channel", energies, len(weight) + weight[0].numel(), bias, 1)
    best = by_parameters(choices, (1 - ratio) * (weight.numel() + bias))
    return None if best is None else _factored(path, layer, Metric(), choices, best)


def like_a_head(out: int, *inside: int) -> bool:
    """Whether a weight of this shape has so few outputs that they may be classes: a quarter as many as inputs, or fewer."""
    return _NARROW * out <= math.prod(inside)


def factorable(path: str, layer: nn.Module, context: Context) -> bool:
    """Whether a linear layer or a convolution is dense and padded with zeros; others are recorded as left alone."""
    if getattr(layer, "groups", 1) != 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
        context.leave(path, "a grouped or specially padded convolution is not factored")
        return False
    return True


def _shapes(layer: nn.Module, wanted: str) -> tuple[str, ...]:
    """The forms a layer can take; what has one tap, or is no square of them, has a matrix's."""
    size: tuple[int, ...] = getattr(layer, "kernel_size", ())
    taps = [extent for extent in size if extent > 1]
    possible = ["channel", *(["tucker"] if taps else []), *(["spatial"] if len(taps) == len(size) == 2 else [])]
    if wanted == "auto":
        return tuple(possible)
    return (wanted,) if wanted in possible else ("channel",)


def _ordered(model: nn.Module, context: Context, paths: Mapping[str, int]) -> list[str]:
    """The paths in the order in which the layers are called."""
    notes = len(context.untouched)
    order = [path for group in in_call_order(model, context) for path in group if path in paths]
    del context.untouched[notes:]  # of layers that are no matter here
    return order


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").detach().double()


def _said(choices: Choices, best: int) -> str:
    first, second = choices.ranks[best].tolist()
    return f"rank {first} by {second}" if second else f"rank {first}"


def _factored(path: str, layer: nn.Module, metric: Metric, choices: Choices, best: int) -> Swap:
    """Return the Swap of a layer by the way that was picked."""
    weight = _weight(layer)
    out, inside = weight.shape[:2]
    shape = choices.shapes[int(choices.shape[best])]
    first, second = choices.ranks[best].tolist()
    options: dict[str, Any] = {"rank": first}
    if shape == "channel":
        outer, inner = matrix_factors(weight.flatten(1), metric, first)
        factors, stands = [inner.reshape(first, *weight.shape[1:]), outer], outer @ inner
    elif shape == "spatial":
        tall, wide = inside * weight.shape[2], weight.shape[3]
        later, inner = separable_factors(weight.reshape(out, tall, wide), metric, first)
        factors = [inner.reshape(first, inside, -1, 1), later[:, :, None]]
        stands = composed(later, inner).flatten(1)
    else:
        options = {"first_rank": first, "second_rank": second}
        last, core, inner = tucker_factors(weight.reshape(out, inside, -1), metric, first, second)
        factors = [inner, core.reshape(second, first, *weight.shape[2:]), last]
        stands = composed(torch.einsum("os,srn->orn", last, core), inner).flatten(1)
    biased = metric.mean is not None or isinstance(layer.bias, Tensor)
    state = dict(zip((f"{place}.weight" for place in range(len(factors))), factors, strict=True))
    if biased:
        bias = layer.bias.detach().double() if isinstance(layer.bias, Tensor) else weight.new_zeros(out)
        lost = 0.0 if metric.mean is None else (weight.flatten(1) - stands) @ metric.mean
        state[f"{len(factors) - 1}.bias"] = bias + lost
    if isinstance(layer, nn.Linear):
        kind = "factored_linear"
        options |= {"in_features": layer.in_features, "out_features": layer.out_features}
    else:
        kind = {"channel": "factored_convolution", "spatial": "separable_convolution", "tucker": "tucker_convolution"}[
            shape
        ]
        options |= convolution_options(layer)  # type: ignore[arg-type]
        del options["groups"]
        pointwise = [1] * (weight.dim() - 2)
        state = {
            name: value.reshape(*value.shape, *pointwise) if value.dim() == 2 else value
            for name, value in state.items()
        }
    dtype = layer.get_parameter("weight").dtype
    return Swap(path, kind, {**options, "bias": biased}, {name: value.to(dtype) for name, value in state.items()})
