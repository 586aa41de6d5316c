"""Sparse variational dropout: every weight learns how much noise it bears; those that bear any amount become zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import batches, samples
from featherweight.edits import Write
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.matrices import fresh_masks, matrices
from featherweight.techniques.seeding import reseeded, seeded
from featherweight.techniques.train import Training, fit, steps_per_epoch

_RISE = 0.3  # share of the training over which the divergence gets its full weight
_END = 0.8  # share at which noise ends and the noisy weights become zero; the rest heals
_FIRST = -6.0  # logarithm of the first variance over the mean square of a tensor
_TRAVEL = 40.0  # how far a logarithm of a variance can move in one training
_MOST = 8.0  # logarithm of the largest alpha: noise beyond it says nothing new and drowns the rest
_FIT = (0.63576, 1.87320, 1.48695)  # k1, k2, k3 of the paper's approximation


@final
@dataclass(frozen=True)
class PruneVariational(Technique):
    """Train with Gaussian noise on every weight, its variance learnt by variational inference, and zero the noisiest weights.

    A weight's noise is `alpha` times its square. The loss holds variances down; the divergence from the log-uniform prior, `rate`
    over the number of training samples times it, drives them up. After four fifths of the training weights with
    `log alpha > threshold` become zero, noise ends and the rest heals. How many go is found, not asked for: a higher `rate` or a
    lower `threshold` takes more.

    Paper: Molchanov, Ashukha & Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017, with additive noise on
        the weights of a batch, so that layers of every kind can have it.
    Use when: the share of zeros that a network bears is not known, and there are many epochs to spend.
    Costs: `epochs` of training, each step with some 20 operations on every weight, and five more copies of the weights.
    """

    stage: ClassVar[Stage | None] = Stage.SPARSIFY
    needs: ClassVar[frozenset[str]] = frozenset({"train", "validate"})
    rate: float = setting(1.0, low=0.0, high=1000.0)
    threshold: float = setting(3.0, low=-10.0, high=8.0)
    epochs: int = setting(20, low=1, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Train in place, and yield one Write that names every tensor with noise as sparse."""
        weights = {name: weight for name, weight in matrices(model, context).items() if weight.requires_grad}
        if not weights:
            return
        masks = fresh_masks(weights, context)
        noise = _Noise(weights, masks, context, self)
        training = Training(self.epochs, self.learning_rate, self.teacher_share)
        fit(model, context, training, noise.add, masks, noise.learn, noise.memory)
        yield Write(None, tuple(sorted(weights)))


class _Noise:
    """The noise of every weight, and what is learnt about it.

    Attributes:
        memory: for each tensor the logarithms of its variances and the two moments of Adam, of its shape; and the steps taken.
    """

    def __init__(
        self, weights: dict[str, Tensor], masks: dict[str, Tensor], context: Context, settings: PruneVariational
    ) -> None:
        self._weights, self._masks, self._settings = weights, masks, settings
        steps = steps_per_epoch(context)
        with seeded(0), reseeded(context.data.train, 0):
            batch = samples(next(batches(context.data.train, "train"))[0])
        self._pace = _TRAVEL / (_END * settings.epochs * steps)
        self._share = settings.rate / (steps * batch)  # of a training set's divergence, one sample's
        self._pull = 0.0
        self._still: dict[str, Tensor] = {}  # the weights without the noise of this step
        self._drawn: dict[str, Tensor] = {}
        self.memory: dict[str, Tensor] = {"steps": torch.zeros((), dtype=torch.int64)}
        for name, weight in weights.items():
            first = _FIRST + math.log(max(float(weight.detach().square().mean()), 1e-12))
            self.memory[f"variance/{name}"] = torch.full_like(weight.detach(), first)
            self.memory[f"mean/{name}"] = torch.zeros_like(weight.detach())
            self.memory[f"square/{name}"] = torch.zeros_like(weight.detach())

    def add(self, before: float, done: float) -> bool:
        """Add this step's noise to the weights, or, once, decide which stay."""
        if done >= _END:
            if before < _END:
                for name, mask in self._masks.items():
                    mask.logical_and_(self._log_alpha(name) <= self._settings.threshold)
            return True
        self._pull = self._share * min(1.0, done / _RISE)
        self.memory["steps"] += 1
        for name, weight in self._weights.items():
            drawn = torch.randn_like(weight) * (0.5 * self.memory[f"variance/{name}"]).exp()
            self._still[name], self._drawn[name] = weight.detach().clone(), drawn
            with torch.no_grad():
                weight += drawn
        return False

    def learn(self, parameters: dict[str, nn.Parameter]) -> None:
        """Take the noise away, add the divergence's gradients to those of the weights, and take a step of Adam on the variances."""
        for name, still in self._still.items():
            weight, variance = self._weights[name], self.memory[f"variance/{name}"]
            with torch.no_grad():
                weight.copy_(still)
            gradient = parameters[name].grad if name in parameters else None
            if gradient is None:
                continue
            value, spread = still.requires_grad_(), variance.clone().requires_grad_()
            with torch.enable_grad():
                to_weight, to_spread = torch.autograd.grad(divergence(log_alpha(value, spread)).sum(), (value, spread))
            self._step(name, 0.5 * gradient * self._drawn[name] + self._pull * to_spread)
            gradient += self._pull * to_weight
        self._still.clear()

    def _step(self, name: str, gradient: Tensor) -> None:
        steps = int(self.memory["steps"])
        variance, mean, square = (self.memory[f"{kind}/{name}"] for kind in ("variance", "mean", "square"))
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 1e-3)
        change = (mean / (1 - 0.9**steps)) / ((square / (1 - 0.999**steps)).sqrt() + 1e-12)
        variance -= self._pace * change

    def _log_alpha(self, name: str) -> Tensor:
        return log_alpha(self._weights[name].detach(), self.memory[f"variance/{name}"])


def log_alpha(weight: Tensor, variance: Tensor) -> Tensor:
    """Return the logarithm of the variance of a weight's noise over its square, at most 8.

    Args:
        weight: any shape.
        variance: logarithms of the variances, of the same shape.
    """
    return (variance - weight.square().clamp_min(1e-20).log()).clamp_max(_MOST)


def divergence(alpha: Tensor) -> Tensor:
    """Return what a weight diverges from the log-uniform prior, in nats, up to a constant: 0 for boundless noise.

    Args:
        alpha: logarithms of the noise over the square of the weight, any shape.
    """
    first, middle, slope = _FIT
    return first - first * torch.sigmoid(middle + slope * alpha) + 0.5 * F.softplus(-alpha)
