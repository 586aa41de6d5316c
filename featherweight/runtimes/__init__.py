"""Runtimes, one file each: export, load, run, audit; a runtime sees a serialized model and never a technique."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from featherweight.errors import ExportError, closest
from featherweight.runtimes.eager import Eager
from featherweight.runtimes.executorch import ExecuTorch
from featherweight.runtimes.inductor import Inductor
from featherweight.runtimes.litert import LiteRT, LiteRTDynamic
from featherweight.runtimes.onnxruntime import OnnxRuntime
from featherweight.runtimes.onnxruntime_dynamic import OnnxRuntimeDynamic
from featherweight.runtimes.openvino import OpenVino, OpenVinoBf16
from featherweight.runtimes.protocol import Program, Runtime, Subject

RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": OnnxRuntime(),
    "onnxruntime_dynamic": OnnxRuntimeDynamic(),
    "openvino": OpenVino(),
    "openvino_bf16": OpenVinoBf16(),
    "litert": LiteRT(),
    "litert_dynamic": LiteRTDynamic(),
    "executorch": ExecuTorch(),
    "inductor": Inductor(),
    "torch": Eager(),
}
FORMATS = {
    "onnx": "onnxruntime",
    "onnx_dynamic": "onnxruntime_dynamic",
    "openvino": "openvino",
    "litert": "litert",
    "litert_dynamic": "litert_dynamic",
    "executorch": "executorch",
    "inductor": "inductor",
    "torch": "torch",
}
"""What `export --to` takes, and the runtime that writes it."""


def find_runtime(name: str) -> Runtime:
    """Return a runtime by its name.

    Raises:
        ExportError: there is none of that name.
    """
    if name not in RUNTIMES:
        raise ExportError(f"unknown runtime {name!r}.{closest(name, RUNTIMES)}")
    return RUNTIMES[name]


def find_format(name: str) -> str:
    """Return the name of the runtime that writes a format.

    Raises:
        ExportError: there is no such format.
    """
    if name not in FORMATS:
        raise ExportError(f"unknown export format {name!r}.{closest(name, FORMATS)}")
    return FORMATS[name]


def installed(runtime: Runtime) -> bool:
    """Whether the package of a runtime is there."""
    return find_spec(runtime.package) is not None


def available() -> list[dict[str, Any]]:
    """Return one row a runtime: name, version or how to install it, what exports to it, and what it is good for."""
    formats = {runtime: written for written, runtime in FORMATS.items()}
    return [
        {
            "name": name,
            "version": _version(runtime),
            "export --to": formats.get(name, "-"),
            "about": runtime.about,
        }
        for name, runtime in RUNTIMES.items()
    ]


def _version(runtime: Runtime) -> str:
    if not installed(runtime):
        return f"pip install 'featherweight[{runtime.extra}]'"
    try:
        return version(runtime.package)
    except PackageNotFoundError:
        return "unknown"


__all__ = [
    "FORMATS",
    "RUNTIMES",
    "Program",
    "Runtime",
    "Subject",
    "available",
    "find_format",
    "find_runtime",
    "installed",
]
