"""TorchInductor, ahead of time: PyTorch's own compiler writes C++ and calls oneDNN, with integers where inputs are on grids."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from featherweight.data import as_call
from featherweight.errors import DataError, ExportError
from featherweight.runtimes.baking import baked
from featherweight.runtimes.eager import Callables
from featherweight.runtimes.protocol import (
    FLOAT32,
    INT8,
    UNKNOWN,
    Program,
    Runtime,
    Subject,
    first_line,
    in_order,
    program_of,
    quiet,
    written,
)

_SETTINGS = {
    "freezing": True,  # weights are packed and folded once, without which no layer is computed with integers
    "compile_threads": 1,  # no worker processes stay behind
    "cpp.dynamic_threads": True,  # otherwise the kernels keep the number of threads of the process that compiled them
}
_INPUTS = "inputs"
_KERNEL = re.compile(r"aoti_torch_cpu_(\w*(?:conv|linear|mm|rnn)\w*)\((.*)")
_CONSTANT = re.compile(r'constants_info_\[(\d+)\]\.(name|original_fqn) = "([^"]*)"')


class Inductor(Runtime):
    """TorchInductor on the CPU; what it writes is for CPUs with the instructions of the one that compiled it.

    A package holds native code, which runs when it is loaded: load only what this library has just exported. Nothing that
    reads `.fw` files comes here with a package from elsewhere.
    """

    package = "torch"
    about: ClassVar[str] = (
        "PyTorch compiled ahead of time, int8 as integers; needs a C++ compiler and its time, so auto leaves it out"
    )
    from_module = True
    auto = False

    def export(self, subject: Subject, folder: Path) -> Path:
        """Write `compiled.pt2`, machine code and weights."""
        program, compiler = program_of(subject, self), self.need("torch._inductor")
        self._need_compiler()
        path = written(folder / "compiled.pt2", b"")
        try:
            with quiet(), torch.no_grad():  # with gradients, nothing is frozen
                args, kwargs = program.example_inputs or as_call(subject.inputs)
                plain = baked(program, args, kwargs, signed=False, shapes=_dynamic(program))
                with compiler.config.patch(
                    {**_SETTINGS, "aot_inductor.metadata": {_INPUTS: json.dumps(_taken(plain))}}
                ):
                    compiler.aoti_compile_and_package(plain, package_path=str(path))
        except Exception as error:  # the compiler raises whatever its passes raise
            path.unlink()
            raise ExportError(f"TorchInductor cannot compile the model: {first_line(error)}") from error
        return path

    def load(self, path: Path, threads: int = 1) -> Program:
        """Load `compiled.pt2`, which runs its code; threads are PyTorch's own setting."""
        compiler = self.need("torch._inductor")
        try:
            with quiet():
                model = compiler.aoti_load_package(str(path))
            with zipfile.ZipFile(path) as package:
                names = [name for name in package.namelist() if name.endswith(".wrapper.cpp")]
                source = "\n".join(package.read(name).decode() for name in names)
            return Package(model, json.loads(model.loader.get_metadata()[_INPUTS]), _precisions(source))
        except Exception as error:  # the reader raises whatever it finds
            raise ExportError(f"TorchInductor cannot load {path}: {first_line(error)}") from error

    def _need_compiler(self) -> None:
        """Refuse where there is no C++ compiler."""
        builder = self.need("torch._inductor.cpp_builder")
        try:
            with quiet():
                builder.get_cpp_compiler()
        except RuntimeError as error:
            raise ExportError(
                "TorchInductor needs a C++ compiler, and there is none: install g++ or clang, or name yours in CXX"
            ) from error


class Package(Callables):
    """A loaded package.

    Args:
        model: the compiled model.
        taken: type and shape of each input, in order, as `_taken` gives them.
        layers: how it computes each layer, by path.
    """

    def __init__(self, model: Any, taken: list[tuple[str, list[int | str]]], layers: dict[str, str]) -> None:
        spec = pytree.treespec_loads(model.loader.get_call_spec()[0])

        def call(*given: Tensor) -> Any:
            args, kwargs = pytree.tree_unflatten(given, spec)
            return model(*args, **kwargs)

        super().__init__(call, layers)
        self._taken = taken

    def prepared(self, inputs: Any) -> Callable[[], list[Any]]:
        """Return a call that computes the outputs of these inputs, once they fit: the compiled code reads without looking."""
        given = [(str(array.dtype), list(array.shape)) for array in in_order(inputs)]
        sizes: dict[str, int] = {}
        if len(given) != len(self._taken) or not all(
            kind == wanted and len(shape) == len(dims) and all(map(_fits(sizes), dims, shape))
            for (kind, shape), (wanted, dims) in zip(given, self._taken, strict=True)
        ):
            raise DataError(f"the compiled model takes {_words(self._taken)} and was given {_words(given)}")
        return super().prepared(inputs)


def _fits(sizes: dict[str, int]) -> Callable[[int | str, int], bool]:
    """Whether a size is what a dimension takes; a dimension with a name takes any, the same wherever it stands."""
    return lambda dim, size: size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)


def _words(values: Any) -> str:
    """Types and shapes for a message, `float32[s0, 3, 12, 12]`."""
    return ", ".join(f"{kind}[{', '.join(map(str, shape))}]" for kind, shape in values)


def _entering(program: ExportedProgram) -> list[Any]:
    """What enters a program as its inputs, in order: tensors that have a shape and no values."""
    names = set(program.graph_signature.user_inputs)
    return [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _taken(program: ExportedProgram) -> list[tuple[str, list[int | str]]]:
    """The type and shape of each input, in order; a dynamic size is the name of its symbol."""
    return [
        (
            str(value.dtype).removeprefix("torch."),
            [size if isinstance(size, int) else str(size) for size in value.shape],
        )
        for value in _entering(program)
        if isinstance(value, Tensor)
    ]


def _dynamic(program: ExportedProgram) -> Any:
    """Which dimensions of a program's inputs are dynamic, as `torch.export.export` takes them."""
    specs = [
        {dim: torch.export.Dim.AUTO for dim, size in enumerate(value.shape) if not isinstance(size, int)}
        if isinstance(value, Tensor)
        else None
        for value in _entering(program)
    ]
    args, kwargs = pytree.tree_unflatten(specs, program.call_spec.in_spec)
    return kwargs or args


def _precisions(source: str) -> dict[str, str]:
    """How each layer is computed, by the kernel that the written C++ calls with the layer's tensors.

    A call does not say the type of its floats: where the program has halves at all, they are unknown.
    """
    table: dict[str, dict[str, str]] = {}
    for place, key, value in _CONSTANT.findall(source):
        table.setdefault(place, {})[key] = value
    constants = {entry["name"]: entry["original_fqn"].rpartition(".")[0] for entry in table.values()}
    floats = UNKNOWN if re.search(r"dtype_b?float16", source) else FLOAT32
    found: dict[str, str] = {}
    for kernel, arguments in _KERNEL.findall(source):
        owners = [constants[word] for word in re.findall(r"\w+", arguments) if word in constants]
        if owners:  # a product of two activations is no layer
            path = next(filter(None, owners), f"?{len(found)}")
            found[path] = INT8 if kernel.startswith(("_qconv", "_qlinear")) else floats
    return found
