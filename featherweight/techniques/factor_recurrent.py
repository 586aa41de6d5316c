"""Factor the matrices of recurrent layers: fewer inputs a step, and hidden matrices that are stored as two factors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Swap
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.factorizations import Metric, matrix_factors, principal
from featherweight.techniques.metrics import metrics
from featherweight.techniques.ranks import Choices, by_energy, by_parameters, of_one_rank, spread

_SUFFIXES = ("", "_reverse")


@dataclass(frozen=True)
class _Unit:
    """Matrices that get one rank: those of both directions, and where it is shared, those that read one projection.

    Attributes:
        names: for each direction, the tensors of the layer that are stacked and share their first factor.
        matrices: the stacked weights, one for each direction.
        metrics: of each.
    """

    names: tuple[tuple[str, ...], ...]
    matrices: tuple[Tensor, ...]
    metrics: tuple[Metric, ...]

    @property
    def dense(self) -> int:
        return sum(matrix.numel() for matrix in self.matrices)

    def choices(self, multiple: int) -> Choices:
        energies = [principal(matrix, metric.inputs)[0] for matrix, metric in self._pairs()]
        return of_one_rank("", torch.stack(energies).sum(0), sum(sum(m.shape) for m in self.matrices), 0, multiple)

    def factors(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        return [matrix_factors(matrix, metric, rank) for matrix, metric in self._pairs()]

    def _pairs(self) -> list[tuple[Tensor, Metric]]:
        return list(zip(self.matrices, self.metrics, strict=True))


@final
@dataclass(frozen=True)
class FactorRecurrent(Technique):
    """Put a linear layer to fewer inputs in front of each layer of an LSTM or GRU, and factor its hidden matrices.

    The input matrices of both directions share their first factor; it is multiplied for all steps at once, so the layer gets
    faster. `hidden` says what becomes of the hidden matrices: they stay (`dense`), are stored as two factors (`factors`), or
    share their first factor with the projection in front of the next layer too (`shared`, one direction only). In a file, factors
    of wide layers are a loop over the steps that multiplies by both (one direction; `layers/recurrent_loop.py` says how wide), which
    is faster, most of all where they are shared; narrower ones are multiplied when the model is loaded, and save bytes alone.
    `whitened` makes the error of the gates least on calibration data, over all steps, and their mean good in the bias;
    `rank` is as of `low_rank`, over matrices instead of layers. A matrix whose factors are not smaller stays dense.

    Paper: Prabhavalkar et al., "On the compression of recurrent neural networks with an application to LVCSR acoustic
        modeling for embedded speech recognition", ICASSP 2016; whitened: Wang et al., "SVD-LLM", ICLR 2025.
    Use when: a recurrent network must be smaller, or faster with 256 hidden units or more: `hidden="shared"` and a `multiple` of 8;
        narrower ones are faster with units removed by `prune_channels`. Heal with `distill`.
    Costs: one decomposition a matrix; `whitened` reads `batches` calibration batches, step by step.
    """

    stage: ClassVar[Stage | None] = Stage.FACTOR
    energy: float = setting(0.9, low=0.01, high=1.0)
    ratio: float = setting(0.5, low=0.0, high=0.99)
    rank: str = setting("energy", choices=("energy", "ratio", "spread"))
    method: str = setting("whitened", choices=("svd", "whitened"))
    hidden: str = setting("dense", choices=("dense", "factors", "shared"))
    multiple: int = setting(1, low=1, high=512)
    batches: int = setting(8, low=1, high=100_000)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Calibration data, unless weights alone decide."""
        return frozenset({"calibrate"}) if self.method == "whitened" else frozenset()

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each LSTM and GRU that gets smaller."""
        holders = Counter(id(value) for module in model.modules() for value in module._parameters.values())
        layers: dict[str, nn.RNNBase] = {}
        for path, layer in context.targets(model, nn.LSTM, nn.GRU):
            if layer.proj_size:
                context.leave(path, "an LSTM with projections has low rank already")
            elif any(holders[id(value)] > 1 for value in layer.parameters()):
                context.leave(path, "a weight of it is tied to another's")
            else:
                layers[path] = layer
        found = metrics(model, context, list(layers), self.method, self.batches)
        names = {id(value): name for name, value in model.named_parameters()}
        for path, layer in layers.items():
            own = {
                name: _centred(found[names[id(value)]], layer.bias)
                for name, value in layer.named_parameters()
                if names[id(value)] in found
            }
            if own:
                yield from self._factored(path, layer, own, context)
            else:
                context.leave(path, "calibration data never reached it")

    def mildest(self) -> Technique:
        """Return factoring that keeps all energy."""
        return FactorRecurrent(energy=1.0)

    def _factored(self, path: str, layer: nn.RNNBase, own: dict[str, Metric], context: Context) -> Edits:
        units = self._units(layer, own)
        ranks = self._ranks(units)
        for unit, rank in zip(units, ranks, strict=True):
            if not rank:
                reason = f"factors of the rank that was asked for have no fewer than its {unit.dense} weights"
                context.leave(f"{path}.{unit.names[0][0]}".lstrip("."), reason)
        if not any(ranks):
            return
        inner, outer = [0] * layer.num_layers, [0] * layer.num_layers
        state = {name: value.detach().double() for name, value in layer.named_parameters()}
        first: dict[str, Tensor] = {}
        for unit, rank in zip(units, ranks, strict=True):
            for together, (later, shared) in zip(unit.names, unit.factors(rank) if rank else (), strict=False):
                for name, rows in zip(together, later.chunk(len(together)), strict=True):
                    kind, place, _ = _parsed(name)
                    (inner if kind == "ih" else outer)[place] = rank
                    mean = own[name].mean
                    if mean is not None:
                        bias = name.replace("weight", "bias")
                        state[bias] = state[bias] + (state[name] - rows @ shared) @ mean
                    state[name], first[name] = rows, shared
        made: dict[str, Tensor] = {}
        for name, value in state.items():
            kind, place, suffix = _parsed(name)
            way = _SUFFIXES.index(suffix)
            if name in first:
                root = f"projections.{place}" if kind == "ih" else f"layers.{place}.hidden.{way}.0"
                made[f"{root}.weight"] = first[name]
            new = f"{name.partition('_l')[0]}_l0{suffix}"
            if outer[place]:
                owner = f"incoming.{way}" if kind == "ih" else f"hidden.{way}.1"
                new = f"{owner}.{name.partition('_')[0]}"
            made[f"layers.{place}.{new}"] = value
        dtype = next(layer.parameters()).dtype
        options: dict[str, Any] = {
            "input_size": layer.input_size,
            "hidden_size": layer.hidden_size,
            "input_ranks": inner,
            "hidden_ranks": outer,
            "shared": self.hidden == "shared" and not layer.bidirectional,
            "bias": layer.bias,
            "batch_first": layer.batch_first,
            "dropout": layer.dropout,
            "bidirectional": layer.bidirectional,
        }
        yield Swap(
            path,
            "factored_lstm" if isinstance(layer, nn.LSTM) else "factored_gru",
            options,
            {name: value.to(dtype) for name, value in made.items()},
        )

    def _units(self, layer: nn.RNNBase, own: dict[str, Metric]) -> list[_Unit]:
        """The matrices of a layer, in sets that get one rank."""
        ways = _SUFFIXES[: 2 if layer.bidirectional else 1]
        shared = self.hidden == "shared" and not layer.bidirectional
        units = []
        for place in range(layer.num_layers):
            if not (shared and place):
                units.append(_unit(layer, own, (tuple(f"weight_ih_l{place}{suffix}" for suffix in ways),)))
            if shared and place + 1 < layer.num_layers:
                units.append(_unit(layer, own, ((f"weight_hh_l{place}", f"weight_ih_l{place + 1}"),)))
            elif self.hidden != "dense":
                units.append(_unit(layer, own, tuple((f"weight_hh_l{place}{suffix}",) for suffix in ways)))
        return units

    def _ranks(self, units: list[_Unit]) -> list[int]:
        """The rank of each unit, 0 where it stays dense."""
        ways = [unit.choices(self.multiple) for unit in units]
        dense = [unit.dense for unit in units]
        if self.rank == "energy":
            picked: list[int | None] = [by_energy(choices, self.energy) for choices in ways]
        elif self.rank == "ratio":
            picked = [
                by_parameters(choices, (1 - self.ratio) * whole) for choices, whole in zip(ways, dense, strict=True)
            ]
        else:
            picked = spread(ways, dense, self.ratio)
        return [
            0 if best is None or choices.parameters[best] >= whole else int(choices.ranks[best, 0])
            for best, choices, whole in zip(picked, ways, dense, strict=True)
        ]


def _unit(layer: nn.RNNBase, own: dict[str, Metric], names: tuple[tuple[str, ...], ...]) -> _Unit:
    matrices = tuple(
        torch.cat([layer.get_parameter(name).detach().double() for name in together]) for together in names
    )
    joint = []
    for together in names:
        seen = [own[name].inputs for name in together]
        stacked = [moment for moment in seen if moment is not None]
        joint.append(Metric(torch.stack(stacked).mean(0) if stacked else None))
    return _Unit(names, matrices, tuple(joint))


def _centred(metric: Metric, biased: bool) -> Metric:
    """The metric with its mean left in where there is no bias that could make it good."""
    if biased or metric.mean is None or metric.inputs is None:
        return metric
    return Metric(metric.inputs + torch.outer(metric.mean, metric.mean))


def _parsed(name: str) -> tuple[str, int, str]:
    """`weight_hh_l1_reverse` as `("hh", 1, "_reverse")`."""
    _, kind, place, *backward = name.split("_")
    return kind, int(place[1:]), "_reverse" if backward else ""
