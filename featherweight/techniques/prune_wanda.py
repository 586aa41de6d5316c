"""Pruning by magnitude times the size of the input: what a weight contributes, read off calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from featherweight.edits import Write, module_at
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.moments import in_call_order, input_energy, weights_of
from featherweight.techniques.patterns import KeepOf, keep_of, parse_pattern
from featherweight.techniques.scores import largest


@final
@dataclass(frozen=True)
class PruneWanda(Technique):
    """Zero the share `ratio` of each layer's weights whose `|W_ij| ||X_j||` is least, layer after layer.

    Each layer is judged by what reaches it through the layers already pruned. Weights are compared within the row of one
    output, or within the layer (`per`). An embedding's inputs are one-hot, so its rows count by how often their token is
    read, and once more, since a token that calibration data lacks may still come. `pattern` `"2:4"` keeps 2 of each 4
    consecutive inputs (then `ratio` must be 0.5).

    Paper: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.
    Use when: zeros are wanted without any training.
    Costs: `batches` forward passes on calibration data for each layer.
    """

    stage: ClassVar[Stage | None] = Stage.SPARSIFY
    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    ratio: float = setting(0.5, low=0.0, high=0.9999)
    per: str = setting("row", choices=("row", "layer"))
    pattern: str = setting("")
    batches: int = setting(8, low=1, high=100_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_pattern(self.pattern, self.ratio, "prune_wanda", blocks=False)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Write for each layer, in the order in which they are called."""
        for paths in in_call_order(model, context):
            energy = input_energy(model, context, paths, self.batches)
            embedding = any(isinstance(module_at(model, path), nn.Embedding) for path in paths)
            state: dict[str, Tensor] = {}
            for name, weight in weights_of(model, context, paths).items():
                if name in energy:
                    norms = (energy[name] + embedding).sqrt()
                    mask = self._mask(weight.detach().double().flatten(1).abs() * norms, embedding)
                    state[name] = weight.detach().masked_fill(~mask.reshape(weight.shape), 0.0)
            if state:
                yield Write(state, tuple(sorted(state)))
            else:
                context.leave(paths[0], "calibration data never reached it")

    def mildest(self) -> Technique:
        """Return pruning that removes nothing."""
        return PruneWanda(ratio=0.0)

    def _mask(self, scores: Tensor, embedding: bool) -> Tensor:
        """Return the mask of one matrix `[out, in]`; an embedding is stored as `[in, out]`."""
        pattern = parse_pattern(self.pattern, self.ratio, "prune_wanda", blocks=False)
        if isinstance(pattern, KeepOf):
            return keep_of(scores, pattern.ratio, pattern.group)
        if self.per == "layer":
            return largest(scores, self.ratio)
        rows = scores.T if embedding else scores
        order = rows.sort(dim=1, stable=True).indices[:, : min(rows.shape[1] - 1, round(rows.shape[1] * self.ratio))]
        mask = torch.ones_like(rows, dtype=torch.bool).scatter(1, order, False)
        return mask.T if embedding else mask
