"""One long lesson: augmented batches in a fixed order with the teacher's answers beside the labels, computed once."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from originals import cache, device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featherweight import Data
from featherweight.edits import named_tensors
from featherweight.modes import evaluating
from featherweight.techniques.imitation import imitation
from featherweight.techniques.seeding import seeded


class Lesson:
    """Batches of `passes` passes over a loader, the same at every reading: `(inputs, [n, 1 + classes])`."""

    def __init__(self, loader: Any, teacher: nn.Module, passes: int, seed: int) -> None:
        self.loader, self.passes, self.seed = loader, passes, seed
        digest = hashlib.sha256(f"{passes} {seed} {len(loader)}".encode())
        for tensor in named_tensors(teacher).values():
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        path = cache() / f"lesson-{digest.hexdigest()[:12]}.safetensors"
        if not path.exists():
            teacher = copy.deepcopy(teacher).to(device())
            with evaluating(teacher):
                answers = torch.cat([teacher(inputs.to(device())).float().cpu() for inputs, _ in self._drawn()])
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")  # another process may want the same
            save_file({"answers": answers}, part)
            os.replace(part, path)
        self.answers = load_file(path)["answers"]

    def _drawn(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self.passes):
            with seeded(1000 * self.seed + index):
                yield from self.loader

    def __len__(self) -> int:
        return self.passes * len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for inputs, labels in self._drawn():
            answers = self.answers[start : start + len(labels)].to(labels.device)
            start += len(labels)
            yield inputs, torch.cat((labels[:, None].float(), answers), 1)


def taught(
    data: Data, teacher: nn.Module, passes: int, seed: int, share: float = 0.7, temperature: float = 3.0
) -> Data:
    """Return the data with a lesson of `passes` passes as its one training epoch, and the loss of healing with a teacher.

    Args:
        data: with a training loader that draws its augmentation from torch's generator.
        teacher: gives the answers, in evaluation mode; they are kept in the benchmarks' cache.
        passes: over the training data.
        seed: of order and augmentation; two students of one seed see the very same batches.
        share: of the teacher in the loss; the rest are the labels.
        temperature: of the soft targets.
    """

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if target.dim() == 1:  # validation batches hold labels alone
            return F.cross_entropy(output, target)
        labels, answers = target[:, 0].long(), target[:, 1:]
        return (1 - share) * F.cross_entropy(output, labels) + share * imitation(output, answers, True, temperature)

    return replace(data, train=Lesson(data.train, teacher, passes, seed), loss=loss)
