"""Bytes of a pruned tensor over the same tensor dense, at the same bits, through the coder of the artifact.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/pruning_sparse_bytes.py

The tensors are the layers of a trained LeNet-300-100, whose smallest weights go, and a random one with Laplace values.
"""

from __future__ import annotations

import torch
from originals import original
from results import record
from torch import Tensor

from featherweight.coding import encode_tensor
from featherweight.tasks.mnist import data, lenet300
from featherweight.techniques.rounding import grid_scale, to_codes
from featherweight.techniques.scores import masks_at
from featherweight.techniques.train import Training

NAME = "pruning_sparse_bytes"
TRAINING = Training(epochs=20, learning_rate=1e-3, weight_decay=5e-2)
DENSITIES = (*range(5, 60, 5), 59)  # per cent of weights that are not zero


def main() -> None:
    """Code every tensor at every density and write the row."""
    table = {}
    for name, weight in tensors().items():
        for bits in (4, 8):
            dense = coded(weight, weight, bits)
            for density in DENSITIES:
                chance = torch.rand(weight.shape, generator=torch.Generator().manual_seed(density))
                small, random = (without(weight, scores, density) for scores in (weight, chance))
                sizes = {
                    "smallest gone": coded(small, small, bits),
                    "smallest gone, grid of the dense": coded(small, weight, bits),
                    "random ones gone": coded(random, random, bits),
                }
                table[f"{name}, {bits} bits, {density} %"] = {how: round(n / dense, 4) for how, n in sizes.items()}
    got, how, worst = max((ratio, how, name) for name, row in table.items() for how, ratio in row.items())
    at_half = [row["smallest gone"] for name, row in table.items() if "50 %" in name]
    note = (
        f"largest at {worst} of weights left, {how}; codes of 4 and 8 bits per channel, {len(table)} tensors each pruned in "
        f"{len(next(iter(table.values())))} ways; at 50 %, smallest gone: {min(at_half):.2f} to {max(at_half):.2f}"
    )
    record(NAME, "pruning.sparse_bytes", round(got, 3), 1, note, table)


def without(weight: Tensor, scores: Tensor, density: int) -> Tensor:
    """Return the weight with zeros but for the given per cent of it with the largest scores."""
    return weight.masked_fill(~masks_at({"": scores}, 1 - density / 100, "layer")[""], 0.0)


def tensors() -> dict[str, Tensor]:
    """Return the weights of a trained LeNet-300-100, and a random tensor `[400, 300]` with Laplace values."""
    model = original("lenet300", 0, lenet300, data(), TRAINING)
    found = {f"lenet300 {name}": value.detach() for name, value in model.named_parameters() if value.dim() == 2}
    uniform = torch.rand(400, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    return {**found, "laplace": laplace.float()}


def coded(weight: Tensor, fitted: Tensor, bits: int) -> int:
    """Return the bytes of a weight's codes on the grid, of one step a channel, that is fitted to a tensor."""
    return len(encode_tensor(to_codes(weight, grid_scale(fitted, bits, per_channel=True), bits)))


if __name__ == "__main__":
    main()
