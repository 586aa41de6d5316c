"""Where zeros may stand: anywhere, n of each m inputs kept, or whole blocks removed."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.errors import RecipeError

_SLACK = 0.005  # between a ratio as written and the exact share that a pattern removes


@dataclass(frozen=True)
class KeepOf:
    """Keep `kept` of each `group` consecutive inputs of a row; inputs are the flattened dimensions after the first.

    Paper: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021.
    """

    kept: int
    group: int

    @property
    def ratio(self) -> float:
        """The share that is removed."""
        return 1 - self.kept / self.group


@dataclass(frozen=True)
class Blocks:
    """Remove blocks of `rows` outputs and `columns` inputs whole; those at the edges may be smaller."""

    rows: int = 1
    columns: int = 1


Pattern = KeepOf | Blocks


def parse_pattern(text: object, ratio: float, where: str, blocks: bool = True) -> Pattern:
    """Read a pattern: `""` is any weight, `"2:4"` keeps 2 of each 4 inputs, `"4x1"` is blocks of 4 outputs, 1 input.

    Args:
        text: what the setting says.
        ratio: the share to remove; with an n:m pattern it must be `1 - n/m`, so that a recipe says what it does.
        where: the technique's name, for messages.
        blocks: whether blocks are understood.

    Raises:
        RecipeError: it cannot be read, or ratio and pattern disagree.
    """
    wanted = 'write "2:4" to keep 2 of each 4 inputs' + (
        ', "4x1" for blocks of 4 outputs and 1 input' if blocks else ""
    )
    if text == "":
        return Blocks()
    found = re.fullmatch(r"([1-9]\d{0,3})([:x])([1-9]\d{0,3})", text) if isinstance(text, str) else None
    if found is None or (found[2] == "x" and not blocks):
        raise RecipeError(
            f'{where}: pattern={text!r} cannot be read: {wanted} (in quotes in YAML), or "" for any weight'
        )
    first, second = int(found[1]), int(found[3])
    if found[2] == "x":
        return Blocks(first, second)
    if first > second:
        raise RecipeError(f"{where}: pattern={text!r} keeps more than there is: {wanted}")
    pattern = KeepOf(first, second)
    if abs(pattern.ratio - ratio) > _SLACK:
        raise RecipeError(f"{where}: pattern={text!r} removes {pattern.ratio:g}, not ratio={ratio:g}: give that ratio")
    return pattern


def keep_of(scores: Tensor, ratio: float, group: int) -> Tensor:
    """Return a mask of the shape of `scores [out, ...]` without the lowest `floor(ratio * group)` of each `group` inputs.

    What is left over at the end of a row is kept.
    """
    rows = scores.flatten(1)
    gone = int(ratio * group + 1e-9)
    count = rows.shape[1] // group
    order = rows[:, : count * group].reshape(-1, count, group).sort(dim=-1, stable=True).indices[..., :gone]
    inner = torch.ones(len(rows), count, group, dtype=torch.bool, device=rows.device).scatter(-1, order, False)
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[:, : count * group] = inner.flatten(1)
    return mask.reshape(scores.shape)


def block_norms(weight: Tensor, blocks: Blocks) -> Tensor:
    """Return the root mean square of each block of `weight [out, ...]`, `[ceil(out / rows), ceil(in / columns)]`.

    That is its L2 norm over the root of its size, so that a smaller block at an edge is judged for what it is.
    """
    squares = weight.detach().double().flatten(1) ** 2
    return (_pooled(squares, blocks) / _pooled(torch.ones_like(squares), blocks)).sqrt()


def spread(mask: Tensor, shape: torch.Size, blocks: Blocks) -> Tensor:
    """Return a mask over blocks as one over weights of this shape: the way back from `block_norms`."""
    wide = mask.repeat_interleave(blocks.rows, 0).repeat_interleave(blocks.columns, 1)
    return wide[: shape[0], : shape[1:].numel()].reshape(shape)


def _pooled(values: Tensor, blocks: Blocks) -> Tensor:
    padded = F.pad(values, (0, -values.shape[1] % blocks.columns, 0, -values.shape[0] % blocks.rows))
    parts = (padded.shape[0] // blocks.rows, blocks.rows, padded.shape[1] // blocks.columns, blocks.columns)
    return padded.reshape(parts).sum((1, 3))
