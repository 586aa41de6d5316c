"""Factors: exact at full rank, at the optimum below it, and never worse for knowing what enters."""

import pytest
import torch

from featherweight.techniques.factorizations import (
    Metric,
    composed,
    matrix_factors,
    principal,
    separable_factors,
    tucker_factors,
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(width, seed=5):
    root = drawn(width, width, seed=seed) * torch.logspace(0, -1.5, width, dtype=torch.float64)
    return root @ root.T


METRICS = {
    "plain": lambda width, out: Metric(),
    "whitened": lambda width, out: Metric(moment(width)),
    "rows": lambda width, out: Metric(moment(width), rows=torch.linspace(0.1, 3, out, dtype=torch.float64)),
}


def tucker(weight, metric, first, second):
    last, core, inner = tucker_factors(weight, metric, first, second)
    assert (last.shape, core.shape[:2], inner.shape) == (
        (len(weight), second),
        (second, first),
        (first, weight.shape[1]),
    )
    return composed(torch.einsum("os,srn->orn", last, core), inner)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(6, 5, 4), (9, 2, 3), (3, 8, 2)])
def test_full_ranks_are_exact(metric, shape):
    weight, (out, m, n) = drawn(*shape), shape
    cost = METRICS[metric](m * n, out)
    outer, inner = matrix_factors(weight.flatten(1), cost, min(out, m * n))
    torch.testing.assert_close(outer @ inner, weight.flatten(1))
    first = min(m, out * n)
    later, rows = separable_factors(weight, cost, first)
    torch.testing.assert_close(composed(later, rows), weight)
    torch.testing.assert_close(tucker(weight, cost, first, min(out, first * n)), weight)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(7, 10), (10, 7)])
def test_a_matrix_loses_exactly_the_energies_left_out(metric, shape):
    """The singular values of `R W S`, with `S` the Cholesky factor, are another way to the same optimum."""
    weight = drawn(*shape)
    cost = METRICS[metric](shape[1], shape[0])
    inputs = torch.eye(shape[1], dtype=torch.float64) if cost.inputs is None else cost.inputs
    scaled = weight if cost.rows is None else cost.rows[:, None] * weight
    singular = torch.linalg.svdvals(scaled @ torch.linalg.cholesky(inputs))
    energies, directions = principal(scaled, cost.inputs)
    torch.testing.assert_close(energies, singular**2, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(directions.T @ directions, torch.eye(7, dtype=torch.float64))
    for rank in range(1, 7):
        outer, inner = matrix_factors(weight, cost, rank)
        assert cost.cost(weight - outer @ inner) == pytest.approx(float((singular[rank:] ** 2).sum()), rel=1e-8)
        torch.testing.assert_close(outer.norm(dim=0), inner.norm(dim=1))


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_knowing_what_enters_is_never_worse(first):
    weight = drawn(8, 5, 3)
    metric = Metric(moment(15))
    for form, ranks in ((separable_factors, (first,)), (tucker_factors, (first, 2)), (tucker_factors, (first, 3))):
        costs = []
        for given in (Metric(), metric):
            parts = form(weight, given, *ranks)
            later = parts[0] if len(parts) == 2 else torch.einsum("os,srn->orn", parts[0], parts[1])
            costs.append(metric.cost((weight - composed(later, parts[-1])).flatten(1)))
        assert costs[1] < costs[0]


def test_iterating_improves_on_the_higher_order_svd():
    """By hand: the projection on the leading directions of each unfolding, which the iteration starts from."""
    weight = drawn(8, 7, 4)
    for first, second in ((2, 2), (3, 2), (3, 5)):
        inner = torch.linalg.svd(weight.transpose(0, 1).flatten(1)).U[:, :first]
        outer = torch.linalg.svd(weight.flatten(1)).U[:, :second]
        once = torch.einsum("oa,pa,pin,ib,mb->omn", outer, outer, weight, inner, inner)
        better = (weight - tucker(weight, Metric(), first, second)).square().sum()
        assert better < (weight - once).square().sum()


def test_directions_that_never_occur_do_no_harm():
    weight, seen = drawn(6, 10), drawn(10, 3, seed=2)
    metric = Metric(seen @ seen.T)
    outer, inner = matrix_factors(weight, metric, 3)
    torch.testing.assert_close(outer @ inner @ seen, weight @ seen)
    later, rows = separable_factors(weight.reshape(6, 5, 2), metric, 3)
    assert bool(torch.isfinite(composed(later, rows)).all())
    assert metric.cost(weight - composed(later, rows).flatten(1)) < metric.cost(weight)


def test_neighbours_have_equal_norms_whatever_the_rows_weigh():
    """A factor a thousand times smaller than the next would be ruined by the first steps of any training."""
    weight = drawn(6, 5, 4)
    cost = Metric(moment(20), rows=torch.logspace(3, 5, 6, dtype=torch.float64))
    pairs = [matrix_factors(weight.flatten(1), cost, 3), separable_factors(weight, cost, 3)]
    last, core, inner = tucker_factors(weight, cost, 4, 3)
    for later, first in (*pairs, (last, core), (core, inner)):
        norms = later.transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, first.flatten(1).norm(dim=1), rtol=0.02, atol=0)
