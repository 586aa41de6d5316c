"""Which way is picked: against numbers worked out by hand, all allocations tried, and planted ranks."""

import itertools

import pytest
import torch

from featherweight.techniques.ranks import (
    bayesian_rank,
    by_energy,
    by_parameters,
    joined,
    nearest,
    of_one_rank,
    of_two_ranks,
    spread,
)

ENERGIES = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])  # of 16


def test_one_rank_by_hand():
    ways = of_one_rank("channel", ENERGIES, each=10, fixed=3, multiple=1)
    assert ways.ranks[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert ways.parameters.tolist() == [13, 23, 33, 43, 53]
    assert ways.dropped.tolist() == [0.5, 0.25, 0.125, 0.0625, 0.0]
    assert [by_energy(ways, energy) for energy in (0.4, 0.5, 0.51, 0.875, 1.0)] == [0, 0, 1, 2, 4]
    assert [by_parameters(ways, allowed) for allowed in (12, 13, 52, 99)] == [None, 0, 3, 4]
    assert of_one_rank("channel", ENERGIES, 10, 3, multiple=2).ranks[:, 0].tolist() == [2, 4, 5]


def test_two_ranks_by_hand():
    ways = of_two_ranks("tucker", ENERGIES[:2], ENERGIES[:3], m=4, n=9, out=5, fixed=1, multiple=1)
    assert len(ways) == 6
    place = ways.ranks.tolist().index([2, 1])
    assert ways.parameters[place] == 4 * 2 + 9 * 2 * 1 + 1 * 5 + 1
    assert ways.dropped[place] == pytest.approx(6 / 14)
    narrow = of_two_ranks("tucker", ENERGIES[:2], ENERGIES, m=4, n=3, out=5, fixed=1, multiple=1)
    most = {1: 3, 2: 5}  # three outputs an input, and no more than there are
    assert narrow.ranks.tolist() == [[first, second] for first in most for second in range(1, most[first] + 1)]
    both = joined([of_one_rank("channel", ENERGIES, 10, 0, 1), ways])
    assert both.shapes == ("channel", "tucker")
    assert nearest(both, 0, [3]) == 2
    assert both.ranks[nearest(both, 1, [1, 2])].tolist() == [1, 2]
    assert both.shape[nearest(both, 1, [1, 2])] == 1


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8])
def test_spreading_is_as_good_as_the_best_of_all_allocations_of_its_size(ratio):
    tables = [torch.logspace(0, -k, 8) for k in (1, 2, 4)]
    ways = [of_one_rank("channel", energies, each, 0, 1) for energies, each in zip(tables, (5, 10, 20), strict=True)]
    dense = [45, 95, 130]  # less than full rank has
    picked = spread(ways, dense, ratio)

    def size(chosen):
        return sum(w if c is None else float(o.parameters[c]) for c, o, w in zip(chosen, ways, dense, strict=True))

    def lost(chosen):
        return sum(0.0 if c is None else float(o.dropped[c]) for c, o in zip(chosen, ways, strict=True))

    assert size(picked) <= (1 - ratio) * sum(dense)
    everything = [c for c in itertools.product((None, *range(8)), repeat=3) if size(c) <= size(picked)]
    best = min(map(lost, everything))
    assert lost(picked) <= best * 1.5 + 1e-9
    uniform = [by_parameters(option, (1 - ratio) * whole) for option, whole in zip(ways, dense, strict=True)]
    if None not in uniform:
        assert lost(picked) <= lost(uniform) + 1e-9


def test_spreading_nothing_leaves_all_dense():
    ways = of_one_rank("channel", ENERGIES, 10, 0, 1)
    assert spread([ways], [26], 0.0) == [None]
    assert spread([], [], 0.5) == []


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 400)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_bayes_finds_a_planted_rank(shape, rank):
    generator = torch.Generator().manual_seed(rank)
    rows, columns = shape
    signal = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    assert bayesian_rank(signal + 0.7 * torch.randn(shape, generator=generator)) == rank


def test_bayes_finds_nothing_in_noise_and_in_zeros():
    assert (
        bayesian_rank(torch.randn(30, 80, generator=torch.Generator().manual_seed(0))) == 1
    )  # one is the least there is
    assert bayesian_rank(torch.zeros(4, 6)) == 1
