"""PyTorch itself, operator by operator: the baseline that latencies are shown beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as pytree

from featherweight.data import tensors
from featherweight.errors import DataError, ExportError
from featherweight.runtimes.protocol import FLOAT32, Program, Runtime, Subject, first_line, in_order, program_of, quiet


class Eager(Runtime):
    """PyTorch without a compiler; layers of integer codes compute with floats here."""

    package = "torch"
    about: ClassVar[str] = "eager PyTorch, the baseline that latencies are shown beside"
    from_module = True

    def export(self, subject: Subject, folder: Path) -> Path:
        """Write `model.pt2`, PyTorch's own exported program."""
        path = folder / "model.pt2"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with quiet():
                torch.export.save(program_of(subject, self), path)
        except OSError as error:
            raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
        return path

    def load(self, path: Path, threads: int = 1) -> Program:
        """Load `model.pt2`; threads are PyTorch's own setting."""
        try:
            with quiet():
                program = torch.export.load(path)
        except Exception as error:  # the reader raises whatever it finds
            raise ExportError(f"PyTorch cannot load {path}: {first_line(error)}") from error
        module, spec = program.module(), program.call_spec.in_spec

        def call(*given: torch.Tensor) -> Any:
            args, kwargs = pytree.tree_unflatten(given, spec)
            return module(*args, **kwargs)

        return Callables(call, dict.fromkeys((name for name, _ in module.named_modules() if name), FLOAT32))


class Callables(Program):
    """A function of the model's tensors, in order, that PyTorch executes.

    Args:
        call: the function; it returns tensors in any structure.
        layers: how it computes each layer, by path.
    """

    def __init__(self, call: Callable[..., Any], layers: dict[str, str]) -> None:
        self._call = call
        self._layers = layers

    def prepared(self, inputs: Any) -> Callable[[], list[Any]]:
        """Return a call that computes the outputs of these inputs."""
        given = [torch.from_numpy(array) for array in in_order(inputs)]

        def call() -> list[Any]:
            with torch.inference_mode():
                made: Iterable[torch.Tensor] = tensors(self._call(*given))
                return list(made)

        try:
            call()
        except Exception as error:  # whatever the model raises
            shapes = ", ".join(f"{value.dtype}{list(value.shape)}" for value in given)
            raise DataError(f"the model was given {shapes}: {first_line(error)}") from error
        return call

    def audit(self) -> dict[str, str]:
        """Return how each layer is computed, by path."""
        return self._layers
