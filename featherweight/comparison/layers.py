"""Layer by layer: what became of each layer of the original, and how much the answers depend on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from featherweight.data import Data, batches, forward, tensors
from featherweight.edits import Edit, Swap
from featherweight.modes import evaluating
from featherweight.proof import layer_rows
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context
from featherweight.techniques import QuantizeWeights

_PROBE = QuantizeWeights(bits=2, per_channel=False)


def by_layer(original: nn.Module, model: nn.Module, edits: list[Edit], parts: dict[str, int]) -> list[dict[str, Any]]:
    """Return one row a layer of the original that holds a matrix, JSON-able.

    Args:
        original: what the compressed model came from.
        model: the compressed model.
        edits: that led to it.
        parts: bytes of its file by part.

    Returns:
        `path`, `kept` (share of its parameters that are stored), `zeros` (share of those that are zero), `bits` (stored bits a
        parameter of the original's), and `rank` where it was factored, else None.
    """
    ranks = {edit.path: _rank(edit.options) for edit in edits if isinstance(edit, Swap)}
    now = layer_rows(model, parts)
    rows = []
    for layer in layer_rows(original, {}):
        path, before = layer["path"], layer["parameters"]
        if not any(value.dim() > 1 for value in _own(original, path)):
            continue
        inside = [row for row in now if row["path"] == path or row["path"].startswith(path + ".")]
        stored = sum(row["parameters"] for row in inside)
        zeros = stored - sum(row["nonzero"] for row in inside)
        rows.append(
            {
                "path": path,
                "kept": stored / before,
                "zeros": zeros / stored if stored else 0.0,
                "bits": 8 * sum(row["bytes"] for row in inside) / before,
                "rank": ranks.get(path),
            }
        )
    return rows


def _own(model: nn.Module, path: str) -> list[torch.Tensor]:
    prefix = f"{path}." if path else ""
    return [value for name, value in model.state_dict().items() if name.rpartition(".")[0] + "." == prefix]


def _rank(options: Any) -> int | None:
    for name in ("rank", "first_rank"):
        if name in options:
            return int(options[name])
    return None


def sensitivities(model: nn.Module, data: Data) -> dict[str, float]:
    """Return how far the outputs move when one layer alone has 2-bit weights: squared error over squared output, by path.

    Args:
        model: not changed.
        data: the first batch of `calibrate` is read.
    """
    inputs, _ = next(batches(data.calibrate, "calibrate"))
    found = {}
    for path, layer in model.named_modules():
        if not path or not any(p is not None and p.dim() > 1 for p in layer._parameters.values()):
            continue
        changed, edits = run(only(path, _PROBE), model, Context(data=data))
        if edits:
            found[path] = _moved(model, changed, inputs)
    return found


def _moved(model: nn.Module, changed: nn.Module, inputs: Any) -> float:
    with evaluating(model), evaluating(changed):
        pairs = list(zip(tensors(forward(model, inputs)), tensors(forward(changed, inputs)), strict=True))
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return noise / max(sum(float(a.double().square().sum()) for a, _ in pairs), 1e-30)
