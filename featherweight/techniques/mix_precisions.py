"""Mixed precision: a width for each layer, by what it measurably costs at each, under a budget of bits a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import scipy
from torch import nn

from featherweight.descriptors import nowhere
from featherweight.technique import Context, Edits, Stage, Technique, setting
from featherweight.techniques.apart import layer_swaps
from featherweight.techniques.damage import damage_table
from featherweight.techniques.recurrent import recurrent_moments, recurrent_swaps
from featherweight.techniques.sequential import sequential_swaps
from featherweight.techniques.swaps import quantizable, quantized_swap

WIDTHS = (2, 3, 4, 5, 6, 8)


@final
@dataclass(frozen=True)
class MixPrecisions(Technique):
    """Give each layer's weights a width of 2 to 8 bits so that outputs change least, at `bits` a weight on average.

    What a width costs is measured: each layer alone is rounded to it, and the network's outputs on calibration data are compared
    with those before, by divergence, without labels. The choice is the exact optimum of the sum of these damages (an integer
    program). Weights are then rounded as by `quantize_weights` with `compensated` rounding, embeddings and transposed
    convolutions to the nearest codes.

    Paper: Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021; damages by divergence: Pandey et al., "A
        Practical Mixed Precision Algorithm for Post-Training Quantization", 2023.
    Use when: some layers bear fewer bits than others, at 4 bits on average and below.
    Costs: six passes over `batches` calibration batches for each layer, and those of compensated rounding.
    """

    stage: ClassVar[Stage | None] = Stage.QUANTIZE
    needs: ClassVar[frozenset[str]] = frozenset({"calibrate"})
    bits: float = setting(4.0, low=2.0, high=8.0)
    batches: int = setting(4, low=1, high=100_000)

    def edits(self, model: nn.Module, context: Context) -> Edits:
        """Yield a Swap for each layer, and before them one for each attention and recurrent layer."""
        yield from layer_swaps(model, context)
        known = recurrent_moments(model, context, self.batches)
        yield from recurrent_swaps(model, context)
        layers = quantizable(model, context, max(WIDTHS), per_channel=True)
        table = width_table(model, context, layers, self.batches)
        widths = least_damage(table, self.bits)
        yield from sequential_swaps(model, context, layers, widths, True, self.batches, known=known)

    def mildest(self) -> Technique:
        """Return 8 bits everywhere."""
        return MixPrecisions(bits=8.0)


def width_table(
    model: nn.Module, context: Context, layers: Sequence[tuple[str, nn.Module]], count: int
) -> list[dict[str, Any]]:
    """Return what each width of each layer costs, as rows of plain data: `path`, `treatment` (bits), `bytes`, `damage`.

    Args:
        model: as it is before; it comes back as it was.
        context: calibration data, loss and device.
        layers: `(path, layer)`.
        count: calibration batches to read.
    """
    treatments = [
        (path, str(bits), [quantized_swap(path, layer, bits, per_channel=True)], -(-bits * _weights(layer) // 8))
        for path, layer in layers
        for bits in WIDTHS
    ]
    return damage_table(model, context, treatments, count)


def least_damage(table: Sequence[dict[str, Any]], bits: float) -> dict[str, int]:
    """Return the width of each path at which damages sum to least, of those whose bytes are at most so many bits a weight.

    Args:
        table: rows as `width_table` gives them.
        bits: mean width, weighted by the number of weights; 2 to 8.
    """
    if not table:
        return {}
    paths = list(dict.fromkeys(row["path"] for row in table))
    sizes = np.array([float(row["bytes"]) for row in table])
    each = np.array([[row["path"] == path for row in table] for path in paths], dtype=float)
    widest = {row["path"]: row["bytes"] for row in table if row["treatment"] == str(max(WIDTHS))}
    room = max(sum(widest.values()) * bits / max(WIDTHS), sum(min(sizes[row > 0]) for row in each))
    with nowhere(1):  # HiGHS prints there now and then
        found = scipy.optimize.milp(
            np.array([row["damage"] for row in table]) + 1e-12 * sizes,  # of equals the smaller
            integrality=np.ones(len(table)),
            bounds=scipy.optimize.Bounds(0, 1),
            constraints=[
                scipy.optimize.LinearConstraint(each, 1, 1),
                scipy.optimize.LinearConstraint(sizes[None], -np.inf, room),
            ],
        )
    return {row["path"]: int(row["treatment"]) for row, taken in zip(table, found.x, strict=True) if taken > 0.5}


def _weights(layer: nn.Module) -> int:
    return layer.get_parameter("weight").numel()
