"""Evaluation mode: for a while, each module's own mode being put back whatever happens, and of a copy that is only asked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_LAYERS = ("torch.", "featherweight.layers.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block with the model in evaluation mode and without gradients; its modes are restored, also on error.

    Overridden `eval` and `train` methods are not called, since they may do more than set the mode.
    """
    with _modes(model, lambda _: False), torch.no_grad():
        yield


@contextmanager
def branching(model: nn.Module) -> Iterator[None]:
    """Run a block without gradients where forwards go the way that they go in training, and layers of PyTorch stay in evaluation mode.

    So statistics stay, nothing is dropped, and what a forward asks `self.training` for can be seen. Random draws leave no trace.
    """
    with (
        _modes(model, lambda module: not type(module).__module__.startswith(_LAYERS)),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        yield


@contextmanager
def _modes(model: nn.Module, trains: Callable[[nn.Module], bool]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = trains(module)
        yield
    finally:
        for module, training in modes:
            module.training = training


def answering(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a model that is only asked, as a teacher is: in evaluation mode, its convolutions' weights channels-last.

    That answers 1.3 to 4 times as fast on a CPU. Training does not gain everywhere, so what is trained keeps its own layout.

    Args:
        model: is not changed.
        device: of the copy.
    """
    copied = copy.deepcopy(model).to(device).eval()
    for parameter in copied.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return copied
