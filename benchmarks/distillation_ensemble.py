"""LetterRecognition: ten networks as one teacher, and one network of a hundredth of their float32 bytes that follows them.

    python benchmarks/distillation_ensemble.py

The student sees the training inputs and synthetic ones (MUNGE), all labelled by
the ensemble alone. The ensemble is one for all seeds; the seeds are those of the students and of the synthetic inputs.
What is done is kept, and a killed training goes on from its last epoch.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys

import torch
from letters import ATTRIBUTES, BATCH, CLASSES, TRAINING, data, mlp
from originals import original
from results import keep, kept, record
from torch import Tensor, nn

from featherweight import Data
from featherweight.data import batches
from featherweight.ensembles import ensemble
from featherweight.scoring import evaluate
from featherweight.synthetic import munge
from featherweight.tasks.training import tensor_loader
from featherweight.techniques.imitation import imitation
from featherweight.techniques.train import Training

NAME = "distillation_ensemble"
MEMBERS, SEEDS = 10, 3
MULTIPLIER, SWAP, VARIANCE = 12, 0.3, 1.0
LEARNING = Training(epochs=60, learning_rate=1e-2, weight_decay=1e-4)
TEMPERATURE = 1.0


def student() -> nn.Module:
    """Return the untrained student 16-68-68-26, ReLU; 7,642 parameters."""
    return nn.Sequential(nn.Linear(ATTRIBUTES, 68), nn.ReLU(), nn.Linear(68, 68), nn.ReLU(), nn.Linear(68, CLASSES))


def teacher(members: int = MEMBERS, training: Training = TRAINING) -> nn.Module:
    """Return the ensemble of the baselines, each trained under a seed of its own."""
    letters = data(BATCH)
    return ensemble(original("letters_mlp", seed, mlp, letters, training) for seed in range(members)).eval()


def labelled(inputs: Tensor, model: nn.Module) -> Tensor:
    """Return the model's logits `[n, classes]` for all inputs."""
    with torch.no_grad():
        return torch.cat([model(part) for part in inputs.split(4096)])


def lesson(model: nn.Module, seed: int, multiplier: int = MULTIPLIER) -> Data:
    """Return data whose training targets are the ensemble's logits, for the training inputs and synthetic ones."""
    letters = data(BATCH)
    inputs = torch.cat([part for part, _ in batches(letters.calibrate, "calibrate")])
    pool = torch.cat([inputs, munge(inputs, multiplier, SWAP, VARIANCE, seed)])
    train = tensor_loader(pool, labelled(pool, model), 4 * BATCH, shuffle=True)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return imitation(output, target, "classes", TEMPERATURE)

    return dataclasses.replace(letters, train=train, loss=loss)


def main() -> None:
    """Train what is missing, and write the row."""
    done = kept(NAME)
    letters, wise = data(BATCH), teacher()
    whole = evaluate(wise, letters, "test")
    members = [evaluate(member, letters, "test").value for member in wise.get_submodule("members").children()]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (wise, student())]
    for seed in range(SEEDS):
        if str(seed) not in done:
            small = original(f"letters_student_{MULTIPLIER}_{SWAP}", seed, student, lesson(wise, seed), LEARNING)
            score = evaluate(small, letters, "test")
            done[str(seed)] = {
                "score": score.value,
                "drop": whole.value - score.value,
                "error": whole.drop_error(score),
            }
            keep(NAME, done)
    drops = [100 * row["drop"] for row in done.values()]
    note = (
        f"mean of {', '.join(f'{drop:.2f}' for drop in drops)} by seed; test accuracy of the ensemble {whole.value:.4f}, of its "
        f"members {min(members):.4f} to {max(members):.4f}, of the students "
        f"{', '.join(format(row['score'], '.4f') for row in done.values())}; float32 bytes {4 * sizes[0]:,} to {4 * sizes[1]:,}, "
        f"{sizes[0] / sizes[1]:.1f}x; {MULTIPLIER} synthetic samples for each of training, labelled by the ensemble alone; one "
        "ensemble for all seeds"
    )
    record(NAME, "distillation.ensemble.drop", round(statistics.mean(drops), 3), len(done), note, done)
    sys.stderr.write(f"{note}\n")


if __name__ == "__main__":
    main()
