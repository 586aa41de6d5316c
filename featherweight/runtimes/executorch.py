"""ExecuTorch with XNNPACK, from PyTorch's exported program: integers between two grids, floats elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from featherweight.data import as_call
from featherweight.errors import DataError, ExportError
from featherweight.runtimes.baking import baked
from featherweight.runtimes.protocol import (
    FLOAT32,
    INT8,
    Program,
    Runtime,
    Subject,
    first_line,
    in_order,
    program_of,
    quiet,
    written,
)


class ExecuTorch(Runtime):
    """ExecuTorch's portable runtime, with XNNPACK for what that can compute."""

    package = "executorch"
    extra = "executorch"
    about = "for phones and small devices; XNNPACK computes int8 between two grids; one batch size"
    from_module = True
    any_batch = False

    def export(self, subject: Subject, folder: Path) -> Path:
        """Write `model.pte`, for the batch size of the subject's inputs, and beside it how each layer was lowered."""
        partitioner = self.need("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        exir = self.need("executorch.exir")
        program = baked(program_of(subject, self), *as_call(subject.inputs), signed=True)
        try:
            with quiet():
                lowered = exir.to_edge_transform_and_lower(
                    program,
                    partitioner=[partitioner.XnnpackPartitioner()],
                    compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
                )
                data = lowered.to_executorch().buffer
        except Exception as error:  # the compiler raises whatever its passes raise
            raise ExportError(f"ExecuTorch cannot express the model: {first_line(error)}") from error
        rows = _precisions(lowered.exported_program().graph_module)
        written(folder / "model.layers", "\n".join(f"{path} {runs}" for path, runs in rows.items()).encode())
        return written(folder / "model.pte", data)

    def load(self, path: Path, threads: int = 1) -> Program:
        """Load `model.pte`; ExecuTorch takes the number of threads from the process."""
        runtime = self.need("executorch.runtime")
        try:
            with quiet():
                method = runtime.Runtime.get().load_program(str(path)).load_method("forward")
        except Exception as error:
            raise ExportError(f"ExecuTorch cannot load {path}: {first_line(error)}") from error
        rows = path.with_suffix(".layers")
        return Method(method, dict(line.split() for line in rows.read_text().splitlines()) if rows.exists() else {})


class Method(Program):
    """The forward of a loaded `.pte` file."""

    def __init__(self, method: Any, layers: dict[str, str]) -> None:
        self._method = method
        self._layers = layers

    def prepared(self, inputs: Any) -> Callable[[], list[Any]]:
        """Return a call that computes the outputs of these inputs."""
        given = [torch.from_numpy(array) for array in in_order(inputs)]
        try:
            with quiet():
                self._method.execute(given)
        except RuntimeError as error:
            shapes = ", ".join(f"{value.dtype}{list(value.shape)}" for value in given)
            raise DataError(f"ExecuTorch takes one batch size and was given {shapes}: {first_line(error)}") from error
        return lambda: list(self._method.execute(given))

    def audit(self) -> dict[str, str]:
        """Return how each layer was lowered, read from the graphs that XNNPACK was given."""
        return self._layers


def _precisions(module: Any) -> dict[str, str]:
    """What XNNPACK was given for each layer: codes on both sides, or floats."""
    found: dict[str, str] = {}
    inner = [child.original_module.graph_module for child in module.children() if hasattr(child, "original_module")]
    for graph in [module, *inner]:
        for node in graph.graph.nodes:
            kind = str(node.target)
            if node.op == "call_function" and any(
                word in kind for word in ("convolution", "linear", "addmm", "mm.default")
            ):
                stack = list((node.meta.get("nn_module_stack") or {}).values())
                path = str(stack[-1][0]) if stack else ""
                weights = [str(source.target) for source in node.all_input_nodes]
                integers = sum("dequantize" in weight for weight in weights) >= 2
                if path:
                    found[path] = INT8 if integers and graph is not module else FLOAT32
    return found
