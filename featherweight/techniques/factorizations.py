"""Matrices and kernels as products of smaller ones, such that outputs, weighed by what enters and what matters, change least.

Pure arithmetic in float64. A layer's weight is seen as `[out, m, n]`: a first factor `[rank, m]` acts on the same `m` inputs
at each of `n` places, later ones on what it lets through. `n` is 1 for a matrix, `m` the input channels and `n` the taps for
a Tucker decomposition, `m` channels times rows and `n` columns for a kernel that is split into a tall and a wide one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR = 1e-12  # of the largest eigenvalue; below it an input direction never occurs
_SWEEPS = 3
_BALANCING = 8


@dataclass(frozen=True)
class Metric:
    """What a change of a weight `[out, in]` costs: `tr(R D C D^T R)` for the difference `D`.

    Attributes:
        inputs: `C [in, in]`, covariance or second moment of the inputs, in the order of the flattened weight; None for the
            identity, the plain singular value decomposition.
        mean: `[in]` where `inputs` is a covariance, so that the mean has to be made good in the bias; else None.
        rows: the diagonal of `R`, `[out]`, positive; None for ones.
    """

    inputs: Tensor | None = None
    mean: Tensor | None = None
    rows: Tensor | None = None

    def cost(self, difference: Tensor) -> float:
        """Return the squared output error of a weight that is off by `difference`, `[out, in]`."""
        scaled = _scaled(difference, self.rows)
        return float((scaled if self.inputs is None else scaled @ self.inputs).mul(scaled).sum())


def principal(matrix: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output energies of `matrix` on inputs of a second moment, and their directions, largest first.

    The best approximation of rank `r` is the projection on the first `r` directions, `U_r U_r^T matrix`; its squared error is
    exactly the energies that are left out. No inverse is taken, so inputs that never occur do no harm.

    Args:
        matrix: `[rows, columns]`.
        inputs: `[columns, columns]`, or None for the identity.

    Returns:
        energies `[k]` and directions `[rows, k]`, `k` the smaller of rows and columns.

    Paper: Zhang et al., "Accelerating Very Deep Convolutional Networks", TPAMI 2016 (principal responses); the same optimum
        as by whitening: Wang et al., "SVD-LLM", ICLR 2025.
    """
    rows, columns = matrix.shape
    if rows <= columns:
        gram = matrix @ matrix.T if inputs is None else matrix @ inputs @ matrix.T
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        return values.flip(0).clamp_min(0), vectors.flip(1)
    left, values, _ = torch.linalg.svd(matrix if inputs is None else matrix @ _root(inputs), full_matrices=False)
    return values**2, left


