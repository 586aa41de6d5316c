"""Arrays in and out of files for `featherweight run`, in batches; nothing is unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.artifact import Artifact
from featherweight.errors import DataError
from featherweight.runtimes.protocol import by_name

Array = np.ndarray[Any, Any]


def read_arrays(path: Path) -> Any:
    """Return one array from `.npy`, a tuple of them from `.npz` with numpy's own names, or a dict from named ones.

    Raises:
        DataError: the file cannot be read, or holds Python objects.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npy or .npz: {error}") from error
    if not arrays:
        raise DataError(f"{path} holds no array")
    unnamed = all(name == f"arr_{index}" for index, name in enumerate(arrays))
    return tuple(arrays.values()) if unnamed else arrays


def run_batched(artifact: Artifact, inputs: Any, batch: int) -> tuple[list[str], list[Array]]:
    """Return the names of the outputs and the outputs, joined over batches of at most `batch` samples.

    Raises:
        DataError: there is no sample, the inputs differ in their number, or do not fit the model.
    """
    named = by_name(artifact.session().inputs, inputs)
    counts = {name: value.shape[0] if value.ndim else 0 for name, value in named.items()}
    samples = next(iter(counts.values()))
    if not samples or len(set(counts.values())) > 1:
        raise DataError(f"dimension 0 of every input is the batch, at least 1 and the same for all; given: {counts}")
    parts = [
        artifact.run({name: value[start : start + batch] for name, value in named.items()})
        for start in range(0, samples, batch)
    ]
    return list(artifact.session().outputs), [np.concatenate(column) for column in zip(*parts, strict=True)]


def check_output(path: Path) -> None:
    """Refuse an output path before anything is computed for it.

    Raises:
        DataError: another ending than `.npy` or `.npz`, or a folder that does not exist.
    """
    if path.suffix not in (".npy", ".npz"):
        raise DataError(f"{path}: outputs go to .npy or .npz")
    if not path.parent.is_dir():
        raise DataError(f"{path} cannot be written: there is no folder {path.parent}")


def write_arrays(path: Path, names: list[str], arrays: list[Array]) -> None:
    """Write the outputs: `.npy` takes a single one, `.npz` takes any number by name.

    Raises:
        DataError: several outputs and a `.npy`, another ending, or a path that cannot be written.
    """
    check_output(path)
    if path.suffix == ".npy" and len(arrays) != 1:
        raise DataError(f"{path}: the model has {len(arrays)} outputs ({', '.join(names)}): give a .npz")
    try:
        if path.suffix == ".npy":
            np.save(path, arrays[0])
        else:
            np.savez(path, **dict(zip(names, arrays, strict=True)))  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
