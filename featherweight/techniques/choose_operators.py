"""Architecture search from the user's own model: each layer learns which operator it should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.data import batches
from featherweight.edits import Write, module_at, named_tensors, private_copy
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.guidance import Guidance, Lesson
from featherweight.techniques.operators import Operators, stand_ins
from featherweight.techniques.seeding import reseeded
from featherweight.techniques.train import Training, fit, steps_per_epoch
from featherweight.techniques.unit_costs import uses
from featherweight.trace import unfused

_SEARCH = 0.5  # share of the training in which operators are mixed; then the best of each layer trains alone
_REACH = 16.0  # of logits moved one way by every step at the full learning rate, however many steps there are


@final
@dataclass(frozen=True)
class ChooseOperators(Technique):
    """Search for the operator of each layer by gradient descent: itself, depthwise-separable, low rank or the identity.

    Each linear layer and dense convolution gets the operators that fit its shape, all with the weights nearest to its own:
    low rank without a share `ratio` of the parameters, the identity where input and output have one shape. In the first half
    of the training the outputs of a layer's operators are added up by a softmax of logits. Weights follow the training data,
    and logits the validation data: the same loss, plus `price` times the expected share of the layers' `cost` that is left
    (first-order DARTS, both at each step). In the second half the operator of the greatest logit is alone in each layer, and
    the network that comes out trains on; its best validation epoch wins. Attention is first taken apart into linear layers.

    Paper: Liu, Simonyan & Yang, "DARTS: Differentiable Architecture Search", ICLR 2019; a price in the loss: Wu et al.,
        "FBNet", CVPR 2019.
    Use when: a network has layers that need not all be dense and nobody knows which; a higher price gives cheaper ones.
    Costs: `epochs` of training; in the first half each step takes a pass of all operators on a training and on a validation
        batch, and in the second half a replaced layer is still computed forwards.
    """

    stage: ClassVar[Stage | None] = Stage.FACTOR
    needs: ClassVar[frozenset[str]] = frozenset({"train", "validate"})
    epochs: int = setting(20, low=1, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    price: float = setting(1.0, low=0.0, high=1e6)
    cost: str = setting("macs", choices=("macs", "params"))
    ratio: float = setting(0.5, low=0.01, high=0.99)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Search on a private copy; yield a Swap for each layer that becomes another operator, and one Write of the rest."""
        yield from layer_swaps(model, context)
        found = stand_ins(model, context, self.ratio)
        if not found:
            context.leave("", "no layer in scope has a cheaper operator to choose")
            return
        mixed, _ = private_copy(model)
        used = uses(mixed, context) if self.cost == "macs" else {}
        times = [used.get(id(module_at(mixed, path).weight), 1.0) for path in found]
        pace = _REACH / max(self.learning_rate * self.epochs * steps_per_epoch(context), 1e-12)
        operators = [Operators(mixed, swaps, pace) for swaps in found.values()]
        search = _Search(mixed, context, operators, times, self)
        training = Training(self.epochs, self.learning_rate, self.teacher_share)
        with unfused():  # a fused encoder layer would not call the operators in it
            fit(mixed, context, training, search.follow, after_backward=search.turn)
        taken = []
        for path, operator in zip(found, operators, strict=True):
            swap = operator.taken()
            if swap is None:
                context.leave(path, f"stays itself, by a share of {operator.shares()[0].item():.0%} in the mixture")
            else:
                taken.append(swap)
        counted = Counter(swap.kind for swap in taken)
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(counted.items())) or "nothing"
        context.report(f"{context.step}: {said} in place of {len(found)} layers", 1.0)
        if taken:
            yield tuple(taken)
        names = named_tensors(model)
        yield Write({name: value.detach() for name, value in named_tensors(mixed).items() if name in names})


class _Search:
    """What moves the logits: the loss on validation batches, and a price on what the operators are expected to cost.

    Everything it holds follows from the progress and from the logits, so that a resumed run repeats it.
    """

    def __init__(
        self,
        model: nn.Module,
        context: Context,
        operators: list[Operators],
        times: list[float],
        settings: ChooseOperators,
    ) -> None:
        self._model, self._context, self._operators = model, context, operators
        self._price, self._epochs = settings.price, settings.epochs
        self._costs = [count * operator.weights for count, operator in zip(times, operators, strict=True)]
        self._whole = sum(float(costs[0]) for costs in self._costs)
        self._lesson = Lesson(model, context, Guidance(), settings.teacher_share, Training.temperature)
        self._batches: Iterator[tuple[Any, Any]] = iter(())
        self._epoch, self._done = -1, 0.0

    def follow(self, before: float, done: float) -> bool:
        """Begin the validation data anew with each epoch, and decide at half time; only then are there candidates."""
        epoch = int(done * self._epochs + 1e-6)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, iter(())
        self._done = done
        if done < _SEARCH:
            return False
        for operator in self._operators:
            if operator.decided is None:
                operator.decided = operator.best()
        return True

    def turn(self, parameters: dict[str, nn.Parameter]) -> None:
        """Give the logits the gradients of the validation loss and the price, in place of those of the training loss."""
        if self._done >= _SEARCH:
            return
        inputs, target = self._next()
        with _norms_still(self._model):  # they would learn statistics of validation data, and fail on a single sample
            loss = self._lesson.loss(inputs, target, self._done)
        logits = [operator.logits for operator in self._operators]
        gradients = torch.autograd.grad(loss + self._price * self.expected(), logits)
        for logit, gradient in zip(logits, gradients, strict=True):
            logit.grad = gradient

    def expected(self) -> Tensor:
        """Return the share of the layers' cost that the mixtures stand for, a scalar in 0 to 1."""
        costs = [costs @ operator.shares() for costs, operator in zip(self._costs, self._operators, strict=True)]
        return torch.stack(costs).sum() / self._whole

    def _next(self) -> tuple[Any, Any]:
        given = next(self._batches, None)
        if given is None:
            context = self._context
            self._batches = batches(context.data.validate, "validate", context.device)
            with reseeded(context.data.validate, context.draw("validate", self._epoch)):
                given = next(self._batches)  # a loader that shuffles draws its order with the first batch
        return given


@contextmanager
def _norms_still(model: nn.Module) -> Iterator[None]:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    try:
        for norm in norms:
            norm.training = False
        yield
    finally:
        for norm in norms:
            norm.training = True
