"""Training for few bytes: quantized layers learn weights, steps and a prior together, and pay for their bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.edits import Write, module_at
from featherweight.layers import QuantizedLayer, SharedLayer
from featherweight.layers.quantized import limit
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.recurrent import recurrent_swaps
from featherweight.techniques.swaps import quantizable, quantized_swap
from featherweight.techniques.train import Training, fit

_RISE = 0.1  # share of the training over which the rate rises to its full value
_PRIOR_RATE = 1e-2  # of Adam on the priors, whose units do not depend on the weights
_FIRST = (math.log(0.2), math.log(2.0), 0.0)  # scales of spike and slab in steps, log-odds of the spike
_STILL = 256  # zeros that stand for all that must stay


@final
@dataclass(frozen=True)
class PenalizeEntropy(Technique):
    """Train quantized layers on the task, the teacher and `rate` times the mean bits of a weight; the codes stay.

    Layers that are float are quantized first, at the step of least squared error for `bits`. The task sees rounded weights with
    straight-through gradients. Bits are those of `w / step` with uniform noise in place of rounding, under a prior for each
    tensor that is learnt along: a mixture of two zero-mean logistic distributions, one of which becomes a spike at zero.
    Weights, steps and priors all follow the penalty, which rises over the first tenth. Zeros of pruned tensors stay zero, and
    the last epoch is what comes back.

    Paper: Oktay et al., "Scalable Model Compression by Entropy Penalized Reparameterization", ICLR 2020, with the learned
        steps of Esser et al., LSQ, ICLR 2020.
    Use when: bytes on disk matter most and there are many epochs to spend, after `prune_weights` with the same teacher.
    Costs: `epochs` of training, each step with some 30 operations on every weight that is not held at zero.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    needs: ClassVar[frozenset[str]] = frozenset({"train", "validate"})
    epochs: int = setting(30, low=1, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    rate: float = setting(0.1, low=0.0, high=1000.0)
    bits: int = setting(5, low=2, high=8)
    per_channel: bool = setting(False)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each float layer, train in place, and yield one Write that says so."""
        yield from layer_swaps(model, context)
        yield from recurrent_swaps(model, context)
        for path, layer in quantizable(model, context, self.bits, self.per_channel):
            yield quantized_swap(path, layer, self.bits, self.per_channel)
        paths = [
            path
            for path, layer in model.named_modules()
            if isinstance(layer, QuantizedLayer) and not isinstance(layer, SharedLayer) and context.in_scope(path)
        ]
        if not paths:
            context.leave("", "no quantized layer is in scope")
            return
        penalty = _Penalty(model, paths, context, self.rate)
        training = Training(self.epochs, self.learning_rate, self.teacher_share)
        fit(model, context, training, penalty.follow, after_backward=penalty.add, memory=penalty.memory)
        yield Write(None)


class _Penalty:
    """The gradient of `rate` times the mean bits of a weight, and the priors that say what bits are.

    Attributes:
        memory: for each layer its prior `[3]` and the two moments of Adam, `[3]` each; and the steps taken.
    """

    def __init__(self, model: nn.Module, paths: list[str], context: Context, rate: float) -> None:
        self.memory: dict[str, Tensor] = {"steps": torch.zeros(())}
        self._rate, self._done, self._count = rate, 0.0, 0
        self._free: dict[str, Tensor | None] = {}
        self._layers: dict[str, QuantizedLayer] = {}
        for path in paths:
            layer = module_at(model, path)
            if not isinstance(layer, QuantizedLayer) or layer.codes is None:
                continue
            name = f"{path}.weight".lstrip(".")
            held = name in context.sparse
            self._free[name] = layer.codes.flatten().nonzero().flatten() if held else None
            self._layers[name] = layer
            self._count += layer.codes.numel()
            first = torch.tensor(_FIRST, device=layer.codes.device)
            self.memory |= {f"prior/{name}": first, f"mean/{name}": torch.zeros_like(first)}
            self.memory[f"square/{name}"] = torch.zeros_like(first)

    def follow(self, before: float, done: float) -> bool:
        """Remember how far the training is; only its end is a candidate for the best."""
        self._done = done
        return False

    def add(self, parameters: dict[str, nn.Parameter]) -> None:
        """Add the gradient of the penalty to those of weights and steps, and take a step of Adam on each prior."""
        self.memory["steps"] += 1
        rate = self._rate * min(1.0, (self._done + 1e-3) / _RISE) / self._count
        for name, layer in self._layers.items():
            scale_name = f"{name.removesuffix('weight')}scale"
            if name not in parameters or scale_name not in parameters:
                continue
            weight, scale, prior = parameters[name], parameters[scale_name], self.memory[f"prior/{name}"]
            inputs = [tensor.detach().clone().requires_grad_() for tensor in (weight, scale, prior)]
            with torch.enable_grad():
                total = self._bits(layer, name, *inputs)
                to_weight, to_scale, to_prior = torch.autograd.grad(total, inputs)
            # LSQ has the gradients of steps smaller by this factor
            smaller = (weight.numel() / scale.numel() * limit(layer.bits)) ** -0.5
            _add(weight, rate * to_weight)
            _add(scale, rate * smaller * to_scale)
            self._learn(name, to_prior / weight.numel())

    def _bits(self, layer: QuantizedLayer, name: str, weight: Tensor, scale: Tensor, prior: Tensor) -> Tensor:
        """The bits of a tensor under uniform noise."""
        places, free = (weight / layer.steps(scale.abs().clamp_min(1e-8))).flatten(), self._free[name]
        if free is None:
            return bits(places + torch.rand_like(places) - 0.5, prior).sum()
        still = bits(torch.rand(_STILL, device=places.device) - 0.5, prior).mean() * (len(places) - len(free))
        moving = places[free]
        return still + bits(moving + torch.rand_like(moving) - 0.5, prior).sum()

    def _learn(self, name: str, gradient: Tensor) -> None:
        prior, mean, square = (self.memory[f"{kind}/{name}"] for kind in ("prior", "mean", "square"))
        steps = self.memory["steps"]
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 1e-3)
        change = (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-8)
        prior.sub_(_PRIOR_RATE * change)
        prior[:2].clamp_(-3.0, 4.0)  # scales from a twentieth of a step to 55 steps


def bits(places: Tensor, prior: Tensor) -> Tensor:
    """Return what values cost, in bits: minus the logarithm of what a mixture has between half a step below and above.

    Args:
        places: values over the step, any shape.
        prior: logarithms of the scales of both logistic distributions, and the log-odds of the first, `[3]`.
    """
    parts = []
    for place, odds in enumerate((prior[2], -prior[2])):
        scale = prior[place].exp()
        # on the side of the tail, where the difference of two chances near one would be lost
        far = -places.abs()
        upper, lower = (far + 0.5) / scale, (far - 0.5) / scale
        # log(sigmoid(upper) - sigmoid(lower)) = log sigmoid(upper) + log sigmoid(-lower) + log(1 - exp(lower - upper))
        within = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-1 / scale))
        parts.append(F.logsigmoid(odds) + within)
    return -torch.logaddexp(*parts) / math.log(2.0)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
