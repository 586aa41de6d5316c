"""Seconds to find the coupled groups of ResNet-56, torch-pruning 1.6.1's dependency graph beside it, interleaved.

Needs the extra `bench`. Run `python benchmarks/pruning_groups.py`.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch_pruning
from networks import resnet
from results import record

from featherweight.graph import coupled_groups

ROUNDS = 5


def main() -> None:
    """Time both in turn and write the row."""
    torch.manual_seed(0)
    example = torch.randn(1, 3, 32, 32)
    ours, theirs, groups, reference = [], [], 0, 0
    for _ in range(ROUNDS):
        model = resnet(56)
        start = time.perf_counter()
        groups = len(coupled_groups(model, (example,))[0])
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
        reference = sum(1 for _ in graph.get_all_groups(root_module_types=[torch.nn.Conv2d, torch.nn.Linear]))
        theirs.append(time.perf_counter() - start)
    note = (
        f"ResNet-56, 55 convolutions, median of {ROUNDS} interleaved rounds, quickest {min(ours):.2f} s, first {ours[0]:.2f} s; "
        f"torch-pruning 1.6.1: {statistics.median(theirs):.2f} s, quickest {min(theirs):.2f} s; groups {groups} and {reference}"
    )
    record("pruning_groups", "pruning.groups.seconds", round(statistics.median(ours), 2), 1, note)


if __name__ == "__main__":
    main()
