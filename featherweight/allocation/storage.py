"""Tables kept on disk by everything they depend on, so that a second budget for the same network does not wait for them."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from featherweight.allocation.tables import measure_tables
from featherweight.allocation.treatments import Tables
from featherweight.data import batches, tensors
from featherweight.technique import Context
from featherweight.techniques.importance import digest

_FORMAT = 5  # counts up whenever tables are made otherwise
_MOST_READ = 64  # calibration batches that the name of a file depends on


def cache_folder() -> Path:
    """Return where tables are kept: `featherweight` in `XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "featherweight"


def tables_of(model: nn.Module, context: Context, count: int = 16, shares: tuple[float, ...] | None = None) -> Tables:
    """Return the tables of a model, measured once: `measure_tables`, kept on disk.

    Args:
        model: comes back as it was.
        context: calibration data, example, scope, seed and device.
        count: calibration batches to read.
        shares: of each group's channels that may be kept; by the number of groups when None.
    """
    path = cache_folder() / f"tables-{_name(model, context, count, shares)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file costs a measurement, never a wrong result
        return Tables.from_json(json.loads(path.read_text()))
    tables = measure_tables(model, context, count, shares)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(tables.to_json()))
        os.replace(part, path)
    return tables


def _name(model: nn.Module, context: Context, count: int, shares: tuple[float, ...] | None) -> str:
    """A hash of the model, its form, the calibration data and all that decides how tables are made."""
    settings = (
        _FORMAT,
        torch.__version__,
        str(model),
        context.seed,
        context.scope,
        str(context.data.loss),
        count,
        shares,
    )
    found = hashlib.sha256(repr(settings).encode() + digest(model))
    for index, (inputs, _) in enumerate(batches(context.data.calibrate, "calibrate")):
        if index >= max(count, _MOST_READ):
            break
        for tensor in tensors(inputs):
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]
