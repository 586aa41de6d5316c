"""Every draw of a training epoch from a seed of its own, and the caller's generators as they were afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and random for a while; the caller's generators are put back as they were."""
    state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


@contextmanager
def reseeded(loader: Any, seed: int) -> Iterator[None]:
    """Seed the loader's own generator for a while, if it has one; what it was is put back."""
    generator = getattr(loader, "generator", None) or getattr(getattr(loader, "sampler", None), "generator", None)
    if not isinstance(generator, torch.Generator):
        yield
        return
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
