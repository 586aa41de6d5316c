"""Pruning with weight update: what a removed weight did is taken over by those that stay, as far as inputs allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Write, module_at
from featherweight.errors import ModelError
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.compensation import BLOCK, compensate
from featherweight.techniques.moments import in_call_order, input_energy, inverse_factor, second_moments, weights_of
from featherweight.techniques.patterns import KeepOf, Pattern, keep_of, parse_pattern
from featherweight.techniques.scores import largest


@final
@dataclass(frozen=True)
class PruneSparseGpt(Technique):
    """Zero a share `ratio` of each layer's weights by the optimal brain surgeon, and update the weights that stay.

    Columns are taken in order; the error that a zero makes is moved to the later columns of its row by the inverse second
    moment of the inputs. How much each block of 128 columns gives is decided over the whole layer first. Each layer sees
    what reaches it through the layers already pruned. An embedding's inputs never meet, so it has no update. `pattern`
    `"2:4"` keeps 2 of each 4 consecutive inputs (then `ratio` must be 0.5).

    Paper: Frantar & Alistarh, "SparseGPT", ICML 2023; "Optimal Brain Compression", NeurIPS 2022.
    Use when: zeros are wanted without training, and calibration data is at hand; keeps more than any mask alone.
    Costs: `batches` forward passes for each layer, and an inverse of `[in, in]` in float64.
    """

    stage: ClassVar[Stage | None] = Stage.SPARSIFY
    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    ratio: float = setting(0.5, low=0.0, high=0.9999)
    pattern: str = setting("")
    batches: int = setting(16, low=1, high=100_000)
    damping: float = setting(0.01, low=1e-6, high=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pattern()

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Write for each layer, in the order in which they are called."""
        for paths in in_call_order(model, context):
            embedding = any(isinstance(module_at(model, path), nn.Embedding) for path in paths)
            seen = (input_energy if embedding else second_moments)(model, context, paths, self.batches)
            state: dict[str, Tensor] = {}
            for name, parameter in weights_of(model, context, paths).items():
                if name in seen:
                    weight = parameter.detach()
                    gone = weight == 0 if name in context.sparse else torch.zeros_like(weight, dtype=torch.bool)
                    state[name] = (
                        self._masked(weight, seen[name]) if embedding else self._updated(weight, gone, seen[name])
                    )
            if state:
                yield Write(state, tuple(sorted(state)))
            else:
                context.leave(paths[0], "calibration data never reached it")

    def mildest(self) -> Technique:
        """Return pruning that removes nothing."""
        return PruneSparseGpt(ratio=0.0)

    def _pattern(self) -> Pattern:
        return parse_pattern(self.pattern, self.ratio, "prune_sparse_gpt", blocks=False)

    def _masked(self, weight: Tensor, energy: Tensor) -> Tensor:
        scores, pattern = weight.double() ** 2 * (energy + 1), self._pattern()  # one more: unread tokens may still come
        mask = (
            keep_of(scores, pattern.ratio, pattern.group)
            if isinstance(pattern, KeepOf)
            else largest(scores, self.ratio)
        )
        return weight.masked_fill(~mask, 0.0)

    def _updated(self, weight: Tensor, gone: Tensor, moment: Tensor) -> Tensor:
        if not bool(torch.isfinite(moment).all()):
            raise ModelError("a layer's inputs are not finite on calibration data: sparse pruning cannot weigh them")
        return pruned(weight, gone, moment, self.ratio, self._pattern(), self.damping)


def pruned(weight: Tensor, gone: Tensor, moment: Tensor, ratio: float, pattern: Pattern, damping: float) -> Tensor:
    """Return the weight with a share `ratio` of zeros and the rest updated so that its outputs change least.

    Args:
        weight: `[out, ...]`.
        gone: boolean, the same shape: weights that are zero and must stay so.
        moment: second moment of the inputs, `[groups, in, in]`, float64.
        ratio: share to remove, 0 to 1; an n:m pattern has its own.
        pattern: anywhere, or n:m.
        damping: share of the mean of the diagonal that is added to it; ten times more each time the inverse fails.
    """
    groups, columns = moment.shape[:2]
    matrix = weight.double().reshape(groups, -1, columns).clone()
    held = gone.reshape(matrix.shape)
    factor = inverse_factor(moment, damping)
    importance = factor.diagonal(dim1=-2, dim2=-1) ** -2.0
    importance = torch.where(moment.diagonal(dim1=-2, dim2=-1) > 0, importance, 0.0)[
        :, None
    ]  # inputs that are never there
    group = pattern.group if isinstance(pattern, KeepOf) else 0
    step = max(group, BLOCK // group * group) if group else BLOCK
    share = ~largest(_held_last(matrix**2 * importance, held), ratio)
    mask = held.clone()

    def settle(column: int, values: Tensor) -> Tensor:
        if column % step == 0 and not group:
            here = slice(column, column + step)
            block = mask[..., here].clone(memory_format=torch.contiguous_format)
            scores = _held_last(matrix[..., here] ** 2 * importance[..., here], block).flatten()
            block.view(-1)[scores.sort(stable=True).indices[: int(share[..., here].sum())]] = True
            mask[..., here] = block
        if isinstance(pattern, KeepOf) and column % group == 0 and column + group <= columns:
            here = slice(column, column + group)
            scores = _held_last(matrix[..., here] ** 2 * importance[..., here], mask[..., here])
            mask[..., here] |= ~keep_of(scores.flatten(0, 1), pattern.ratio, group).reshape(scores.shape)
        return values.masked_fill(mask[..., column], 0.0)

    compensate(matrix, factor, settle, step)
    return matrix.reshape(weight.shape).to(weight.dtype)


def _held_last(scores: Tensor, held: Tensor) -> Tensor:
    return scores.masked_fill(held, -1.0)
