"""The list of a file's tensors: names, types and shapes; a layer that an edit describes anyway needs its path alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.edits import Edit, Swap
from featherweight.errors import ArtifactError
from featherweight.layers import KINDS, QuantizedLayer, build

MOST_ELEMENTS = 1 << 33
_DTYPES = {
    "f": torch.float32,
    "h": torch.float16,
    "b": torch.bfloat16,
    "d": torch.float64,
    "c": torch.int8,
    "u": torch.uint8,
    "s": torch.int16,
    "i": torch.int32,
    "l": torch.int64,
    "t": torch.bool,
}
_LETTERS = {dtype: letter for letter, dtype in _DTYPES.items()}
# kinds whose number of tensors no option raises: a hostile file must not cost time
_PLAIN = {"linear", "convolution"} | {
    name for name, kind in KINDS.items() if isinstance(kind, type) and issubclass(kind, QuantizedLayer)
}
Row = list[Any]
Entry = tuple[str, torch.dtype, tuple[int, ...]]


def entry(name: str, value: Tensor) -> Row:
    """Return what a file says of a tensor: its name, the letter of its type, its shape.

    Raises:
        ArtifactError: the format does not hold its type.
    """
    if value.dtype not in _LETTERS:
        raise ArtifactError(f"{name} has type {value.dtype}, which the file format does not hold")
    return [name, _LETTERS[value.dtype], list(value.shape)]


def written(state: Mapping[str, Tensor], edits: Iterable[Edit]) -> list[Row | str]:
    """Return the table of a file: a row a tensor, in order, and in place of all rows of a layer its path.

    Args:
        state: the tensors by name.
        edits: that the file holds too; a path stands for what the Swap at it builds.
    """
    rows = [entry(name, value) for name, value in state.items()]
    made = {path: own for path, own in ((path, _built(swap)) for path, swap in _swaps(edits).items()) if own}
    begins = {own[0][0]: path for path, own in made.items()}
    table: list[Row | str] = []
    place = 0
    while place < len(rows):
        path = begins.get(rows[place][0], "")
        count = len(made.get(path, ()))
        fits = count > 0 and rows[place : place + count] == made[path]
        table.append(path if fits else rows[place])
        place += count if fits else 1
    return table


def read(table: Sequence[Row | str], edits: Iterable[Edit]) -> list[Entry]:
    """Return name, type and shape of each tensor, in order.

    Args:
        table: from `written`, and not to be trusted.
        edits: from the same file.

    Raises:
        ArtifactError: a shape is not to be believed.
        KeyError, TypeError, ValueError, ModelError: what else is wrong with the table.
    """
    swaps = _swaps(edits)
    rows = (row for item in table for row in (_built(swaps[item]) if isinstance(item, str) else [item]))
    return [(str(name), *described(letter, shape)) for name, letter, shape in rows]


def described(letter: str, shape: Sequence[int]) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the type and the shape that a file states.

    Raises:
        ArtifactError: a shape is not to be believed.
        KeyError, TypeError, ValueError: it states neither.
    """
    sizes = tuple(int(size) for size in shape)
    if any(size < 0 for size in sizes) or math.prod(sizes) > MOST_ELEMENTS:
        raise ArtifactError(f"a tensor of shape {list(sizes)} is not to be believed")
    return _DTYPES[letter], sizes


def _swaps(edits: Iterable[Edit]) -> dict[str, Swap]:
    return {edit.path: edit for edit in edits if isinstance(edit, Swap) and edit.kind in _PLAIN}


def _built(swap: Swap) -> list[Row]:
    with torch.device("meta"):  # sizes in a hostile file must not cost memory
        layer = build(swap.kind, dict(swap.options))
    return [entry(f"{swap.path}.{name}", value) for name, value in layer.state_dict().items()]
