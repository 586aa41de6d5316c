"""The search, on made-up costs and scores: what it picks, and how many candidates it trains for it."""

import math

import pytest
import torch

from featherweight.budget import Budget
from featherweight.scoring import Score
from featherweight.search import Strength, Trial, default_recipe, search
from featherweight.techniques import Distill, PruneChannels, PruneWeights, QuantizeStatic, QuantizeWeights

ORIGINAL = {"size": 400_000.0, "params": 100_000.0, "macs": 1e6, "latency": 1e-3, "memory": 1e6}


def score(value, higher=True):
    return Score(value, higher, torch.tensor([value]), "made up")


class World:
    """Bytes fall with the factor, costs with the channels; the score falls off beyond `edge`."""

    def __init__(self, budget, edge=math.inf, higher=True, overhead=500.0):
        self.budget, self.edge, self.higher, self.overhead = Budget.parse(budget), edge, higher, overhead
        self.tried, self.asked = [], []

    def size(self, strength):
        return ORIGINAL["size"] / strength.factor + self.overhead

    def cheap(self, strength):
        self.asked.append(strength)
        left = (1 - strength.cut) ** 2
        return {"size": self.size(strength), **{key: ORIGINAL[key] * left for key in ORIGINAL if key != "size"}}

    def full(self, strength):
        self.tried.append(strength)
        drop = 0.001 + max(0.0, strength.factor / self.edge - 1) * 0.1
        value = 0.9 - drop if self.higher else 0.1 + drop
        size, limits = self.size(strength), {name: self.budget.limit(name) for name in ("size", "drop")}
        fits = limits["size"] is None or size <= limits["size"].allowed(ORIGINAL["size"])
        good = limits["drop"] is None or drop <= limits["drop"].allowed(0.9)
        recipe = default_recipe(strength)
        return Trial(strength, recipe, int(size), score(value, self.higher), drop, 0.0, fits, good, 1.0)

    def search(self, trials=20, epochs=4):
        return search(self.budget, ORIGINAL, self.cheap, self.full, epochs, trials)


def test_the_smallest_that_holds_is_picked():
    made = World("size<=5%, drop<=0.5pt", edge=50.0).search()
    best = made[-1]
    assert best.holds
    assert best.size_bytes == min(trial.size_bytes for trial in made if trial.holds)
    assert 48.0 <= best.strength.factor <= 52.1  # 0.5 points are lost at a factor of 52


def test_it_starts_where_the_untrained_file_fits():
    world = World("size<=5%, drop<=0.5pt", edge=1e9)
    world.search(trials=1)
    assert world.size(world.tried[0]) <= 0.05 * ORIGINAL["size"] <= world.size(world.tried[0]) * 2


@pytest.mark.parametrize("trials", [1, 2, 5])
def test_it_respects_the_number_of_trials(trials):
    world = World("size<=5%, drop<=0.5pt", edge=50.0)
    assert len(world.search(trials)) == len(world.tried) == trials


def test_it_stops_by_itself_when_the_edge_is_found():
    world = World("drop<=0.5pt", edge=50.0)
    assert len(world.search(trials=1000)) < 20


def test_without_a_drop_limit_the_best_score_that_fits_is_picked():
    world = World("size<=5%", edge=50.0)
    best = world.search()[-1]
    assert len(world.tried) == 1
    assert best.holds


def test_an_infeasible_budget_gives_the_closest():
    world = World("size<=1%, drop<=0.1pt", edge=10.0)
    made = world.search()
    assert not any(trial.holds for trial in made)
    assert made[-1].score.value == max(trial.score.value for trial in made)
    assert len(made) == 2  # once more with twice the training, and then it is settled


def test_a_first_failure_is_trained_longer_before_it_is_milder():
    world = World("drop<=0.5pt", edge=5.0)
    best = world.search()[-1]
    first, second = world.tried[:2]
    assert (second.factor, second.epochs) == (first.factor, 2 * first.epochs)
    assert best.holds
    assert 4.0 <= best.strength.factor < first.factor


def test_lower_scores_win_when_lower_is_better():
    world = World("size<=1%, drop<=0.1pt", edge=10.0, higher=False)
    made = world.search()
    assert made[-1].score.value == min(trial.score.value for trial in made)


@pytest.mark.parametrize(
    ("limit", "cut"),
    [("macs<=50%", 0.3), ("macs<=100%", 0.0), ("params<=4x", 0.5), ("memory<=10%", 0.7), ("macs<=0.001%", 0.9)],
)
def test_the_cut_is_the_smallest_that_meets_what_needs_no_score(limit, cut):
    world = World(f"{limit}, drop<=1pt", edge=50.0)
    world.search(trials=1)
    assert world.tried[0].cut == cut
    assert len(world.asked) <= 5  # a bisection


def test_a_latency_limit_asks_for_integers():
    world = World("latency<=2x, drop<=1pt")
    world.search(trials=1)
    assert world.tried[0].static
    assert world.tried[0].cut == 0.3


def test_the_default_recipe_is_explicit_and_in_order():
    kinds = [type(step) for step in default_recipe(Strength(0.5, 80.0, 6, static=False)).steps]
    assert kinds.index(PruneChannels) < kinds.index(PruneWeights) < kinds.index(QuantizeWeights)
    assert kinds.count(Distill) == 2
    untrained = default_recipe(Strength(0.5, 80.0, 6, static=False), trains=False)
    assert not any(isinstance(step, Distill) for step in untrained.steps)
    assert not any(getattr(step, "epochs", 0) for step in untrained.steps)
    assert QuantizeStatic in [type(step) for step in default_recipe(Strength(0.0, 4.0, 6, static=True)).steps]
    mild = default_recipe(Strength(0.0, 4.0, 6, static=False))
    assert not any(isinstance(step, PruneChannels | PruneWeights) for step in mild.steps)


def test_a_trial_is_json_able():
    trial = World("size<=5%, drop<=0.5pt").search(trials=1)[0].to_dict()
    assert set(trial) == {"recipe", "size_bytes", "score", "drop", "met", "seconds"}
