"""The optimal brain surgeon: against its formula, and against what it must beat."""

import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.errors import ModelError, RecipeError
from featherweight.running import run
from featherweight.technique import Context
from featherweight.techniques import PruneSparseGpt, PruneWanda
from featherweight.techniques.patterns import Blocks, KeepOf
from featherweight.techniques.prune_sparse_gpt import pruned
from featherweight.zoo import small_models


def correlated(samples, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    return torch.randn(samples, inputs, generator=generator) @ mix


def none_gone(weight):
    return torch.zeros_like(weight, dtype=torch.bool)


def test_two_inputs_that_are_nearly_one():
    """What the removed weight did, the other does: its weight becomes the least-squares one."""
    x = torch.tensor([[1.0, 1.0], [1.0, 1.1], [2.0, 1.9]], dtype=torch.float64)
    moment = (x.T @ x / 3)[None]
    weight = torch.tensor([[0.5, 1.0]])
    made = pruned(weight, none_gone(weight), moment, 0.5, Blocks(), 1e-9)
    wanted = torch.linalg.lstsq(x[:, 1:], x @ weight.double().T).solution.item()
    assert made[0, 0] == 0
    assert made[0, 1].item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("columns", [40, 300])
def test_the_update_is_the_best_for_the_first_columns(columns):
    """With only the first columns masked, sequential elimination must reach the least-squares optimum of the rest."""
    x = correlated(2000, columns).double()
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = columns // 3
    gone = none_gone(weight)
    gone[:, :first] = True
    moment = x.T @ x / len(x)
    made = pruned(weight, gone, moment[None], first / columns, Blocks(), 1e-9)
    assert (made[:, :first] == 0).all()
    assert made[:, first:].all()
    wanted = torch.linalg.solve(moment[first:, first:], moment[first:] @ weight.T).T
    assert torch.allclose(made[:, first:], wanted, atol=1e-6)


def test_groups_are_solved_apart():
    x = torch.stack([correlated(500, 10, 1), correlated(500, 10, 2)]).double()
    weight = torch.randn(8, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moment = x.transpose(1, 2) @ x / 500
    both = pruned(weight, none_gone(weight), moment, 0.4, KeepOf(3, 5), 0.01)
    for group in range(2):
        rows = slice(4 * group, 4 * group + 4)
        alone = pruned(weight[rows], none_gone(weight[rows]), moment[group : group + 1], 0.4, KeepOf(3, 5), 0.01)
        assert torch.allclose(both[rows], alone)


@pytest.mark.parametrize("model", ["perceptron", "plain", "branches", "recurrent"])
def test_outputs_change_less_than_without_an_update(model):
    task = small_models()[model]
    generator = torch.Generator().manual_seed(3)
    first = task.data.calibrate[0][0]
    if first.is_floating_point():
        more = [(torch.randn(first.shape, generator=generator), None) for _ in range(30)]
    else:
        more = [(torch.randint(0, 20, first.shape, generator=generator), None) for _ in range(30)]
    data = Data(example=task.data.example, calibrate=more)
    inputs = torch.cat([batch for batch, _ in more])
    gaps = []
    for technique in (PruneSparseGpt(0.5, batches=30), PruneWanda(0.5, batches=30)):
        output, _ = run(technique, task.model, Context(data=data))
        with torch.no_grad():
            gaps.append(float((output(inputs) - task.model(inputs)).square().mean()))
    assert gaps[0] < 0.8 * gaps[1], gaps


@pytest.mark.parametrize(("pattern", "ratio"), [("", 0.7), ("2:4", 0.5), ("1:3", 0.6667)])
def test_ratio_and_pattern_hold(pattern, ratio):
    model = nn.Sequential(nn.Linear(150, 9), nn.Conv1d(4, 6, 3, groups=2)).eval()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv = model[0], model[1]

        def forward(self, x):
            return self.conv(self.linear(x))

    inputs = torch.randn(40, 4, 150)
    context = Context(data=Data(example=inputs[:1], calibrate=[inputs]))
    output, _ = run(PruneSparseGpt(ratio, pattern=pattern), Both(), context)
    assert context.sparse == {"linear.weight", "conv.weight"}
    for name in context.sparse:
        zeros = output.get_parameter(name).flatten(1) == 0
        if not pattern:
            assert int(zeros.sum()) == round(zeros.numel() * ratio)
            continue
        kept, group = map(int, pattern.split(":"))
        whole = zeros.shape[1] // group * group
        assert (zeros[:, :whole].reshape(-1, group).sum(1) == group - kept).all()
        assert not zeros[:, whole:].any()


def test_inputs_that_are_never_there_go_first_and_cost_nothing():
    inputs = torch.randn(50, 6)
    inputs[:, :3] = 0
    model = nn.Linear(6, 4)
    output, _ = run(PruneSparseGpt(0.5), model, Context(data=Data(example=inputs[:1], calibrate=[inputs])))
    assert not output.weight[:, :3].any()
    assert torch.equal(output.weight[:, 3:], model.weight[:, 3:])


def test_zeros_of_earlier_steps_stay():
    inputs = correlated(100, 12)
    model = nn.Linear(12, 8)
    with torch.no_grad():
        model.weight[:, 6:9] = 0
    context = Context(data=Data(example=inputs[:1], calibrate=[inputs]), sparse={"weight"})
    output, _ = run(PruneSparseGpt(0.5), model, context)
    assert not output.weight[:, 6:9].any()
    assert int((output.weight == 0).sum()) == 48


def test_inputs_that_are_not_finite_are_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x.log()).nan_to_num()

    inputs = torch.zeros(3, 2)
    with pytest.raises(ModelError, match="not finite"):
        run(PruneSparseGpt(), Model(), Context(data=Data(example=inputs, calibrate=[inputs])))


def test_patterns_are_read_when_the_recipe_is():
    with pytest.raises(RecipeError, match="prune_sparse_gpt: pattern='4x4'"):
        PruneSparseGpt(pattern="4x4")