def matrix_factors(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """Return `A [out, rank]` and `B [rank, in]` with the least cost of `weight - A B`, of balanced norms."""
    _, left = principal(_scaled(weight, metric.rows), metric.inputs)
    kept = left[:, :rank]
    return _balanced(_unscaled(kept, metric.rows), kept.T @ _scaled(weight, metric.rows))


def input_energies(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Return the energies that the first factor of `weight [out, m, n]` can let through, and its rows, `[k, m]`, unit norm.

    The inputs at the `n` places count alike.
    """
    unfolded = _scaled(weight, metric.rows).movedim(1, 2).flatten(0, 1)
    energies, left = principal(unfolded, _shared(metric.inputs, weight.shape[1]))
    rows = left.T @ unfolded
    return energies, rows / _norms(rows)[:, None]


def separable_factors(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """Return `G [out, rank, n]` and `P [rank, m]` that stand for `weight [out, m, n]`: sums over `rank` of `G P`.

    `P` holds the directions of most energy, `G` is fitted to the outputs given `P`; their norms are balanced.

    Paper: Tai et al., "Convolutional Neural Networks with Low-rank Regularization", ICLR 2016.
    """
    _, rows = input_energies(weight, metric)
    first = rows[:rank]
    fitted, _ = _fitted(weight, first, metric)
    return _balanced(fitted, first)


def tucker_factors(weight: Tensor, metric: Metric, first: int, second: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `A [out, second]`, the core `[second, first, n]` and `P [first, m]` that stand for `weight [out, m, n]`.

    `P` comes from higher-order orthogonal iteration; core and `A` are, given `P`, the best there are. Norms are balanced.

    Paper: Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
        ICLR 2016; De Lathauwer et al., 2000 (the iteration).
    """
    scaled = _scaled(weight, metric.rows)
    plain = Metric(metric.inputs)
    seen = scaled
    for _ in range(_SWEEPS):
        _, rows = input_energies(seen, plain)
        inner = rows[:first]
        fitted, through = _fitted(scaled, inner, plain)
        _, left = principal(fitted.flatten(1), through)
        outer = left[:, :second]
        seen = (outer.T @ scaled.flatten(1)).reshape(-1, *weight.shape[1:])
    core = (outer.T @ fitted.flatten(1)).reshape(-1, *fitted.shape[1:])
    last = _unscaled(outer, metric.rows)
    for _ in range(_BALANCING):
        core, inner = _balanced(core, inner)
        last, core = _balanced(last, core)
    return last, core, inner


def composed(later: Tensor, first: Tensor) -> Tensor:
    """Return the weight `[out, m, n]` of `first [rank, m]` at each place followed by `later [out, rank, n]`."""
    return torch.einsum("orn,rm->omn", later, first)


def _balanced(later: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors `[out, rank, ...]` and `[rank, ...]` such that each component has the same norm in both.

    The product stays. Training by Adam moves all weights by as much, and would ruin a factor of tiny ones beside one of large ones.
    """
    balance = (_norms(first.flatten(1)) / _norms(later.transpose(0, 1).flatten(1))).sqrt()
    spread = balance.reshape(-1, *[1] * (first.dim() - 1))
    return later * balance.reshape(-1, *[1] * (later.dim() - 2)), first / spread


def _fitted(weight: Tensor, first: Tensor, metric: Metric) -> tuple[Tensor, Tensor | None]:
    """Return `G [out, rank, n]` that best stands for `weight` behind `first`, and the second moment of what it sees."""
    out, _, n = weight.shape
    if metric.inputs is None:  # rows of unit norm, at right angles: projecting is the best fit
        return torch.einsum("omn,rm->orn", weight, first), None
    half = _through(metric.inputs, first, n)  # [m n, rank n]
    through = _through(half.T.contiguous(), first, n)
    through = (through + through.T) / 2
    inverse = torch.linalg.pinv(through, rtol=_FLOOR, hermitian=True)
    return (weight.flatten(1) @ half @ inverse).reshape(out, -1, n), through


def _through(rows: Tensor, first: Tensor, n: int) -> Tensor:
    """Rows `[k, m n]` seen through the first factor, `[k, rank n]`."""
    return torch.einsum("kmn,rm->krn", rows.reshape(len(rows), -1, n), first).flatten(1)


def _shared(inputs: Tensor | None, m: int) -> Tensor | None:
    """The second moment `[m, m]` of the inputs at one place, the mean over all places."""
    if inputs is None:
        return None
    n = len(inputs) // m
    shared: Tensor = inputs.reshape(m, n, m, n).diagonal(dim1=1, dim2=3).mean(-1)
    return shared


def _root(moment: Tensor) -> Tensor:
    """`S` with `S S^T` the given matrix."""
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _norms(rows: Tensor) -> Tensor:
    """Norms of rows; those of zeros count as 1, so that they can be divided by."""
    norms = rows.norm(dim=1)
    return torch.where(norms > 0, norms, 1.0)


def _scaled(weight: Tensor, rows: Tensor | None) -> Tensor:
    return weight if rows is None else weight * rows.reshape(-1, *[1] * (weight.dim() - 1))


def _unscaled(weight: Tensor, rows: Tensor | None) -> Tensor:
    return weight if rows is None else weight / rows[:, None]
