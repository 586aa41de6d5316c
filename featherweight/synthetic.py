"""Unlabelled samples made out of those there are, for a teacher to label: MUNGE for tables, mixup for images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.data import Inputs, Loader, rebuild, split_batch, tensors
from featherweight.errors import DataError

_CHUNK = 1024  # rows whose distances to all others are held at once


def munge(
    inputs: Tensor,
    multiplier: int,
    swap: float = 0.5,
    variance: float = 1.0,
    seed: int = 0,
    nominal: Sequence[int] = (),
) -> Tensor:
    """Return samples that stay near the data: each takes some attributes from its nearest neighbour, blurred.

    With chance `swap` an attribute `a` becomes a draw from a normal distribution around the neighbour's value `b` of standard
    deviation `|a - b| / variance`; a nominal one becomes `b`. Every sample is changed in its own turn only, where the paper
    changes both of the pair at each. Bucila, Caruana & Niculescu-Mizil, "Model Compression", KDD 2006.

    Args:
        inputs: `[n, attributes]`, floats, two samples or more.
        multiplier: passes over the data, 1 or more.
        swap: 0 to 1; 0.2 to 0.75 in the paper.
        variance: above 0; more keeps nearer to the neighbour's value.
        seed: of the draws.
        nominal: columns whose values are names: they count as the same or not in distances, and are never blurred.

    Returns:
        `[multiplier * n, attributes]`, the original samples not among them.

    Raises:
        DataError: `inputs` is no table of two rows or more, or a setting is out of range.
    """
    if inputs.dim() != 2 or len(inputs) < 2 or not inputs.is_floating_point():
        raise DataError(
            f"munge wants a float table [n, attributes] of two rows or more, not {inputs.dtype} {list(inputs.shape)}"
        )
    if multiplier < 1 or not 0 <= swap <= 1 or variance <= 0:
        raise DataError(
            f"munge: multiplier={multiplier} must be 1 or more, swap={swap} from 0 to 1, variance={variance} above 0"
        )
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.zeros(inputs.shape[1], dtype=torch.bool)
    fixed[list(nominal)] = True
    others = inputs[_nearest(inputs, fixed)]
    spread = (inputs - others).abs() / variance * ~fixed
    made = []
    for _ in range(multiplier):
        chosen = torch.rand(inputs.shape, generator=generator) < swap
        drawn = others + spread * torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
        made.append(torch.where(chosen, drawn, inputs))
    return torch.cat(made)


def _nearest(inputs: Tensor, nominal: Tensor) -> Tensor:
    """The index of each row's nearest other row, columns scaled to 0 to 1, nominal ones different by 1 or 0."""
    numbers = inputs[:, ~nominal]
    low, high = numbers.amin(0), numbers.amax(0)
    numbers = (numbers - low) / (high - low).clamp_min(torch.finfo(inputs.dtype).tiny)
    names = inputs[:, nominal]
    found = []
    for start in range(0, len(inputs), _CHUNK):
        rows = slice(start, start + _CHUNK)
        apart = torch.cdist(numbers[rows], numbers, compute_mode="donot_use_mm_for_euclid_dist").square()
        for column in range(names.shape[1]):
            apart += names[rows, column, None] != names[:, column]
        own = torch.arange(len(apart))
        apart[own, start + own] = torch.inf
        found.append(apart.argmin(1))
    return torch.cat(found)


class Mixed:
    """A loader of mixed samples without labels; made by `mixed`."""

    def __init__(self, loader: Loader, alpha: float, seed: int) -> None:
        if alpha <= 0:
            raise DataError(f"mixed: alpha={alpha} must be above 0")
        self.loader, self.alpha = loader, alpha
        own = getattr(loader, "generator", None) or getattr(getattr(loader, "sampler", None), "generator", None)
        # under this name training seeds it anew at each epoch, and with it the order of the samples
        self.generator = own if isinstance(own, torch.Generator) else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Inputs]:
        for batch in self.loader:
            inputs, _ = split_batch(batch)
            parts = list(tensors(inputs))
            order = torch.randperm(len(parts[0]), generator=self.generator).to(parts[0].device)
            draw = int(torch.randint(2**62, (), generator=self.generator))
            weight = float(np.random.default_rng(draw).beta(self.alpha, self.alpha))
            mixes: list[Any] = [
                torch.lerp(part[order], part, weight) if part.is_floating_point() else part for part in parts
            ]
            yield rebuild(inputs, mixes)


def mixed(loader: Loader, alpha: float = 1.0, seed: int = 0) -> Mixed:
    """Return a loader of `w x + (1 - w) y` for the samples `x` of each batch and others `y` of it, without labels.

    `w` is drawn from Beta(alpha, alpha) for each batch. The teacher labels them: Beyer et al., "Knowledge Distillation: A Good
    Teacher is Patient and Consistent", CVPR 2022; Zhang et al., "mixup", ICLR 2018.

    Args:
        loader: of batches; labels are dropped, and inputs that are no floats stay as they are.
        alpha: above 0; small ones mix little.
        seed: of the draws, outside training.

    Raises:
        DataError: `alpha` is 0 or less.
    """
    return Mixed(loader, alpha, seed)
