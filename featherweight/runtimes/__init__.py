"""Runtimes and export formats, one file each; a runtime sees a serialized model and never a technique."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from featherweight.errors import ExportError, closest


def write_onnx(model: bytes, folder: Path) -> Path:
    """Write `model.onnx` into a folder and return its path.

    Raises:
        ExportError: the folder cannot be written.
    """
    path = folder / "model.onnx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


FORMATS: dict[str, Callable[[bytes, Path], Path]] = {"onnx": write_onnx}
_ABOUT = {
    "onnxruntime": ("onnx", "the default: runs every artifact, int8 as integers"),
    "torch": ("", "eager PyTorch, the baseline that latencies are shown beside"),
}


def find_format(name: str) -> Callable[[bytes, Path], Path]:
    """Return what writes a format.

    Raises:
        ExportError: the format is unknown.
    """
    if name not in FORMATS:
        raise ExportError(f"unknown export format {name!r}.{closest(name, FORMATS)}")
    return FORMATS[name]


def available() -> list[dict[str, Any]]:
    """Return one row a runtime: name, version if installed, what exports to it."""
    rows = []
    for name, (written, about) in _ABOUT.items():
        try:
            installed = version(name) if find_spec(name) else "not installed"
        except PackageNotFoundError:
            installed = "unknown"
        rows.append({"name": name, "version": installed, "export --to": written or "-", "about": about})
    return rows
