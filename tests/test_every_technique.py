"""Every technique keeps every promise on every tiny model, and one of each stage works after one of each other."""

import itertools
from dataclasses import dataclass
from typing import final

import pytest
import torch
from torch import nn

from featherweight.edits import Swap, Write
from featherweight.errors import RecipeError
from featherweight.technique import Recipe, Technique, name_of
from featherweight.techniques import (
    TECHNIQUES,
    BinarizeWeights,
    ChooseOperators,
    Distill,
    EqualizeLayers,
    FactorRecurrent,
    FactorTensors,
    FoldBatchNorm,
    LowRank,
    MixPrecisions,
    PenalizeEntropy,
    PruneBlocks,
    PruneChannels,
    PruneDeadUnits,
    PruneMovement,
    PruneSparseGpt,
    PruneVariational,
    PruneWanda,
    PruneWeights,
    QuantizeAware,
    QuantizeRateDistortion,
    QuantizeStatic,
    QuantizeWeights,
    ReestimateNorms,
    RegularizeGroups,
    Reinitialize,
    RoundParameters,
    SeparateConvolutions,
    ShareWeights,
    SmoothActivations,
    SplitLayers,
    TernarizeWeights,
)
from featherweight.testing import check_technique
from featherweight.zoo import small_models

MODELS = tuple(small_models())
SETTINGS = {
    "prune_weights": [
        PruneWeights(ratio=0.5),
        PruneWeights(ratio=0.5, epochs=1),
        PruneWeights(ratio=0.5, ranking="erk", pattern="3x2"),
        PruneWeights(ratio=0.5, pattern="2:4", epochs=1),
    ],
    "prune_wanda": [PruneWanda(ratio=0.5), PruneWanda(ratio=0.5, per="layer"), PruneWanda(ratio=0.5, pattern="1:2")],
    "prune_sparse_gpt": [PruneSparseGpt(ratio=0.5), PruneSparseGpt(ratio=0.5, pattern="2:4")],
    "prune_movement": [PruneMovement(ratio=0.5, epochs=1), PruneMovement(ratio=0.5, epochs=1, ranking="global")],
    "prune_variational": [PruneVariational(rate=30.0, threshold=-2.0, epochs=1)],
    "prune_blocks": [PruneBlocks(ratio=0.5), PruneBlocks(ratio=0.5, importance="loss")],
    "prune_channels": [
        PruneChannels(ratio=0.4),
        PruneChannels(ratio=0.4, ranking="global", importance="random"),
        PruneChannels(ratio=0.4, ranking="isomorphic", importance="taylor", batches=1),
        PruneChannels(ratio=0.4, importance="activation", reconstruct=True, batches=1),
        PruneChannels(ratio=0.4, importance="geometric_median", attention="width", multiple=2),
    ],
    "prune_dead_units": [PruneDeadUnits()],
    "low_rank": [
        LowRank(energy=0.5),
        LowRank(rank="ratio", method="whitened", shape="auto", sequential=True, batches=1),
        LowRank(rank="spread", method="fisher", shape="tucker", multiple=2),
        LowRank(rank="bayes", shape="spatial"),
    ],
    "factor_recurrent": [
        FactorRecurrent(rank="ratio"),
        FactorRecurrent(energy=0.5, method="svd", hidden="factors"),
        FactorRecurrent(rank="spread", hidden="shared", multiple=2),
    ],
    "factor_tensors": [
        FactorTensors(ratio=0.5, minimum=16),
        FactorTensors(form="tensor_train", ratio=0.3, minimum=16),
        FactorTensors(form="groups", ratio=0.3, groups=2, minimum=16),
        FactorTensors(form="circulant", ratio=0.5, minimum=16),
        FactorTensors(form="canonical", ratio=0.5, minimum=16),
    ],
    "quantize_weights": [
        QuantizeWeights(bits=4),
        QuantizeWeights(bits=3, per_channel=False),
        QuantizeWeights(bits=2, group=5),
        QuantizeWeights(bits=3, rounding="compensated", batches=1),
    ],
    "quantize_aware": [QuantizeAware(epochs=1), QuantizeAware(bits=2, activations=3, edges=4, epochs=1, batches=1)],
    "ternarize_weights": [TernarizeWeights(epochs=1, activations=8)],
    "binarize_weights": [BinarizeWeights(epochs=1, activations=1, gradient="frequency", batches=1)],
    "share_weights": [
        ShareWeights(clusters=5, rate=1.0, sensitivity="fisher", learn="weights", epochs=1, batches=1),
        ShareWeights(clusters=3, learn="points", epochs=1),
    ],
    "mix_precisions": [MixPrecisions(bits=3.5, batches=1)],
    "equalize_layers": [EqualizeLayers()],
    "smooth_activations": [SmoothActivations(batches=1)],
    "penalize_entropy": [PenalizeEntropy(epochs=1), PenalizeEntropy(epochs=1, bits=3, rate=10.0, per_channel=True)],
    "quantize_rate_distortion": [
        QuantizeRateDistortion(batches=1),
        QuantizeRateDistortion(step=0.3, sensitivity="inputs", compensate=True, per_channel=True, batches=1),
        QuantizeRateDistortion(sensitivity="none"),
    ],
    "quantize_static": [
        QuantizeStatic(),
        QuantizeStatic(range="average", weight_bits=4, rounding="compensated", batches=1),
    ],
    "distill": [
        Distill(epochs=1),
        Distill(epochs=1, loss="dkd", mixing="learnt"),
        Distill(epochs=1, loss="dist + 0.1 * logits", mixing="falling"),
    ],
    "fold_batch_norm": [FoldBatchNorm()],
    "split_layers": [SplitLayers()],
    "round_parameters": [RoundParameters(), RoundParameters(bits=3)],
    "reestimate_norms": [ReestimateNorms()],
    "reinitialize": [Reinitialize()],
    "regularize_groups": [RegularizeGroups(epochs=1)],
    "choose_operators": [ChooseOperators(epochs=1), ChooseOperators(epochs=2, price=100.0, cost="params", ratio=0.7)],
    "separate_convolutions": [SeparateConvolutions(), SeparateConvolutions(minimum=1)],
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


@final
@dataclass(frozen=True)
class Broken(Technique):
    """Breaks one promise by name."""

    fault: str = ""

    def edits(self, model, context):
        layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
        path = next(p for p, m in model.named_modules() if m is layer)
        if self.fault == "hook":
            layer.register_forward_hook(lambda *_: None)
        elif self.fault == "attribute":
            layer.mask = torch.ones(1)
        elif self.fault == "class":
            layer.__class__ = type("Masked", (nn.Linear,), {})
        elif self.fault == "mode":
            model.train()
        elif self.fault == "random":
            layer.weight.data = torch.rand_like(layer.weight)
        elif self.fault == "grow":
            options = {"in_features": layer.in_features, "rank": 99, "out_features": layer.out_features}
            yield Swap(path, "factored_linear", options, None)
        elif self.fault == "untold":
            model.extra = nn.Linear(1, 1)
        yield Write(None)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("hook", "output_is_plain"),
        ("class", "output_is_plain"),
        ("attribute", "edits_tell_everything"),
        ("untold", "edits_tell_everything"),
        ("mode", "output_keeps_its_form"),
        ("random", "deterministic"),
        ("grow", "deterministic|bits_never_grow"),
    ],
)
def test_the_suite_sees_a_broken_promise(fault, check):
    with pytest.raises(AssertionError, match=check):
        check_technique(Broken(fault), small_models()["plain"])
