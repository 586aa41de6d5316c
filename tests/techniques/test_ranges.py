"""Ranges of 8-bit grids for activations, by hand."""

import math

import pytest
import torch

from featherweight.techniques.observe import Observed
from featherweight.techniques.ranges import METHODS, centred, divergence, on_grid, unsigned_grid


def seen(*values, averages=(None, None)):
    sample = torch.tensor(values)
    return Observed(float(sample.min()), float(sample.max()), sample, *averages)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (2.0, 6.0), (-5.0, -1.0), (0.0, 0.0)])
def test_a_grid_holds_zero_exactly(low, high, method):
    scale, zero = unsigned_grid(seen(*torch.linspace(low, high, 1001).tolist()), method)
    assert scale.dtype == torch.float32
    assert scale.shape == zero.shape == ()
    assert zero.dtype == torch.uint8
    assert on_grid(torch.zeros(1), (scale, zero)).item() == 0.0


def test_minmax_by_hand():
    scale, zero = unsigned_grid(Observed(-51.0, 204.0, torch.zeros(1)), "minmax")
    assert (scale.item(), zero.item()) == (1.0, 51)
    assert on_grid(torch.tensor([-60.0, 0.4, 10.6, 300.0]), (scale, zero)).tolist() == [-51.0, 0.0, 11.0, 204.0]


def test_the_moving_average_is_what_a_batch_needs():
    scale, zero = unsigned_grid(seen(-100.0, 900.0, averages=(-51.0, 204.0)), "average")
    assert (scale.item(), zero.item()) == (1.0, 51)


def test_the_percentile_leaves_one_value_in_ten_thousand():
    values = [i / 10_000 for i in range(10_001)] + [50.0]  # one outlier of 10,002
    scale, _ = unsigned_grid(seen(*values), "percentile")
    assert scale.item() == pytest.approx(1 / 255, rel=1e-4)


def test_squared_error_clips_an_outlier():
    sample = torch.rand(10_000, generator=torch.Generator().manual_seed(0)).tolist()
    clipped, _ = unsigned_grid(seen(*sample, 2.0), "mse")
    whole, _ = unsigned_grid(seen(*sample, 2.0), "minmax")
    assert clipped < whole


def test_squared_error_finds_the_grid_that_values_lie_on():
    """16 values from -1 to 1: zero is no code of the grid that just covers them, which is half a step off everywhere."""
    values = torch.arange(16) / 7.5 - 1
    observed = seen(*values.tolist())
    errors = {m: (on_grid(values, unsigned_grid(observed, m)) - values).square().mean() for m in ("minmax", "mse")}
    assert errors["mse"] < errors["minmax"] / 2


def test_divergence_by_hand():
    counts = torch.tensor([4.0, 2.0, 0.0, 2.0])
    # two levels: bins 0 and 1 become 3 and 3, bin 3 keeps its 2
    wanted = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(1.0)
    assert divergence(counts, 4, 2) == pytest.approx(wanted)
    # of two bins the clipped mass is the last one's: (4, 4) of 8 against (4, 2) of 6
    assert divergence(counts, 2, 2) == pytest.approx(0.5 * math.log(0.5 / (4 / 6)) + 0.5 * math.log(0.5 / (2 / 6)))


def test_entropy_clips_a_long_thin_tail():
    generator = torch.Generator().manual_seed(0)
    sample = torch.cat([torch.randn(20_000, generator=generator).abs(), torch.tensor([40.0])])
    scale, zero = unsigned_grid(seen(*sample.tolist()), "entropy")
    assert zero.item() == 0
    assert 2 / 255 < scale.item() < 20 / 255


@pytest.mark.parametrize("zero", [0, 120, 121, 124, 128, 132, 136, 137, 255])
def test_a_zero_near_the_middle_is_moved_there_and_nothing_is_cut_off(zero):
    scale, moved = centred((torch.tensor(0.5), torch.tensor(zero, dtype=torch.uint8)))
    assert int(moved) == (128 if 121 <= zero <= 136 else zero)
    assert 0.5 <= float(scale) <= 0.5 * 17 / 16 + 1e-6
    assert float(scale) * int(moved) >= 0.5 * zero * (1 - 1e-6)
    assert float(scale) * (255 - int(moved)) >= 0.5 * (255 - zero) * (1 - 1e-6)
    assert moved.dtype == torch.uint8
