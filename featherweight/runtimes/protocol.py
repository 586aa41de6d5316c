"""What every runtime does: export a model to its files, load them, run them, and say how it computes each layer."""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from torch import Tensor
from torch.export import ExportedProgram

from featherweight.data import Inputs, tensors
from featherweight.descriptors import nowhere
from featherweight.errors import DataError, ExportError, need
from featherweight.integer_graph import layers

Array = np.ndarray[Any, Any]
INT8, BF16, FLOAT32, UNKNOWN = "int8", "bf16", "float32", "unknown"


@dataclass(frozen=True)
class Subject:
    """A model as runtimes take it.

    Attributes:
        onnx: the whole model as serialized ONNX, weights included; its layers' nodes are named by their paths.
        inputs: of one call, for runtimes that trace or plan for shapes.
        program: the same model as PyTorch exports it, for runtimes that start there; None where only the file is at hand.
    """

    onnx: bytes
    inputs: Inputs
    program: ExportedProgram | None = None

    def layers(self) -> dict[str, bool]:
        """Return the paths of the layers, and whether each asks to be computed with integers."""
        return layers(onnx.load_model_from_string(self.onnx))


class Program(ABC):
    """A model that one runtime has loaded."""

    @abstractmethod
    def prepared(self, inputs: Any) -> Callable[[], list[Any]]:
        """Return a call that computes the outputs of these inputs: what is timed, everything else done before.

        Args:
            inputs: a tensor or array, a tuple of them, or a mapping by name.

        Raises:
            DataError: a name, the number, the type or a shape does not fit the model.
        """

    @abstractmethod
    def audit(self) -> dict[str, str]:
        """Return how the runtime computes each layer, by path: `int8`, `bf16`, `float32`, read from its own compiled graph.

        A layer whose name the runtime has lost is listed under `?` and a number, in the order of the graph.
        """

    def run(self, inputs: Any) -> list[Array]:
        """Return the outputs, one array each.

        Args:
            inputs: as of `prepared`.

        Raises:
            DataError: as `prepared`.
        """
        return [np.asarray(value) for value in self.prepared(inputs)()]


class Runtime(ABC):
    """One way to execute a model: export, load, and with what was loaded run, time and audit.

    Attributes:
        package: the import that must be installed.
        extra: the extra of this package that installs it; empty when it always is.
        about: what it is good for, in a sentence.
        from_module: whether it starts from the exported program, so that a file alone is not enough.
        any_batch: whether what it exports takes any batch size; otherwise it takes the one of `Subject.inputs`.
        auto: whether `auto` tries it; not where every export compiles for long.
        clocked: whether `operators` tells how long each operator takes, which a latency budget on this runtime reads.
    """

    package: ClassVar[str]
    extra: ClassVar[str] = ""
    about: ClassVar[str]
    from_module: ClassVar[bool] = False
    any_batch: ClassVar[bool] = True
    auto: ClassVar[bool] = True
    clocked: ClassVar[bool] = False

    @abstractmethod
    def export(self, subject: Subject, folder: Path) -> Path:
        """Write the model into a folder in the runtime's own format, and return the path that `load` takes.

        Raises:
            ExportError: the package is missing, the runtime cannot express the model, or the folder cannot be written.
        """

    @abstractmethod
    def load(self, path: Path, threads: int = 1) -> Program:
        """Load what `export` wrote.

        Raises:
            ExportError: the package is missing, or the file is not this runtime's.
        """

    def operators(self, model: bytes, inputs: Any, calls: int = 30) -> dict[str, float]:
        """Return the seconds of each operator as the runtime itself times it on one thread, the mean of the fastest quarter of some calls.

        Args:
            model: serialized ONNX, weights included.
            inputs: of one call, as of `Program.prepared`.
            calls: how many, at least 1.

        Raises:
            ExportError: the runtime has no such clock, its package is missing, or it cannot load the model.
        """
        raise ExportError(f"{type(self).__name__} does not time single operators")

    def need(self, module: str = "") -> Any:
        """Import the runtime's package, without what it prints.

        Raises:
            ExportError: it is not installed; the message has the pip line.
        """
        with quiet():
            return need(module or self.package, self.extra, f"the runtime {type(self).__name__}")


def program_of(subject: Subject, runtime: Runtime) -> ExportedProgram:
    """Return the exported program of a subject.

    Raises:
        ExportError: only the file is at hand.
    """
    if subject.program is None:
        raise ExportError(
            f"{type(runtime).__name__} starts from the PyTorch module, and a file alone has none: give the task too, --task"
        )
    return subject.program


def fastest_quarter(values: list[float]) -> float:
    """Return the mean of the shortest quarter of some times: whatever else the machine does only ever adds to them."""
    return statistics.fmean(sorted(values)[: (len(values) + 3) // 4])


def by_name(names: tuple[str, ...], inputs: Any) -> dict[str, Array]:
    """Return the inputs as arrays by name.

    Args:
        names: of the model's inputs, in order.
        inputs: a tensor or array, a tuple of them in that order, or a mapping by name.

    Raises:
        DataError: a name or the number of inputs does not fit.
    """
    if isinstance(inputs, Mapping):
        if set(names) != set(inputs):
            raise DataError(
                f"the model takes the inputs {', '.join(names)} and was given {', '.join(map(str, inputs))}"
            )
        return {name: as_array(inputs[name]) for name in names}
    values = inputs if isinstance(inputs, list | tuple) else (inputs,)
    if len(values) != len(names):
        raise DataError(f"the model takes {len(names)} inputs ({', '.join(names)}) and was given {len(values)}")
    return dict(zip(names, map(as_array, values), strict=True))


def in_order(inputs: Any) -> list[Array]:
    """Return every tensor or array in the inputs, in order."""
    if isinstance(inputs, np.ndarray):
        return [inputs]
    if isinstance(inputs, Mapping | list | tuple):
        values = inputs.values() if isinstance(inputs, Mapping) else inputs
        return [array for value in values for array in in_order(value)]
    return [as_array(value) for value in tensors(inputs)]


def as_array(value: Any) -> Array:
    """Return a tensor's values as a contiguous array; anything else as NumPy makes one of it."""
    return np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value))


def written(path: Path, data: bytes) -> Path:
    """Write bytes, with the folder they go to, and return the path.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what packages print, from Python and from C, warn and log; errors still rise."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            nowhere(1, 2),
            open(os.devnull, "w") as hole,
            contextlib.redirect_stdout(hole),
            contextlib.redirect_stderr(hole),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
