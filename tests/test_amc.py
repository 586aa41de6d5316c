"""AMC's environment and the four ways to choose in it, on a perceptron whose multiply-adds are counted by hand."""

import itertools
import math

import pytest

pytest.importorskip("gymnasium")

from featherweight.amc.agents import by_agent, by_chance, by_evolution, by_program
from featherweight.amc.cuts import Cuts
from featherweight.amc.environment import Environment
from featherweight.data import complete
from featherweight.errors import BudgetError

MACS = 10 * 32 + 32 * 24 + 24 * 4


@pytest.fixture(scope="module")
def cuts(clusters):
    return Cuts(clusters.model, complete(clusters.data)[0])


def macs(first, second):
    return 10 * first + first * second + second * 4


def test_multiply_adds_by_hand(cuts):
    assert cuts.names == ["inner.0", "inner.2"]
    assert cuts.units == [32, 24]
    assert cuts.base == cuts.macs((32, 24)) == MACS
    assert cuts.macs((8, 6)) == macs(8, 6)
    assert cuts.counts([0.5, 0.01]) == (16, 2)


def test_a_cut_is_scored_once_and_the_model_left_alone(cuts, clusters, monkeypatch):
    before = {name: value.clone() for name, value in clusters.model.state_dict().items()}
    score = cuts.evaluate((8, 6))
    assert cuts.score - score >= 0
    monkeypatch.setattr("featherweight.amc.cuts.run", lambda *given: pytest.fail("evaluated again"))
    assert cuts.evaluate((8, 6)) == score
    assert all((value == before[name]).all() for name, value in clusters.model.state_dict().items())


def test_actions_are_held_so_that_the_rest_can_meet_the_target(cuts):
    """With 4 of 24 units behind it (a fifth, rounded down), 10 n + 4 n + 16 <= 200 lets the first group keep 13."""
    environment = Environment(cuts, target=200)
    assert environment.whole([1.0, 1.0])[0] == 13
    for first, second in itertools.product((0.2, 0.4, 0.7, 1.0), repeat=2):
        counts = environment.whole([first, second])
        assert cuts.macs(counts) <= 200 or counts == (6, 4)
    assert Environment(cuts, 200, reward="guaranteed").whole([1.0, 1.0]) == (32, 24)


def test_an_episode(cuts):
    environment = Environment(cuts, target=300)
    state, _ = environment.reset()
    assert state.shape == (11,)
    assert environment.observation_space.contains(state)
    assert state[-1] == 1.0
    state, reward, ended, _, _ = environment.step([0.0])
    assert (reward, ended) == (0.0, False)
    assert 0 < state[8] < 1
    _, reward, ended, _, facts = environment.step([1.0])
    assert ended
    assert reward == 0.0  # the first is its own average
    assert facts["reward"] == cuts.evaluate(facts["counts"])
    guaranteed = Environment(cuts, 300, reward="guaranteed")
    assert guaranteed.judged((8, 6)) == pytest.approx(-(1 - cuts.evaluate((8, 6))) * math.log(macs(8, 6)))


@pytest.mark.parametrize("way", [by_chance, by_evolution, by_program, by_agent])
def test_every_way_keeps_the_target_and_its_seed(cuts, way):
    if way is by_agent:
        pytest.importorskip("stable_baselines3")
    first, again = (way(Environment(cuts, target=400), 16, seed=3) for _ in range(2))
    assert first == again
    assert len(first) == 16
    whole = [(value, counts) for value, counts in first if value > -math.inf]
    assert all(cuts.macs(counts) <= 400 and cuts.evaluate(counts) == value for value, counts in whole)
    assert whole


def test_the_program_needs_the_damages_first(cuts):
    with pytest.raises(BudgetError, match="needs 13 evaluations"):
        by_program(Environment(cuts, target=400), 12)
