"""A training that is killed in the middle, and started again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from featherweight import Context, Task, run
from featherweight.technique import Technique


class Failing(list):
    """A loader whose reading number `at` fails."""

    def __init__(self, batches: list, at: int) -> None:
        super().__init__(batches)
        self.reads, self.at = 0, at

    def __iter__(self):
        """Count the readings."""
        self.reads += 1
        if self.reads == self.at:
            raise KeyboardInterrupt
        return super().__iter__()


def resumes_to_the_same_weights(technique: Technique, task: Task, folder: Path, at: int) -> None:
    """Check that a technique whose epoch fails goes on from a checkpoint, and ends as if nothing had been.

    Args:
        technique: of 8 epochs.
        task: whose batches are a list.
        folder: for checkpoints.
        at: number of the reading that fails, among the epochs.
    """
    whole, _ = run(technique, task.model, Context(data=task.data, teacher=task.model, seed=1))
    failing = Failing(task.data.train, at)
    data = dataclasses.replace(task.data, train=failing)
    context = Context(data=data, teacher=task.model, seed=1, workspace=folder)
    with pytest.raises(KeyboardInterrupt):
        run(technique, task.model, context)
    assert list(folder.glob("train-*.safetensors"))
    resumed, _ = run(technique, task.model, context)
    assert failing.reads < at + 8, "it went on where it was"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
