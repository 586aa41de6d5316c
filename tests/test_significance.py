"""Paired tests and calibration, by numbers worked out by hand."""

import pytest
import torch

from featherweight.significance import binary, bootstrap, calibration_error, damage_by_class, mcnemar


def test_mcnemar_counts_flips_only():
    """6 lost and 1 won: 2 x (C(7,0) + C(7,1)) / 2^7 = 2 x 8 / 128."""
    before = torch.tensor([1.0] * 6 + [0.0] + [1.0] * 50 + [0.0] * 20)
    after = torch.tensor([0.0] * 6 + [1.0] + [1.0] * 50 + [0.0] * 20)
    assert mcnemar(before, after) == 0.125
    assert mcnemar(before, before) == 1.0
    assert mcnemar(torch.ones(10), torch.zeros(10)) == 2 / 1024


def test_a_bootstrap_interval_is_that_of_the_mean():
    """Of 400 differences with deviation 1 around 0.5: about 0.5 plus and minus 1.96 / 20."""
    differences = 0.5 + torch.tensor([-1.0, 1.0]).repeat(200)
    low, high = bootstrap(differences)
    assert low == pytest.approx(0.5 - 0.098, abs=0.015)
    assert high == pytest.approx(0.5 + 0.098, abs=0.015)
    assert bootstrap(torch.full((3, 50), 0.25)) == (0.25, 0.25)
    assert bootstrap(differences) == (low, high)


def test_seeds_that_disagree_widen_the_interval():
    alike, apart = torch.zeros(2, 100), torch.tensor([[0.0], [1.0]]).expand(2, 100)
    assert bootstrap(alike) == (0.0, 0.0)
    assert bootstrap(apart) == (0.0, 1.0)


def test_calibration_error_weighs_the_gaps_of_bins():
    """Two sure at 0.95 of which one is right, two at 0.55 of which both are: (0.45 x 2 + 0.45 x 2) / 4."""
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55], dtype=torch.float64)
    assert calibration_error(confidence, torch.tensor([1.0, 0.0, 1.0, 1.0])) == pytest.approx(0.45)
    assert calibration_error(torch.ones(4), torch.ones(4)) == 0.0


def test_damage_is_of_each_class():
    labels = torch.tensor([0, 0, 2, 2])
    damage = damage_by_class(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]), labels)
    assert damage == [0.5, None, 0.0]


def test_binary_scores_are_told_from_others():
    assert binary(torch.tensor([0.0, 1.0, 1.0]))
    assert not binary(torch.tensor([0.0, 0.5]))
