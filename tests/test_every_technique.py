"""Every technique keeps every promise on every tiny model, and one of each stage works after one of each other."""

import itertools

import pytest

from featherweight.errors import RecipeError
from featherweight.technique import Recipe, name_of
from featherweight.techniques import (
    TECHNIQUES,
    Distill,
    FoldBatchNorm,
    LowRank,
    PruneChannels,
    PruneWeights,
    QuantizeStatic,
    QuantizeWeights,
)
from featherweight.testing import check_technique
from featherweight.zoo import small_models

MODELS = tuple(small_models())
SETTINGS = {
    "prune_weights": [PruneWeights(ratio=0.5), PruneWeights(ratio=0.5, epochs=1)],
    "prune_channels": [PruneChannels(ratio=0.4), PruneChannels(ratio=0.4, ranking="global", importance="random")],
    "low_rank": [LowRank(energy=0.5)],
    "quantize_weights": [QuantizeWeights(bits=4), QuantizeWeights(bits=3, per_channel=False)],
    "quantize_static": [QuantizeStatic()],
    "distill": [Distill(epochs=1)],
    "fold_batch_norm": [FoldBatchNorm()],
}
CASES = [setting for technique in TECHNIQUES for setting in SETTINGS.get(name_of(technique), [technique()])]
STAGES = (
    FoldBatchNorm(),
    PruneChannels(ratio=0.4),
    LowRank(energy=0.5),
    PruneWeights(ratio=0.5),
    QuantizeStatic(),
    QuantizeWeights(bits=4),
    Distill(epochs=1),
)


def legal(first, second):
    return first.stage is None or second.stage is None or first.stage <= second.stage


PAIRS = [pair for pair in itertools.permutations(STAGES, 2) if legal(*pair)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("technique", CASES, ids=str)
def test_keeps_every_promise(technique, model):
    check_technique(technique, small_models()[model])


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=() if name == "residual" else pytest.mark.slow) for name in MODELS]
)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{name_of(type(pair[0]))}-{name_of(type(pair[1]))}")
def test_pairs_compose(pair, model):
    check_technique(Recipe(pair), small_models()[model])


@pytest.mark.parametrize("model", MODELS)
def test_the_whole_chain(model):
    check_technique(Recipe((*STAGES[:4], STAGES[5], STAGES[6])), small_models()[model])


@pytest.mark.parametrize("pair", [p for p in itertools.permutations(STAGES, 2) if not legal(*p)], ids=str)
def test_going_back_a_stage_names_both(pair):
    with pytest.raises(RecipeError) as caught:
        Recipe(pair)
    assert str(pair[0]) in str(caught.value)
    assert str(pair[1]) in str(caught.value)
    assert Recipe(pair, any_order=True).steps == pair
