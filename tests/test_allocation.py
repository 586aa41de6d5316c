"""The mildest ratio that meets a budget of costs, and a ratio spread over several steps."""

import pytest
import torch
from torch import nn

from featherweight.allocation import allocate, gradually
from featherweight.costs import count_macs, parameters
from featherweight.data import Data
from featherweight.errors import BudgetError, RecipeError
from featherweight.running import run
from featherweight.scoping import only
from featherweight.technique import Context, Recipe
from featherweight.techniques import Distill, FoldBatchNorm, PruneChannels, PruneWeights, QuantizeWeights
from featherweight.zoo import small_models


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 4))


DATA = Data(example=torch.ones(1, 10))


def macs(model):
    return count_macs(lambda: model(torch.ones(1, 10))).macs


def cut(technique, model):
    return run(technique, model, Context(data=DATA)).model


def test_the_largest_model_that_holds():
    """1400 multiply-adds, 14 a unit: 40 % are 40 units, at ratio 0.596 (40.4 units round to 40) and no less."""
    model = wide()
    found = allocate(PruneChannels(), model, DATA, "macs<=40%")
    assert isinstance(found, PruneChannels)
    assert macs(cut(found, model)) == 560
    milder = PruneChannels(ratio=round(found.ratio - 0.001, 3))
    assert macs(cut(milder, model)) > 560
    assert model[0].out_features == 100


@pytest.mark.parametrize(
    ("budget", "units"), [("params<=604", 40), ("params<=2x", 49), ("macs<=0.7k, params<=604", 40)]
)
def test_forms_of_budgets_and_several_limits(budget, units):
    """15 parameters a unit and 4 biases."""
    found = allocate(PruneChannels(), wide(), DATA, budget)
    assert cut(found, wide())[0].out_features == units


def test_a_budget_that_already_holds_needs_no_cut():
    assert allocate(PruneChannels(), wide(), DATA, "macs<=100%").ratio == 0.0


def test_what_cannot_be_reached_names_the_closest():
    with pytest.raises(BudgetError, match=r"macs<=1% allows 14 and the closest is 28"):
        allocate(PruneChannels(), wide(), DATA, "macs<=1%")
    with pytest.raises(BudgetError, match="params"):
        allocate(PruneWeights(), wide(), DATA, "params<=50%")  # zeros are parameters too


def test_what_makes_no_sense_is_refused():
    with pytest.raises(BudgetError, match="drop"):
        allocate(PruneChannels(), wide(), DATA, "drop<=1pt")
    with pytest.raises(RecipeError, match="0 ratios"):
        allocate(QuantizeWeights(), wide(), DATA, "macs<=50%")
    with pytest.raises(RecipeError, match="2 ratios"):
        allocate(PruneChannels() + PruneWeights(), wide(), DATA, "macs<=50%")
    with pytest.raises(RecipeError, match="calibrate"):
        allocate(PruneChannels(importance="taylor"), wide(), DATA, "macs<=50%")


def test_scopes_and_recipes_keep_the_rest_of_what_they_say():
    task = small_models()["plain"]
    recipe = FoldBatchNorm() + only("features", PruneChannels(importance="taylor", batches=1))
    found = allocate(recipe, task.model, task.data, "macs<=60%")
    assert isinstance(found, Recipe)
    ratio = found.steps[1].inner.ratio
    assert found == FoldBatchNorm() + only("features", PruneChannels(ratio=ratio, importance="taylor", batches=1))
    assert 0 < ratio < 0.9


def test_bytes_of_the_file():
    model = wide()
    found = allocate(PruneWeights(), model, DATA, "size<=60%")
    assert 0.2 < found.ratio < 0.8
    assert parameters(cut(found, model))[1] < 0.8 * parameters(model)[0]


def test_latency_is_measured_beside_the_original_and_remembered(tmp_path):
    """No time is asserted: any model runs within an hour and none within a nanosecond."""
    table = tmp_path / "latency.json"
    assert allocate(PruneChannels(), wide(), DATA, "latency<=3600s", latency_table=table).ratio == 0.0
    assert "original" in table.read_text()
    with pytest.raises(BudgetError, match="latency"):
        allocate(PruneChannels(), wide(), DATA, "latency<=0.001us", latency_table=table)


def test_gradually_composes_to_the_whole():
    recipe = gradually(PruneChannels(ratio=0.488, importance="l1"), 3, Distill(epochs=2))
    cuts = recipe.steps[::2]
    assert [type(step) for step in recipe.steps] == [PruneChannels, Distill] * 3
    assert recipe.steps[1] == Distill(epochs=2)
    assert cuts[0] == cuts[1] == cuts[2]
    assert cuts[0].importance == "l1"
    assert (1 - cuts[0].ratio) ** 3 == pytest.approx(0.512)
    assert cut(Recipe(cuts), wide())[0].out_features == 51


def test_gradually_counts_zeros_that_are_there():
    recipe = gradually(only("0", PruneWeights(ratio=0.75)), 2, Distill(epochs=1))
    assert [step.inner.ratio for step in recipe.steps[::2]] == [0.5, 0.75]


def test_gradually_refuses_what_has_no_ratio_and_no_steps():
    with pytest.raises(RecipeError, match="no ratio"):
        gradually(FoldBatchNorm(), 2, Distill())
    with pytest.raises(RecipeError, match="steps=0"):
        gradually(PruneChannels(), 0, Distill())
