"""The loop of the optimal brain surgeon over columns: what settling one column costs is moved to the columns behind it.

Paper: Frantar & Alistarh, "Optimal Brain Compression", NeurIPS 2022; in blocks: Frantar et al., "GPTQ", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128  # columns after which the update reaches all columns behind

Settle = Callable[[int, Tensor], Tensor]
"""Takes the number of a column and its values as they are by then, `[groups, out]`, and returns what they become."""


def compensate(matrix: Tensor, factor: Tensor, settle: Settle, block: int = BLOCK) -> None:
    """Settle the columns of a matrix in order, in place; those behind take over what each has lost.

    Args:
        matrix: `[groups, out, in]` float64; columns from the current one on hold the compensated values when `settle` is called.
        factor: upper Cholesky factor of the inverse second moment of the inputs, `[groups, in, in]`.
        settle: gives the final values of a column.
        block: columns that are updated one by one; the others are after each block.
    """
    columns = matrix.shape[-1]
    for start in range(0, columns, block):
        end = min(columns, start + block)
        errors = torch.empty_like(matrix[..., start:end])
        for column in range(start, end):
            row = factor[:, None, column, column:end]
            values = matrix[..., column]
            kept = settle(column, values)
            lost = (values - kept) / row[..., 0]
            matrix[..., column:end] -= lost[..., None] * row
            matrix[..., column] = kept
            errors[..., column - start] = lost
        matrix[..., end:] -= errors @ factor[:, start:end, end:]
