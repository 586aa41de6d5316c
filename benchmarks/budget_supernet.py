"""Supernets of ResNet-20 and of a small Transformer on spoken digits: subnets against the same networks trained alone.

Alone: the same channels and blocks of the trained original, the same epochs, the original as teacher in both. Three subnets: the
smallest, and two random ones. Every finished training is kept, and a killed one goes on from its last epoch. The front is of
`FRONT` subnets, scored on 1,000 validation samples without retraining.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/budget_supernet.py resnet20|transformer SEED... [--epochs N]
        [--part alone|within]

With a part, trains that and records nothing, so that both may run side by side.
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
PARTS = ("alone", "within")
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
    parser.add_argument("--part", choices=PARTS)
    asked = parser.parse_args()
    network, epochs = asked.network, asked.epochs or EPOCHS[asked.network]
    for seed in asked.seeds:
        bench = Bench(network, seed, epochs)
        for part, train in zip(PARTS, (bench.alone, bench.within), strict=True):
            if asked.part in (None, part):
                train()
    if asked.part:
        return
    cells = kept(NAME)[f"{network}, {epochs} epochs"]
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


class Bench:
    """The subnets of one network and seed, trained alone and within the supernet."""

    def __init__(self, network: str, seed: int, epochs: int) -> None:
        self.network, self.seed, self.epochs = network, seed, epochs
        self.task = _task(network, seed)
        folder = cache() / f"supernet-{network}-{seed}-{epochs}.run"
        teacher, step = copy.deepcopy(self.task.model).to(device()), f"{network} {seed}"
        self.context = Context(self.task.data, teacher, device(), seed, workspace=folder, step=step, report=_say)
        self.supernet = Supernet(self.task.model, self.context)
        draw = random.Random(seed)  # noqa: S311
        sampled = (self.supernet.sampled(draw) for _ in range(SUBNETS - 1))
        self.subnets = [self.supernet.smallest, *sampled]

    @property
    def cells(self) -> dict[str, Any]:
        """What is known."""
        return dict(kept(NAME).get(f"{self.network}, {self.epochs} epochs", {}))

    def keep(self, **found: Any) -> None:
        """Store what was found beside what another process may have."""
        keep(NAME, {**kept(NAME), f"{self.network}, {self.epochs} epochs": self.cells | found})

    def alone(self) -> None:
        """Train each subnet by itself, where that is missing."""
        whole = structure(self.task.model, self.task.data).macs or 1
        for place, subnet in enumerate(self.subnets):
            key = f"{self.seed} {place}"
            if f"{key} alone" in self.cells:
                continue
            start = self.supernet.extracted(subnet).model
            macs = structure(start, self.task.data).macs or 0
            technique = Distill(epochs=self.epochs, learning_rate=RATES[self.network])
            model = run(technique, start, replace(self.context, step=f"alone {place}")).model.cpu()
            found = evaluate(model, self.task.data, "test").value
            self.keep(**{f"{key} macs": macs / whole, f"{key} alone": found})

    def within(self) -> None:
        """Train the supernet, score the subnets in it, and the front."""
        missing = [place for place in range(SUBNETS) if f"{self.seed} {place} within" not in self.cells]
        fronts = "front" not in self.cells and self.epochs == EPOCHS[self.network]
        if missing or fronts:
            self._train()
        for place in missing:
            model = self.supernet.extracted(self.subnets[place]).model.cpu()
            self.keep(**{f"{self.seed} {place} within": evaluate(model, self.task.data, "test").value})
        if fronts:
            self._front()

    def _train(self) -> None:
        """Train the supernet, or read it from the cache if it was trained before."""
        path = cache() / f"supernet-{self.network}-{self.seed}-{self.epochs}.safetensors"
        if path.exists():
            load_model(self.supernet.model, path)
            return
        self.supernet.train(self.epochs, RATES[self.network])
        save_model(self.supernet.model, str(path.with_suffix(".part")))
        path.with_suffix(".part").rename(path)

    def _front(self) -> None:
        """Score random subnets without retraining, and keep the front of multiply-adds and accuracy."""
        held: Any = self.task.data.validate
        some = torch.randperm(len(held.dataset), generator=torch.Generator().manual_seed(0))[:IMAGES]
        inputs, labels = (tensor[some] for tensor in held.dataset.tensors)
        data = replace(self.task.data, validate=tensor_loader(inputs, labels, 500))
        scored, draw = dict(self.cells.get("scored", {})), random.Random(0)  # noqa: S311
        wanted: dict[str, Subnet] = {}
        while len(wanted) < FRONT:
            subnet = self.supernet.sampled(draw)
            wanted[f"{' '.join(map(str, subnet.counts))} {' '.join(subnet.skipped)}"] = subnet
        for index, (key, subnet) in enumerate(wanted.items()):
            if key not in scored:
                model = self.supernet.extracted(subnet).model.cpu()
                scored[key] = [structure(model, data).macs, evaluate(model, data, "validate").value]
                if index % 20 == 0:
                    self.keep(scored=scored)
        points = [(float(macs), -score) for macs, score in scored.values()]
        front = sorted(point for point, (level, _) in zip(points, ranks(points), strict=True) if level == 0)
        told = [{"multiply-adds": int(macs), "validation accuracy": round(-loss, 4)} for macs, loss in front]
        self.keep(scored=scored, front=told)


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
