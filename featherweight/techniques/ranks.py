"""How far a layer is factored: the ways it can be, what each costs and loses, and rules that pick one.

A `Choices` is plain data, one row a way: so a rule that spreads a budget over layers needs to know nothing of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_HALVINGS = 60
_GRID = 256  # strengths of noise tried
_EXACT = 1e-12  # of rounding in a share


@dataclass(frozen=True)
class Choices:
    """Ways to factor one layer.

    Attributes:
        shapes: names of the forms.
        shape: which form each way takes, `[n]` int64.
        ranks: its one or two ranks, `[n, 2]` int64; the second is 0 where there is none.
        parameters: that the factors have, biases included, `[n]` float64.
        dropped: share of the layer's output energy that is lost, 0 to 1, `[n]` float64.
        energy: what all of it is worth beside that of other layers, above 0.
    """

    shapes: tuple[str, ...]
    shape: Tensor
    ranks: Tensor
    parameters: Tensor
    dropped: Tensor
    energy: float = 1.0

    def __len__(self) -> int:
        return len(self.shape)


def of_one_rank(shape: str, energies: Tensor, each: int, fixed: int, multiple: int) -> Choices:
    """Return the ways of a form with one rank.

    Args:
        shape: its name.
        energies: what each rank adds, largest first, `[k]`.
        each: parameters of one more rank.
        fixed: parameters whatever the rank, the bias.
        multiple: ranks are multiples of this, or full.
    """
    ranks = _ranks(len(energies), multiple)
    return Choices(
        (shape,),
        torch.zeros(len(ranks), dtype=torch.long),
        torch.stack((ranks, torch.zeros_like(ranks)), 1),
        (each * ranks + fixed).double(),
        _tails(energies)[ranks],
    )


def of_two_ranks(
    shape: str, first: Tensor, second: Tensor, m: int, n: int, out: int, fixed: int, multiple: int
) -> Choices:
    """Return the ways of a Tucker form, `m` inputs to a first rank, over `n` taps to a second, then to `out`.

    What is lost is at most the sum of what each mode leaves out (De Lathauwer et al., 2000).

    Args:
        shape: its name.
        first: energies of the input mode, `[k]`.
        second: energies of the output mode, `[l]`.
        m: input channels.
        n: taps.
        out: output channels.
        fixed: parameters whatever the ranks.
        multiple: ranks are multiples of this, or full.
    """
    grid = torch.cartesian_prod(_ranks(len(first), multiple), _ranks(len(second), multiple))
    inner, outer = grid.unbind(1)
    grid = grid[(outer <= n * inner) & (inner <= n * outer)]  # the core between them has no higher ranks
    inner, outer = grid.unbind(1)
    return Choices(
        (shape,),
        torch.zeros(len(grid), dtype=torch.long),
        grid,
        (m * inner + n * inner * outer + outer * out + fixed).double(),
        (_tails(first)[inner] + _tails(second)[outer]).clamp_max(1.0),
    )


def joined(choices: Sequence[Choices], energy: float = 1.0) -> Choices:
    """Return the ways of several forms of one layer, whose energy is worth so much."""
    return Choices(
        tuple(name for one in choices for name in one.shapes),
        torch.cat([one.shape + place for place, one in enumerate(choices)]),
        torch.cat([one.ranks for one in choices]),
        torch.cat([one.parameters for one in choices]),
        torch.cat([one.dropped for one in choices]),
        energy,
    )


def by_energy(choices: Choices, energy: float) -> int:
    """Return the smallest way that keeps a share `energy` of the output energy, 0 to 1."""
    enough = choices.dropped <= 1 - energy + _EXACT
    if not bool(enough.any()):
        return int(choices.dropped.argmin())
    return int(torch.where(enough, choices.parameters, math.inf).argmin())


def by_parameters(choices: Choices, allowed: float) -> int | None:
    """Return the way of at most `allowed` parameters that loses least, or None where there is none."""
    fits = choices.parameters <= allowed
    return int(torch.where(fits, choices.dropped, math.inf).argmin()) if bool(fits.any()) else None


def nearest(choices: Choices, place: int, ranks: Sequence[int]) -> int:
    """Return the way of the form at `place` whose ranks are the smallest that are no lower than these."""
    wanted = torch.tensor([*ranks, 0][:2])
    enough = (choices.shape == place) & (choices.ranks >= wanted).all(1)
    return int(torch.where(enough, choices.parameters, math.inf).argmin())


def spread(choices: Sequence[Choices], dense: Sequence[int], ratio: float) -> list[int | None]:
    """Return the way of each layer, None for dense, such that a share `ratio` of all parameters goes and least is lost.

    One price for a parameter, the same in every layer, found by bisection: the sum of the energies lost is then the least
    among all allocations of that size. What the budget has left over is spent where it saves most.

    Args:
        choices: the ways of each layer.
        dense: parameters of each layer as it is.
        ratio: share of all these parameters to remove, 0 to 1.
    """
    total, mean = float(sum(dense)), sum(ways.energy for ways in choices) / max(1, len(choices))

    def at(price: float) -> tuple[float, list[int | None]]:
        picked: list[int | None] = []
        left = 0.0
        for ways, whole in zip(choices, dense, strict=True):
            costs = ways.energy / mean * ways.dropped + price * ways.parameters / total
            best = int(costs.argmin())
            factored = bool(costs[best] < price * whole / total) and float(ways.parameters[best]) < whole
            picked.append(best if factored else None)
            left += float(ways.parameters[best]) if factored else whole
        return left, picked

    low, high = 1e-9, 1e9
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if at(middle)[0] <= (1 - ratio) * total else (middle, high)
    left, picked = at(high)
    return _filled(choices, picked, (1 - ratio) * total - left)


def _filled(choices: Sequence[Choices], picked: list[int | None], spare: float) -> list[int | None]:
    """Spend the parameters that one price left over, always where they save most."""
    while True:
        best = (0.0, 0, 0)
        for layer, (ways, place) in enumerate(zip(choices, picked, strict=True)):
            better = None if place is None else by_parameters(ways, float(ways.parameters[place]) + spare)
            if place is not None and better is not None:
                saved = ways.energy * float(ways.dropped[place] - ways.dropped[better])
                best = max(best, (saved, layer, better))
        most, layer, better = best
        before = picked[layer] if most > 0 else None
        if before is None:
            return picked
        spare -= float(choices[layer].parameters[better] - choices[layer].parameters[before])
        picked[layer] = better


def bayesian_rank(matrix: Tensor) -> int:
    """Return how many singular values of a matrix `[rows, columns]` variational Bayes tells from noise of unknown strength.

    The global optimum for a fully observed matrix, in closed form but for the noise, which is searched for.

    Paper: Nakajima et al., "Global Analytic Solution of Fully-observed Variational Bayesian Matrix Factorization", JMLR 2013.
    """
    short, long = sorted(matrix.shape)
    squares = torch.linalg.svdvals(matrix.double()) ** 2
    if float(squares[0]) <= 0:
        return 1
    alpha = short / long
    tau = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    most = min(math.ceil(short / (1 + alpha)) - 1, short - 1)
    highest = float(squares.sum()) / (short * long)
    lowest = max(float(squares[most]) / (long * edge), float(squares[most:].mean()) / long, highest * 1e-12)
    for _ in range(2):  # a coarse grid, then a fine one around the best
        noises = torch.logspace(math.log10(lowest), math.log10(max(highest, lowest)), _GRID, dtype=torch.float64)
        energies = torch.stack([_free_energy(squares / (long * noise), alpha, edge) for noise in noises])
        best = int(energies.argmin())
        lowest, highest = float(noises[max(0, best - 1)]), float(noises[min(_GRID - 1, best + 1)])
    return max(1, int((squares > long * noises[best] * edge).sum()))


def _free_energy(scaled: Tensor, alpha: float, edge: float) -> Tensor:
    """The free energy of the squared singular values over columns and noise, up to a constant."""
    signal, noise = scaled[scaled > edge], scaled[scaled <= edge]
    base = signal - (1 + alpha)
    tau = (base + (base**2 - 4 * alpha).clamp_min(0).sqrt()) / 2
    found = signal - tau + ((tau + 1) / signal).log() + alpha * (tau / alpha + 1).log()
    return found.sum() + (noise - noise.clamp_min(1e-300).log()).sum()


def _ranks(most: int, multiple: int) -> Tensor:
    return torch.tensor(sorted({*range(multiple, most + 1, multiple), most}))


def _tails(energies: Tensor) -> Tensor:
    """Share of the energy that each rank from 0 on leaves out, `[k + 1]`."""
    energies = energies.double().cpu()
    tails = torch.cat((energies.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)))
    return tails / tails[0].clamp_min(1e-300)
