"""Sparsity-inducing training before a cut: what is to be removed is made small first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Write, named_tensors
from featherweight.graph import CoupledGroup
from featherweight.technique import Context, Edits, Technique, setting
from featherweight.techniques.cuts import coupled
from featherweight.techniques.importance import indices, sums, within
from featherweight.techniques.train import Training, fit

_REACH = 4.0  # the least important unit is pulled 2^4 times as hard as the most important


@final
@dataclass(frozen=True)
class RegularizeGroups(Technique):
    """Train with a penalty on the norm of every coupled unit, stronger on the smaller ones and growing over the training.

    The penalty is `strength / 2 * sum_k gamma_k ||unit_k||^2` with `gamma_k = 2^(4 (I_max - I_k) / (I_max - I_min))` over
    the norms `I` of the units of a group, taken anew at each epoch; it grows from nothing to `strength` over the training.

    Paper: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023; growing: Wang et al., "Neural Pruning via
        Growing Regularization", ICLR 2021.
    Use when: before `prune_channels` of half the channels or more, with epochs to spend.
    Costs: `epochs` of training, hardly dearer than without the penalty, and one trace.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"train", "validate"})
    epochs: int = setting(10, low=1, high=10_000)
    learning_rate: float = setting(1e-3, low=0.0, high=1.0)
    strength: float = setting(5e-4, low=0.0, high=10.0)
    teacher_share: float = setting(0.7, low=0.0, high=1.0)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Train in place, and yield one Write that says so."""
        groups, _ = coupled(model, context)
        inside = [group for group in groups if within(model, group, context)]
        penalty = _Penalty(model, inside, self.strength, self.epochs)
        if not penalty.groups:
            context.leave("", "no coupled group is in scope")
            return
        training = Training(self.epochs, self.learning_rate, self.teacher_share)
        fit(model, context, training, penalty.follow, after_backward=penalty.add)
        yield Write(None)


class _Penalty:
    """The gradient of the penalty; a function of the weights at the start of the epoch and of the progress alone."""

    def __init__(self, model: nn.Module, groups: list[CoupledGroup], strength: float, epochs: int) -> None:
        self.groups, self.strength, self.epochs = groups, strength, epochs
        self._tensors = named_tensors(model)
        self._owned = [indices(group) for group in groups]
        self._pulls: list[tuple[str, Tensor]] = []
        self._epoch = -1
        self._grown = 0.0

    def follow(self, before: float, done: float) -> bool:
        """Take the norms anew when an epoch begins; only the end of the training is a candidate for the best."""
        epoch = int(done * self.epochs + 1e-6)
        if epoch != self._epoch:
            self._epoch, self._pulls = epoch, self._pull()
        self._grown = done
        return False

    def add(self, parameters: dict[str, nn.Parameter]) -> None:
        """Add the gradient of the penalty to the gradients of the loss, in place."""
        for name, pull in self._pulls:
            gradient = parameters[name].grad if name in parameters else None
            if gradient is not None:
                gradient.addcmul_(parameters[name].detach(), pull, value=self.strength * self._grown)

    def _pull(self) -> list[tuple[str, Tensor]]:
        """For each member, the factor of each of its indices, shaped to multiply the whole tensor."""
        squares: dict[tuple[str, int], Tensor] = {}
        factors: dict[tuple[str, int], Tensor] = {}
        for group, owned in zip(self.groups, self._owned, strict=True):
            norms = torch.zeros(len(group), dtype=torch.float64)
            trained = [
                (member, places)
                for member, places in zip(group.members, owned, strict=True)
                if isinstance(self._tensors[member[0]], nn.Parameter)
            ]
            for member, places in trained:
                if member not in squares:
                    squares[member] = sums(self._tensors[member[0]].detach().square(), member[1])
                norms += squares[member][places].sum(1)
            norms = norms.sqrt()
            spread = (norms.max() - norms.min()).clamp_min(1e-12)
            gamma = 2 ** (_REACH * (norms.max() - norms) / spread)
            for member, places in trained:
                factor = factors.setdefault(member, torch.zeros(self._tensors[member[0]].shape[member[1]]))
                factor.index_add_(0, places.flatten(), gamma.float().repeat_interleave(places.shape[1]))
        pulls = []
        for (name, dim), factor in factors.items():
            tensor = self._tensors[name]
            shape = [-1 if axis == dim else 1 for axis in range(tensor.dim())]
            pulls.append((name, factor.to(tensor).reshape(shape)))
        return pulls
