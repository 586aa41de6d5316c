"""Supernets of ResNet-20 and of a small Transformer on spoken digits: subnets against the same networks trained alone.

Alone: the same channels and blocks of the trained original, the same epochs, the original as teacher in both. Three subnets: the
smallest, and two random ones. Every finished training is kept, and a killed one goes on from its last epoch. The front is of
`FRONT` subnets, scored on 1,000 validation samples without retraining.

FEATHERWEIGHT_DATA=../shared/data python benchmarks/budget_supernet.py resnet20|transformer SEED... [--epochs N]
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from networks import EncoderLayer
from originals import cache, device, original, trainer
from results import keep, kept, record
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from featherweight import Context, Data, Task
from featherweight.measurement import structure
from featherweight.running import run
from featherweight.scoring import evaluate
from featherweight.study import ranks
from featherweight.supernet import Subnet, Supernet
from featherweight.tasks.training import tensor_loader
from featherweight.techniques import Distill
from featherweight.techniques.train import Training

NAME, FRONT, SUBNETS = "budget_supernet", 1000, 3
EPOCHS = {"resnet20": 15, "transformer": 60}
RATES = {"resnet20": 2e-3, "transformer": 2e-3}
IMAGES = 1000


class Listener(nn.Module):
    """Four pre-norm layers of width 64 with 4 heads over frames `[batch, time, 40]`, their mean, ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(40, 64)
        self.layers = nn.Sequential(*(EncoderLayer(64, 4) for _ in range(4)))
        self.norm, self.leave = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, frames: Tensor) -> Tensor:
        """Return `[batch, 10]`."""
        return self.leave(self.norm(self.layers(self.enter(frames))).mean(1))


def main() -> None:
    """Train what is missing and write the rows."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("network", choices=EPOCHS)
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--epochs", type=int)
    asked = parser.parse_args()
    network, epochs = asked.network, asked.epochs or EPOCHS[asked.network]
    partial = kept(NAME)
    cells = partial.setdefault(f"{network} {epochs}", {})
    for seed in asked.seeds:
        _cells(network, seed, epochs, cells, partial)
    gaps = {
        place: [100 * (cells[f"{seed} {place} alone"] - cells[f"{seed} {place} within"]) for seed in asked.seeds]
        for place in range(SUBNETS)
    }
    worst = max(gaps, key=lambda place: mean(gaps[place]))
    told = "; ".join(
        f"{cells[f'{asked.seeds[0]} {place} macs']:.0%} of the multiply-adds: alone "
        f"{mean(cells[f'{seed} {place} alone'] for seed in asked.seeds):.4f}, within "
        f"{mean(cells[f'{seed} {place} within'] for seed in asked.seeds):.4f}"
        for place in range(SUBNETS)
    )
    note = f"the largest gap of {SUBNETS} subnets, test accuracy, {epochs} epochs each, trained on {trainer()}; {told}"
    details = {"table": cells.get("front", [])} if cells.get("front") else None
    if epochs == EPOCHS[network]:
        record(NAME, f"budget.supernet.{network}.gap", round(mean(gaps[worst]), 4), len(asked.seeds), note, details)
    sys.stdout.write(note + "\n")


def _cells(network: str, seed: int, epochs: int, cells: dict[str, Any], partial: dict[str, Any]) -> None:
    """Fill in what is missing of one seed."""
    task = _task(network, seed)
    folder = cache() / f"supernet-{network}-{seed}-{epochs}.run"
    teacher = copy.deepcopy(task.model).to(device())
    context = Context(task.data, teacher, device(), seed, workspace=folder, step=f"{network} {seed}", report=_say)
    untrained = Supernet(task.model, context)
    draw = random.Random(seed)  # noqa: S311
    subnets = [untrained.smallest, *(untrained.sampled(draw) for _ in range(SUBNETS - 1))]
    whole = structure(task.model, task.data).macs or 1
    for place, subnet in enumerate(subnets):
        if f"{seed} {place} alone" in cells:
            continue
        start = untrained.extracted(subnet).model
        cells[f"{seed} {place} macs"] = (structure(start, task.data).macs or 0) / whole
        alone = run(
            Distill(epochs=epochs, learning_rate=RATES[network]), start, replace(context, step=f"alone {place}")
        )
        cells[f"{seed} {place} alone"] = evaluate(alone.model.cpu(), task.data, "test").value
        keep(NAME, partial)
    trained = _trained(network, seed, epochs, task, context)
    for place, subnet in enumerate(subnets):
        if f"{seed} {place} within" not in cells:
            cells[f"{seed} {place} within"] = evaluate(trained.extracted(subnet).model.cpu(), task.data, "test").value
            keep(NAME, partial)
    if "front" not in cells and epochs == EPOCHS[network]:
        _front(trained, task, cells, partial)


def _trained(network: str, seed: int, epochs: int, task: Task, context: Context) -> Supernet:
    """The trained supernet, from the cache if it was trained before."""
    path = cache() / f"supernet-{network}-{seed}-{epochs}.safetensors"
    supernet = Supernet(task.model, context)
    if path.exists():
        load_model(supernet.model, path)
    else:
        supernet.train(epochs, RATES[network])
        save_model(supernet.model, str(path.with_suffix(".part")))
        path.with_suffix(".part").rename(path)
    return supernet


def _front(supernet: Supernet, task: Task, cells: dict[str, Any], partial: dict[str, Any]) -> None:
    """Score random subnets without retraining, and keep the front of multiply-adds and accuracy."""
    some = torch.randperm(len(task.data.validate.dataset), generator=torch.Generator().manual_seed(0))[:IMAGES]  # type: ignore[union-attr]
    inputs, labels = (tensor[some] for tensor in task.data.validate.dataset.tensors)  # type: ignore[union-attr]
    data = replace(task.data, validate=tensor_loader(inputs, labels, 500))
    scored, draw = cells.setdefault("scored", {}), random.Random(0)  # noqa: S311
    wanted: dict[str, Subnet] = {}
    while len(wanted) < FRONT:
        subnet = supernet.sampled(draw)
        wanted[f"{' '.join(map(str, subnet.counts))} {' '.join(subnet.skipped)}"] = subnet
    for index, (key, subnet) in enumerate(wanted.items()):
        if key not in scored:
            model = supernet.extracted(subnet).model.cpu()
            scored[key] = [structure(model, data).macs, evaluate(model, data, "validate").value]
            if index % 20 == 0:
                keep(NAME, partial)
    points = [(float(macs), -score) for macs, score in scored.values()]
    front = sorted(point for point, (level, _) in zip(points, ranks(points), strict=True) if level == 0)
    cells["front"] = [{"multiply-adds": int(macs), "validation accuracy": round(-loss, 4)} for macs, loss in front]
    keep(NAME, partial)


def _task(network: str, seed: int) -> Task:
    if network == "resnet20":
        from cifar import task

        return task(network, seed)
    from speech import data

    spoken: Data = data()
    training = Training(epochs=60, learning_rate=2e-3, weight_decay=0.05)
    return Task(original("listener", seed, Listener, spoken, training), spoken, network)


def _say(message: str, _: float) -> None:
    sys.stderr.write(message + "\n")


if __name__ == "__main__":
    main()
