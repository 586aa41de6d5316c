"""Structured pruning: remove whole channels, with everything that is coupled to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.data import as_call, example_inputs
from featherweight.edits import Cut, Keep, named_tensors
from featherweight.errors import ModelError
from featherweight.graph import CoupledGroup, coupled_groups
from featherweight.sizes import following_sizes
from featherweight.technique import Context, Edits, Stage, Technique, setting


@final
@dataclass(frozen=True)
class PruneChannels(Technique):
    """Remove a share `ratio` of the channels of every coupled group, the least important first, physically.

    A channel's importance is the norm of all the slices that leave with it, through residual adds, flatten, depthwise
    convolution and normalization. Groups that cannot be followed are left whole, and the report says what stopped them.

    Paper: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; coupled groups: Fang et al., "DepGraph", CVPR 2023.
    Use when: time, memory and bytes all matter: what remains is a smaller dense network, faster everywhere.
    Costs: one trace; heal with `distill` afterwards.
    """

    stage: ClassVar[Stage | None] = Stage.CUT
    ratio: float = setting(0.5, low=0.0, high=0.99)
    importance: str = setting("l2", choices=("l2", "l1", "random"))
    ranking: str = setting("group", choices=("group", "global"))
    multiple: int = setting(1, low=1, high=512)
    minimum: int = setting(2, low=1, high=100_000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Keep for each coupled group in scope."""
        args, kwargs = as_call(example_inputs(context.data, context.device))
        try:
            groups, pinned = coupled_groups(model, args, kwargs)
        except ModelError as error:
            context.leave("", str(error))
            return
        for pin in pinned:
            if context.in_scope(pin.tensor.rpartition(".")[0]):
                context.leave(pin.tensor.rpartition(".")[0], pin.reason)
        inside = [
            group
            for group in groups
            if all(context.in_scope(name.rpartition(".")[0]) for name, dim in group.members if dim == 0)
        ]
        scores = {group: self._scores(group, named_tensors(model), context) for group in inside}
        remaining: dict[tuple[str, int], list[int]] = {}
        for group, keep in self._choose(scores).items():
            if len(keep) == len(group):
                continue
            removed = [unit for index, unit in enumerate(group.units) if index not in keep]
            keep_edit, after = _keep_edit(model, group, removed, remaining)
            if (yield keep_edit):
                remaining.update(after)

    def _scores(self, group: CoupledGroup, tensors: dict[str, Tensor], context: Context) -> Tensor:
        """Importance of each unit, `[units]`, relative to the group's mean."""
        if self.importance == "random":
            return torch.rand(len(group), generator=context.rng(group.name), dtype=torch.float64)
        power = 2 if self.importance == "l2" else 1
        total = torch.zeros(len(group), dtype=torch.float64)
        for member, (name, dim) in enumerate(group.members):
            tensor = tensors[name].detach().cpu()
            if tensor.dim() < 2:
                continue  # biases and statistics move with their channel and say little about it
            norms = tensor.double().abs().pow(power).transpose(0, dim).flatten(1).sum(1)
            norms = norms / norms.mean().clamp_min(1e-30)
            total += torch.stack([norms[list(unit[member])].mean() for unit in group.units])
        score = total.pow(1 / power)
        return score / score.mean().clamp_min(1e-30)

    def _choose(self, scores: dict[CoupledGroup, Tensor]) -> dict[CoupledGroup, set[int]]:
        """Indices of the units each group keeps."""
        chosen: dict[CoupledGroup, set[int]] = {}
        threshold = -1.0
        if self.ranking == "global" and scores:
            together = torch.cat(list(scores.values())).sort().values
            threshold = float(together[min(len(together) - 1, round(self.ratio * len(together)))])
        for group, score in scores.items():
            count = int((score >= threshold).sum()) if threshold >= 0 else round(len(group) * (1 - self.ratio))
            count = min(len(group), max(self.minimum, count))
            if self.multiple > 1:
                count = min(len(group), max(self.multiple, round(count / self.multiple) * self.multiple))
            chosen[group] = set(score.argsort(descending=True, stable=True)[:count].tolist())
        return chosen

    def mildest(self) -> Technique:
        """Return a cut that keeps every channel."""
        return PruneChannels(ratio=0.0)


def _keep_edit(
    model: nn.Module,
    group: CoupledGroup,
    removed: list[tuple[tuple[int, ...], ...]],
    remaining: dict[tuple[str, int], list[int]],
) -> tuple[Keep, dict[tuple[str, int], list[int]]]:
    """Return the Keep that removes these units, and which original indices each dimension has left after it.

    `remaining` holds the original indices still present where an earlier group has cut the same dimension.
    """
    tensors = named_tensors(model)
    after: dict[tuple[str, int], list[int]] = {}
    cuts = []
    for member, (name, dim) in enumerate(group.members):
        gone = {index for unit in removed for index in unit[member]}
        present = remaining.get((name, dim), list(range(tensors[name].shape[dim])))
        cuts.append(Cut(name, dim, tuple(place for place, index in enumerate(present) if index not in gone)))
        after[name, dim] = [index for index in present if index not in gone]
    return Keep(tuple(cuts), tuple(following_sizes(model, cuts))), after
