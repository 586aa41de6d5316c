"""SmoothQuant: activations that are hard to round give of their range to weights that are easy to round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from featherweight.data import batches, forward, tensors
from featherweight.edits import Swap, Write, module_at
from featherweight.errors import ModelError
from featherweight.modes import evaluating
from featherweight.technique import Context, Edits, Technique, setting
from featherweight.techniques.links import Link, divided, links, multiplied, reach
from featherweight.techniques.moments import hooked
from featherweight.techniques.observe import Observed
from featherweight.techniques.ranges import on_grid, unsigned_grid

_KEPT = 16  # samples that layers are tried on
_SHARES = tuple(share / 10 for share in range(1, 10))
_WORTH = 0.5  # of the error may be left, at most, where the factors cost a multiplication of their own
_FURTHEST = 2.5  # logarithm of the largest factor: biases of one layer share a step, and must not come too far apart


@dataclass
class _Seen:
    """The largest magnitude of each channel, `[in]`, and some samples, of what enters the readers of a link."""

    largest: Tensor | None = None
    samples: list[Tensor] = field(default_factory=list)


@final
@dataclass(frozen=True)
class SmoothActivations(Technique):
    """Divide the channels between a layer (or layer norm) and those that read it by `s = max|x|^a / max|w|^(1 - a)`.

    The function stays; what changes is how well activations fit one 8-bit grid. For each link the share `a` of 0.1 to 0.9 is
    taken at which the outputs of the readers, weights and inputs rounded to 8 bits, differ least on calibration data, and the
    link is left as it is where none is better than that. Where channels go elsewhere too (a residual sum), nothing can be moved; with
    `multiply`, a linear layer there gets a multiplication in front of it, if that halves the error at least: a value more for each
    of its inputs, and a little time.

    Paper: Xiao et al., "SmoothQuant", ICML 2023.
    Use when: before `quantize_static`, on Transformers with norms in front of their layers, and on networks with ReLU.
    Costs: one pass over `batches` calibration batches, and twenty passes of each layer over 16 samples.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    batches: int = setting(4, low=1, high=100_000)
    multiply: bool = setting(False)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Write for each link that gains, and a Swap for each linear layer that is worth a multiplication."""
        try:
            found = [link for link in links(model, context) if self.multiply or link.producer is not None]
        except ModelError as error:
            context.leave("", str(error))
            return
        seen = self._seen(model, context, found)
        for link in found:
            entered = seen[link]
            if entered.largest is None:
                context.leave(link.producer or link.consumers[0], "calibration data never reached what reads it")
                continue
            factors = _best(model, link, entered)
            if link.producer is None:
                if factors is not None:
                    yield _scaled(link.consumers[0], module_at(model, link.consumers[0]), factors)
                continue
            if factors is None:
                context.leave(link.producer, "its channels round best as they are")
                continue
            producer = module_at(model, link.producer)
            weight, bias = divided(
                producer.get_parameter("weight").detach(), _bias(producer), factors.to(producer.get_parameter("weight"))
            )
            state = {f"{link.producer}.weight".lstrip("."): weight}
            if bias is not None:
                state[f"{link.producer}.bias".lstrip(".")] = bias
            for path in link.consumers:
                behind = module_at(model, path).get_parameter("weight").detach()
                state[f"{path}.weight".lstrip(".")] = multiplied(behind, factors.to(behind))
            yield Write(state)

    def mildest(self) -> Technique:
        """Return itself: the function stays."""
        return self

    def _seen(self, model: nn.Module, context: Context, found: list[Link]) -> dict[Link, _Seen]:
        seen = {link: _Seen() for link in found}

        def watch(link: Link) -> Callable[..., None]:
            def see(layer: nn.Module, args: Any, kwargs: Any) -> None:
                value, entered = next(tensors((args, kwargs))).detach(), seen[link]
                axes = len(getattr(layer, "kernel_size", ()))
                largest = value.abs().movedim(-1 - axes, 0).flatten(1).amax(1)
                entered.largest = largest if entered.largest is None else torch.maximum(largest, entered.largest)
                if sum(map(len, entered.samples)) < _KEPT:
                    entered.samples.append(value[:_KEPT].clone())

            return see

        with hooked(model, {link.consumers[0]: watch(link) for link in found}), evaluating(model):
            for inputs, _ in islice(batches(context.data.calibrate, "calibrate", context.device), self.batches):
                forward(model, inputs)
        return seen


def _scaled(path: str, layer: nn.Module, factors: Tensor) -> Swap:
    """The layer behind a multiplication that divides what enters it by the factors, `[in]`."""
    weight, bias = layer.get_parameter("weight").detach(), _bias(layer)
    state = {"factors": factors.reciprocal(), "inner.weight": multiplied(weight, factors.to(weight))}
    options = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
    return Swap(path, "scaled_linear", options, state | ({} if bias is None else {"inner.bias": bias}))


def _bias(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def _best(model: nn.Module, link: Link, entered: _Seen) -> Tensor | None:
    """The factors of the best share, `[in]`; None where no share is better than none."""
    layers = [module_at(model, path) for path in link.consumers]
    largest = entered.largest if entered.largest is not None else torch.ones(())
    weights = [layer.get_parameter("weight").detach() for layer in layers]
    reached = torch.stack([reach(weight, len(largest)) for weight in weights]).amax(0)
    values = torch.cat(entered.samples)[:_KEPT]
    best, least = None, _error(layers, weights, values, largest, torch.ones_like(largest))
    least *= 1.0 if link.producer is not None else _WORTH
    for share in _SHARES:
        factors = _factors(largest, reached, share)
        error = _error(layers, weights, values, largest, factors)
        if error < least:
            best, least = factors, error
    return best


def _factors(largest: Tensor, reached: Tensor, share: float) -> Tensor:
    """Factors around one, `[in]`; a channel that was never seen alive keeps its own."""
    alive = (largest > 0) & (reached > 0)
    logs = share * largest.where(alive, 1.0).log() - (1 - share) * reached.where(alive, 1.0).log()
    logs = logs - logs[alive].mean() if bool(alive.any()) else logs
    return logs.clamp(-_FURTHEST, _FURTHEST).where(alive, 0.0).exp()


def _error(layers: list[nn.Module], weights: list[Tensor], values: Tensor, largest: Tensor, factors: Tensor) -> float:
    """What rounding inputs and weights to 8 bits changes in the outputs, as a share of their size, summed over the layers."""
    axes = len(getattr(layers[0], "kernel_size", ()))
    scaled = values / factors.reshape(-1, *[1] * axes)
    high = float((largest / factors).max())
    low = 0.0 if float(values.min()) >= 0 else -high
    rounded = on_grid(scaled, unsigned_grid(Observed(low, high, scaled.flatten()), "minmax"))
    total = 0.0
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            moved = multiplied(weight, factors)
            step = (moved.abs().flatten(1).amax(1) / 127).clamp_min(1e-12).reshape(-1, *[1] * (weight.dim() - 1))
            given = functional_call(layer, {"weight": (moved / step).round() * step}, (rounded,))
            wanted = layer(values)
            total += float((given - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12))
    return total
