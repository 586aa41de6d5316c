"""The precision of forward passes in training: bfloat16 as the environment says, otherwise where it pays."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from featherweight.data import rebuild, tensors
from featherweight.errors import RecipeError

_ASKED = "FEATHERWEIGHT_TRAINING"  # the environment variable that decides instead of the device


class Autocast:
    """Runs forward passes of a training in bfloat16, or leaves them in float32.

    A forward that has operators which cannot mix both (bilinear layers, writes into a tensor of its own) goes on in float32,
    unless the environment asks for bfloat16.

    Args:
        model: to be trained.
        device: that it is trained on.

    Raises:
        RecipeError: the environment names no such precision.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        asked = os.environ.get(_ASKED, "auto")
        if asked not in ("auto", "float32", "bfloat16"):
            raise RecipeError(f"{_ASKED} is {asked!r}; it may be auto, float32 or bfloat16")
        self._device = device
        self._asked = asked == "bfloat16"
        self._on = self._asked or (asked == "auto" and _pays(model, device))

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a call gives, its tensors in float32, as losses want them.

        Args:
            call: a forward pass.
            arguments: of the call.
        """
        if not self._on:
            return call(*arguments)
        try:
            with torch.autocast(self._device.type, torch.bfloat16):
                output = call(*arguments)
        except RuntimeError:
            if self._asked:
                raise
            output = call(*arguments)  # raises what has nothing to do with precision
            self._on = False
        return rebuild(output, [value.float() for value in tensors(output)])


def _pays(model: nn.Module, device: torch.device) -> bool:
    """Whether bfloat16 trains faster: on GPUs, on CPUs with matrix units, and where convolutions lie channels-last.

    With plain AVX-512, ResNet-56 and VGG-19 gained 1.5 times laid out like this, and everything else lost.
    """
    if device.type != "cpu":
        return device.type == "cuda"
    can = torch.cpu.get_capabilities()
    if can.get("amx_bf16", False):
        return True
    last = torch.channels_last
    lies = any(
        p.dim() == 4 and p.is_contiguous(memory_format=last) and not p.is_contiguous() for p in model.parameters()
    )
    return lies and bool(can.get("avx512_bf16", False))
