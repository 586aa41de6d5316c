"""LeNet-300-100 on full MNIST at 95 % sparsity, and the bytes of its pruned tensors against the dense ones.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/pruning_lenet300.py

Each seed trains its own original. A seed that is done is kept.
"""

from __future__ import annotations

import statistics

import torch
from results import keep, kept, record
from torch import Tensor

from featherweight import Context, run
from featherweight.coding import encode_tensor
from featherweight.scoring import evaluate
from featherweight.tasks.mnist import lenet300_task
from featherweight.techniques import PruneWeights
from featherweight.techniques.rounding import grid_scale, to_codes
from featherweight.techniques.scores import masks_at

NAME = "pruning_lenet300"
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.59)


def main() -> None:
    """Run the seeds that are missing, and write the rows."""
    done = kept(NAME)
    for seed in range(3):
        if str(seed) in done:
            continue
        task = lenet300_task(seed)
        context = Context(data=task.data, teacher=task.model, seed=seed)
        pruned = run(PruneWeights(ratio=0.95, epochs=20, learning_rate=2e-3), task.model, context).model
        weights = {name: value for name, value in pruned.named_parameters() if value.dim() == 2}
        zeros = sum(int((value == 0).sum()) for value in weights.values()) / sum(map(torch.numel, weights.values()))
        before, after = evaluate(task.model, task.data, "test"), evaluate(pruned, task.data, "test")
        dense = {name: value.detach() for name, value in task.model.named_parameters() if value.dim() == 2}
        ratios = {
            f"{bits} bits, density {density}": _ratio(dense, density, bits) for bits in (4, 8) for density in DENSITIES
        }
        done[str(seed)] = {"before": before.value, "after": after.value, "sparsity": zeros, "bytes": ratios}
        keep(NAME, done)
    drops = [100 * (row["before"] - row["after"]) for row in done.values()]
    note = (
        f"points of test accuracy by seed: {', '.join(f'{drop:.2f}' for drop in drops)}; originals "
        f"{', '.join(format(row['before'], '.4f') for row in done.values())}; share of zeros {done['0']['sparsity']:.4f}"
    )
    record(NAME, "pruning.lenet300.s95.drop", round(statistics.mean(drops), 3), len(done), note)
    worst = max((value, name) for row in done.values() for name, value in row["bytes"].items())
    note = (
        f"largest over 4 and 8 bits and {len(DENSITIES)} densities below 60 % of LeNet-300-100's weights: at {worst[1]}"
    )
    record(
        NAME,
        "pruning.sparse_bytes",
        round(worst[0], 4),
        len(done),
        note,
        {seed: row["bytes"] for seed, row in done.items()},
    )


def _ratio(weights: dict[str, Tensor], density: float, bits: int) -> float:
    """Largest ratio over the tensors: coded bytes of the pruned one over those of the dense one, same bits, same coder."""
    masks = masks_at(weights, 1 - density, "layer")
    ratios = []
    for name, weight in weights.items():
        scale = grid_scale(weight, bits, per_channel=False)
        dense, sparse = (to_codes(value, scale, bits) for value in (weight, weight.masked_fill(~masks[name], 0.0)))
        ratios.append(len(encode_tensor(sparse)) / len(encode_tensor(dense)))
    return max(ratios)


if __name__ == "__main__":
    main()
