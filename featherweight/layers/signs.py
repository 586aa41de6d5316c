"""Signs of values, and the functions whose gradients stand for theirs, which are zero almost everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_TERMS = 2  # of the Fourier series


def _polynomial(values: Tensor) -> Tensor:
    return 2 * values - values * values.abs()


def _frequency(values: Tensor) -> Tensor:
    odd = (2 * term + 1 for term in range(_TERMS))
    return sum((torch.sin(n * math.pi / 2 * values) / n for n in odd), torch.zeros_like(values)) * (4 / math.pi)


SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "straight_through": lambda values: values,
    "polynomial": _polynomial,
    "frequency": _frequency,
}
"""Odd functions on -1 to 1 whose gradients pass a sign; beyond, nothing passes.

`straight_through`: the identity (Courbariaux et al., BinaryNet, 2016). `polynomial`: two parabolas with slope 2 at zero and 0
at the ends (Liu et al., Bi-Real Net, ECCV 2018). `frequency`: the first terms of the Fourier series of a square wave of
period 4 (Xu et al., "Learning Frequency Domain Approximation for Binary Neural Networks", NeurIPS 2021).
"""


def sign(values: Tensor, gradient: str = "straight_through") -> Tensor:
    """Return -1 below zero and 1 elsewhere, any shape, with the gradient of a function in `SURROGATES`.

    Raises:
        KeyError: there is no such function.
    """
    signs = torch.where(values < 0, -1.0, 1.0).to(values.dtype)
    if not values.requires_grad:
        return signs
    smooth = SURROGATES[gradient](values.clamp(-1.0, 1.0))
    return smooth + (signs - smooth).detach()
