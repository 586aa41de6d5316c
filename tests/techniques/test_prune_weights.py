"""Unstructured pruning by hand, and zeros that stay."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.data import Data, Task
from featherweight.errors import RecipeError
from featherweight.running import run
from featherweight.scoping import only
from featherweight.scoring import lower
from featherweight.technique import Context, Recipe
from featherweight.techniques import Distill, PruneWeights, QuantizeStatic, QuantizeWeights
from featherweight.techniques.matrices import matrices
from featherweight.techniques.patterns import block_norms, parse_pattern
from featherweight.techniques.scores import erk_densities, lamp, masks_at
from featherweight.zoo import small_models


def learnable():
    """A task on which training always wins over the start: it is judged by the loss on its own training batches."""
    task = small_models()["plain"]
    return Task(task.model, dataclasses.replace(task.data, validate=task.data.train, score=lower(F.cross_entropy)))


def zeros(model, names):
    return {name: value == 0 for name, value in model.state_dict().items() if name in names}


def prune(technique, task):
    context = Context(data=task.data, teacher=task.model, seed=1)
    output, edits = run(technique, task.model, context)
    return output, edits, context


def test_ranking_within_a_layer():
    weights = {"a": torch.tensor([[1.0, -4.0, 2.0, 3.0]]), "b": torch.tensor([[0.1, 0.2]])}
    masks = masks_at(weights, 0.5, "layer")
    assert masks["a"].tolist() == [[False, True, False, True]]
    assert masks["b"].tolist() == [[False, True]]


def test_ranking_over_all():
    weights = {"a": torch.tensor([[1.0, -4.0, 2.0, 3.0]]), "b": torch.tensor([[0.1, 0.2]])}
    masks = masks_at(weights, 0.5, "global")
    assert masks["a"].tolist() == [[False, True, True, True]]
    assert masks["b"].tolist() == [[False, False]]


def test_lamp_by_hand():
    # squares 1, 4, 9 are divided by 14, 13, 9
    assert lamp(torch.tensor([3.0, -1.0, 2.0])).tolist() == pytest.approx([1.0, 1 / 14, 4 / 13])
    weights = {"a": torch.tensor([[3.0, -1.0, 2.0]]), "b": torch.tensor([[0.01, 0.02]])}  # b: 1/5, 1
    masks = masks_at(weights, 0.4, "lamp")
    assert masks["a"].tolist() == [[True, False, True]]
    assert masks["b"].tolist() == [[False, True]]  # its largest weight scores 1, however small


@pytest.mark.parametrize("ranking", ["lamp", "global", "layer"])
def test_exact_ratio(ranking):
    task = small_models()["plain"]
    output, _, context = prune(PruneWeights(ratio=0.75, ranking=ranking), task)
    weights = [p for name, p in output.named_parameters() if p.dim() >= 2]
    count = sum(w.numel() for w in weights)
    assert abs(sum(int((w == 0).sum()) for w in weights) - 0.75 * count) <= len(weights)
    assert {name for name, p in output.named_parameters() if p.dim() >= 2} == context.sparse
    assert all(torch.equal(a, b) for a, b in zip(task.model.buffers(), output.buffers(), strict=True))


def test_at_least_one_weight_survives():
    model = nn.Linear(3, 1)
    masks = masks_at({"weight": model.weight}, 0.9999, "layer")
    assert int(masks["weight"].sum()) == 1


def test_no_weight_decides_nothing():
    output, edits = run(PruneWeights(), nn.Sequential(nn.ReLU()), Context(data=Data(example=torch.ones(1, 2))))
    assert not edits
    assert isinstance(output, nn.Sequential)


def test_recurrent_and_embedding_weights_are_pruned():
    _, _, context = prune(PruneWeights(ratio=0.5), small_models()["recurrent"])
    assert context.sparse == {"embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "classifier.weight"}


def test_gradual_pruning_ends_at_the_ratio_and_names_its_tensors():
    task = small_models()["perceptron"]
    output, edits, context = prune(PruneWeights(ratio=0.8, epochs=4, ranking="layer", learning_rate=0.01), task)
    for name in context.sparse:
        value = output.state_dict()[name]
        assert int((value != 0).sum()) == round(value.numel() * 0.2)
    assert edits[0].sparse == tuple(sorted(context.sparse))
    assert not torch.equal(output[0].bias, task.model[0].bias), "it trained"


def test_gradual_pruning_needs_data():
    assert PruneWeights().needs == frozenset()
    assert PruneWeights(epochs=1).needs == {"train", "validate"}


@pytest.mark.parametrize("pruning", [PruneWeights(ratio=0.8), PruneWeights(ratio=0.8, epochs=2)], ids=str)
def test_zeros_outlive_distillation(pruning):
    task = learnable()
    pruned, _, context = prune(pruning, task)
    healed, _, _ = prune(Recipe((pruning, Distill(epochs=15, learning_rate=0.003, teacher_share=0.0))), task)
    before, after = zeros(pruned, context.sparse), zeros(healed, context.sparse)
    for name in context.sparse:
        assert torch.equal(before[name], after[name] & before[name]), name
    trained = {n: v for n, v in healed.state_dict().items() if not torch.equal(v, pruned.state_dict()[n])}
    assert set(trained) & context.sparse, "the survivors trained"
    assert not any(
        bool((v == 0).any() and v.signbit()[v == 0].any())
        for v in healed.state_dict().values()
        if v.is_floating_point()
    )


@pytest.mark.parametrize("quantize", [QuantizeWeights(bits=4), QuantizeStatic()], ids=str)
def test_zeros_outlive_quantization_and_training_after_it(quantize):
    task = learnable()
    pruned, _, context = prune(PruneWeights(ratio=0.8), task)
    output, _, _ = prune(
        Recipe((PruneWeights(ratio=0.8), quantize, Distill(epochs=15, learning_rate=0.003, teacher_share=0.0))), task
    )
    for name in context.sparse:
        codes = output.state_dict()[name.replace("weight", "codes")]
        assert not codes[pruned.state_dict()[name] == 0].any(), name
        assert codes.any(), name


def test_masks_do_not_hide_a_tied_weight_out_of_scope():
    task = small_models()["transformer"]
    output, _, _ = prune(only("inner", PruneWeights(ratio=0.5)), task)
    assert torch.equal(output.embedding.weight, task.model.embedding.weight)
    assert output.head.weight is output.embedding.weight


def test_unlabelled_data_and_no_teacher_is_refused():
    task = small_models()["perceptron"]
    data = dataclasses.replace(task.data, train=[inputs for inputs, _ in task.data.train])
    from featherweight.errors import DataError

    with pytest.raises(DataError, match="no teacher"):
        run(PruneWeights(epochs=1), task.model, Context(data=data))


def test_erk_by_hand():
    """Shares (1 + 2) / 2 and (4 + 4) / 16; half of 18 weights: 1.5 c 2 + 0.5 c 16 = 9 would overfill the first."""
    weights = {"a": torch.ones(1, 2), "b": torch.ones(4, 4)}
    densities = erk_densities(weights, 0.5)
    assert densities == {"a": 1.0, "b": pytest.approx(7 / 16)}
    assert erk_densities(weights, 0.2) == {"a": pytest.approx(1.5 * 3.6 / 11), "b": pytest.approx(0.5 * 3.6 / 11)}
    masks = masks_at({"a": torch.ones(1, 2), "b": torch.arange(16.0).reshape(4, 4)}, 0.5, "erk")
    assert masks["a"].all()
    assert masks["b"].flatten().tolist() == [False] * 9 + [True] * 7


def test_two_of_four_by_hand():
    weight = torch.tensor([[[1.0, -4.0], [2.0, 3.0], [9.0, 0.1]], [[5.0, 6.0], [-7.0, 8.0], [0.1, 9.0]]])
    mask = masks_at({"a": weight}, 0.5, "global", parse_pattern("2:4", 0.5, "x"))["a"]
    assert (weight * mask).tolist() == [
        [[0, -4], [0, 3], [9.0, pytest.approx(0.1)]],
        [[0, 0], [-7, 8], [pytest.approx(0.1), 9]],
    ]
    assert masks_at({"a": weight}, 0.3, "layer", parse_pattern("2:4", 0.5, "x"))["a"].sum() == 10, (
        "one of four, on the way"
    )


def test_blocks_by_hand():
    weight = torch.tensor([[3.0, 0.0, 1.0], [0.0, 0.0, 1.0], [2.0, 2.0, 1.5]])
    pattern = parse_pattern("2x2", 0.5, "x")
    assert block_norms(weight, pattern).flatten().tolist() == pytest.approx([1.5, 1.0, 2.0, 1.5])
    mask = masks_at({"a": weight}, 0.5, "layer", pattern)["a"]
    assert mask.tolist() == [[True, True, False], [True, True, False], [True, True, False]]
    wide = masks_at({"a": torch.randn(6, 3, 3, 3)}, 0.75, "lamp", parse_pattern("4x4", 0.75, "x"))["a"].flatten(1)
    for part in (*wide[:4].split(4, 1), *wide[4:].split(4, 1)):
        assert part.all() or not part.any()


@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", 0.5), ("1:3", 0.667), ("4x1", 0.5), ("2x8", 0.8)])
@pytest.mark.parametrize("epochs", [0, 4])
def test_patterns_hold_at_once_and_gradually(pattern, ratio, epochs):
    task = small_models()["residual"]
    output, _, context = prune(PruneWeights(ratio, pattern=pattern, epochs=epochs), task)
    for name in context.sparse:
        zeros = output.get_parameter(name).flatten(1) == 0
        first, second = map(int, re.split("[:x]", pattern))
        if ":" in pattern:
            whole = zeros.shape[1] // second * second
            assert (zeros[:, :whole].reshape(-1, second).sum(1) == second - first).all(), name
            assert not zeros[:, whole:].any(), name
        else:
            for rows in zeros.split(first):
                assert all(part.all() or not part.any() for part in rows.split(second, 1)), name
    count = sum(output.get_parameter(name).numel() for name in context.sparse)
    gone = sum(int((output.get_parameter(name) == 0).sum()) for name in context.sparse)
    assert gone == pytest.approx(ratio * count, rel=0.1)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2:4", r"pattern='2:4' removes 0.5, not ratio=0.9: give that ratio"),
        ("5:4", "keeps more than there is"),
        ("0x4", "cannot be read"),
        (124, "in quotes in YAML"),
    ],
)
def test_unreadable_patterns_are_refused(pattern, message):
    with pytest.raises(RecipeError, match=message):
        PruneWeights(0.9, pattern=pattern)


def test_attention_projections_are_pruned():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.inner(x, x, x)[0]

    data = Data(example=torch.randn(2, 3, 8))
    context = Context(data=data)
    run(PruneWeights(0.5), Model(), context)
    assert context.sparse == {"inner.in_proj_weight", "inner.out_proj.weight"}
    assert set(matrices(Model(), Context(data=data, scope=(("!inner.out_proj",),)))) == {"inner.in_proj_weight"}


def test_gradual_pruning_keeps_zeros_of_earlier_steps():
    task = small_models()["perceptron"]
    output, _, context = prune(Recipe((PruneWeights(0.6, "layer"), PruneWeights(0.3, "layer", epochs=3))), task)
    for name in context.sparse:
        value = output.get_parameter(name)
        assert int((value != 0).sum()) == round(value.numel() * 0.4), name
